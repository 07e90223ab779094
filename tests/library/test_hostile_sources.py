"""What strangers put into adapters and what disks do to them: each is refused in one line that says what to do."""

import gzip
import io
import json
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from lr_ray.errors import AdapterError, StorageError
from lr_ray.library import archives, sources
from lr_ray.library.sources import RawAdapter, read_sources
from tests.library.made import (
    ADAPTER,
    BARE,
    PACK,
    WEIGHTS,
    adapters,
    below,
    only_error,
    refuses,
    tar_of,
    write_files,
    zip_of,
)

NAMES_OUTSIDE = [
    "../a.safetensors",
    "/etc/a.safetensors",
    "a/../../b.safetensors",
    "..\\a.safetensors",
    "C:/a",
    "a\nb",
    "\udcff",
]
OUTSIDE = r"leads outside of it or is no portable name; pack it again with relative names"


def tar_with(change: Callable[[tarfile.TarInfo], None], suffix: str = "", content: bytes = WEIGHTS) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=f"w:{suffix}") as tar:
        member = tarfile.TarInfo("a.safetensors")
        member.size = len(content)
        change(member)
        tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def setter(**values: Any) -> Callable[[tarfile.TarInfo], None]:
    def change(member: tarfile.TarInfo) -> None:
        for name, value in values.items():
            setattr(member, name, value)

    return change


def zip_with(**values: Any) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as unpacked:
        member = zipfile.ZipInfo("a.safetensors")
        for name, value in values.items():
            setattr(member, name, value)
        unpacked.writestr(member, WEIGHTS)
    return packed.getvalue()


def safetensors_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(begin: int, end: int, *, dtype: str = "F32", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


# ------------------------------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("name", NAMES_OUTSIDE)
def test_a_member_that_leads_outside(tmp_path: Path, name: str) -> None:
    """The whole archive is refused: whoever packed one of those packed the rest too."""
    (tmp_path / "a.tar").write_bytes(tar_of(BARE | {name: WEIGHTS}))
    refuses(tmp_path / "a.tar", f"^archive {tmp_path}/a.tar: .* {OUTSIDE}")
    if name != "\udcff":
        (tmp_path / "a.zip").write_bytes(zip_of(BARE | {name: WEIGHTS}))
        refuses(tmp_path / "a.zip", f"^archive {tmp_path}/a.zip: .* {OUTSIDE}")
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(path.name for path in tmp_path.glob("a.*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setter(type=tarfile.SYMTYPE, linkname="/etc/passwd"), r"is a link to '/etc/passwd'; pack it again .*--dereference"),
        (setter(type=tarfile.LNKTYPE, linkname="../x"), r"is a link to '../x'; pack it again"),
        (setter(type=tarfile.CHRTYPE), r"is a device, a pipe or a file with holes; pack it again"),
        (setter(type=tarfile.BLKTYPE), r"is a device, a pipe"),
        (setter(type=tarfile.FIFOTYPE), r"is a device, a pipe"),
        (setter(type=b"Z"), r"is a device, a pipe"),
        (setter(size=9 * 2**30), r"with 'a.safetensors' it holds 9,663,676,416 bytes, but at most 8,589,934,592; split it"),
        (setter(size=-1), r"with 'a.safetensors' it holds -1 bytes"),
        (setter(size=2**20), r"damaged \(ReadError: unexpected end of data\); get it again from its source"),
        (setter(type=tarfile.XHDTYPE, size=2**40), r"damaged \(ValueError: 1,099,511,627,776 bytes to read to learn"),
        (setter(type=tarfile.GNUTYPE_LONGNAME, size=2**40), r"damaged \(ValueError: 1,099,511,627,776 bytes to read to learn"),
    ],
)
@pytest.mark.parametrize("suffix", ["", "gz"])
def test_a_tar_of_a_stranger(tmp_path: Path, change: Callable[[tarfile.TarInfo], None], message: str, suffix: str) -> None:
    source = tmp_path / f"a.tar{suffix and '.gz'}"
    source.write_bytes(_damaged_tar(change, suffix))
    refuses(source, f"^archive {source}: .*{message}")


def _damaged_tar(change: Callable[[tarfile.TarInfo], None], suffix: str) -> bytes:
    member = tarfile.TarInfo("a.safetensors")
    member.size = len(WEIGHTS)
    change(member)
    plain = member.tobuf(tarfile.GNU_FORMAT) + WEIGHTS.ljust(1024, b"\0") + bytes(1024)
    return gzip.compress(plain) if suffix else plain


def test_zips_of_a_stranger(tmp_path: Path) -> None:
    source = tmp_path / "a.zip"
    cases: list[tuple[bytes, str]] = [
        (zip_with(external_attr=(stat.S_IFLNK | 0o777) << 16), "'a.safetensors' is a link; pack it again"),
        (zip_with(external_attr=stat.S_IFCHR << 16), "'a.safetensors' is a device or a pipe"),
        (zip_with(compress_type=zipfile.ZIP_BZIP2), "is compressed by method 12, not stored or deflated"),
        (zip_with(compress_type=zipfile.ZIP_LZMA), "is compressed by method 14, not stored or deflated"),
        (zip_of(BARE)[:-30], "damaged .BadZipFile"),
        (b"", "damaged .BadZipFile: File is not a zip file"),
        (_patched_zip(8, b"\1\0"), "'a.safetensors' is encrypted"),
        (_patched_zip(24, struct.pack("<I", 1000)), f"has {len(WEIGHTS)} bytes in place of the 1,000 that were announced"),
    ]
    for content, message in cases:
        source.write_bytes(content)
        refuses(source, message)


def _patched_zip(offset: int, content: bytes) -> bytes:
    """Other bytes in the entry that the directory has of the one member."""
    packed = bytearray(zip_with())
    start = packed.index(b"PK\1\2") + offset
    packed[start : start + len(content)] = content
    return bytes(packed)


def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by what they declare; a member that unpacks to more than it declares is cut off there, and found out."""
    zeros = {f"{index}.safetensors": bytes(2**20) for index in range(4)}
    monkeypatch.setattr(archives, "MAX_ARCHIVE_BYTES", 3 * 2**20)
    for suffix in (".zip", ".tar.gz"):
        source = tmp_path / f"a{suffix}"
        source.write_bytes(PACK[suffix](zeros))
        assert source.stat().st_size < 2**16
        refuses(source, r"with '3.safetensors' it holds 4,194,304 bytes, but at most 3,145,728; split it")
    packed = bytearray(zip_of({"a.safetensors": bytes(2**24)}))
    start = packed.index(b"PK\1\2") + 24
    packed[start : start + 4] = struct.pack("<I", 100)
    (tmp_path / "a.zip").write_bytes(packed)
    refuses(tmp_path / "a.zip", r"'a.safetensors' is damaged \(BadZipFile: Bad CRC-32")


def test_more_than_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_files(tmp_path / "in", below("a", ADAPTER))
    for suffix, pack in PACK.items():
        (tmp_path / f"a{suffix}").write_bytes(pack(below("a", ADAPTER)))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "MAX_WEIGHTS_BYTES", 100)
        message = rf"'adapter_model.safetensors': {len(WEIGHTS)} bytes, but at most 100 are read; leave it out or make it"
        for source in (root, f"{root}/a/adapter_model.safetensors", *(tmp_path / f"a{suffix}" for suffix in PACK)):
            refuses(source, message)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "MAX_CONFIG_BYTES", 60)
        (tmp_path / "list.txt").write_text("a\n" * 50)
        refuses(tmp_path / "list.txt", r"^list .*/list.txt: 100 bytes, but at most 60 are read")
        refuses(root, r"adapter .*/in/a: 'README.md': \d+ bytes, but at most 60 are read")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "MAX_FILES", 5)
        patch.setattr(archives, "MAX_FILES", 5)
        refuses(root, r"source .*/in: 6 files, but at most 5; give it in parts")
        for suffix in PACK:
            refuses(tmp_path / f"a{suffix}", r"it holds more than 5 members; split it")
    with monkeypatch.context() as patch:
        patch.setattr(archives, "MAX_ARCHIVE_BYTES", 10)
        for suffix in PACK:
            refuses(tmp_path / f"a{suffix}", r"^archive .*: [\d,]+ bytes, but at most 10 are read; leave it out")
    with monkeypatch.context() as patch:
        patch.setattr(archives, "_MAX_ARCHIVE_HEADERS", 200)
        for suffix in PACK:
            refuses(tmp_path / f"a{suffix}", r"damaged \(ValueError: [\d,]+ bytes to read to learn what it holds; at most 200")


def test_a_name_twice_in_an_archive(tmp_path: Path) -> None:
    packed = tar_of({"./a.safetensors": WEIGHTS, "a.safetensors": WEIGHTS})
    (tmp_path / "a.tar").write_bytes(packed)
    refuses(tmp_path / "a.tar", r"'a.safetensors' is in it twice; pack it again")


@pytest.mark.parametrize("suffix", PACK)
def test_an_archive_that_was_cut_off(tmp_path: Path, suffix: str) -> None:
    """An error wherever it was cut, but for the zeros at the end of a tar."""
    whole = PACK[suffix](BARE)
    source = tmp_path / f"a{suffix}"
    for size in range(0, len(whole.rstrip(b"\0")) - 1, 37):
        source.write_bytes(whole[:size])
        assert only_error(source).startswith(("archive", "adapter", "source"))


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_a_compressed_archive_with_a_bit_flipped_in_its_tensors(tmp_path: Path, suffix: str) -> None:
    """Stored, not deflated, so that nothing but the CRC can tell."""
    packed = bytearray(gzip.compress(tar_of(BARE), 0) if suffix == ".tar.gz" else zip_with())
    packed[packed.index(WEIGHTS) + len(WEIGHTS) - 1] ^= 1
    (tmp_path / f"a{suffix}").write_bytes(packed)
    refuses(tmp_path / f"a{suffix}", r"damaged \((BadGzipFile: CRC check failed|BadZipFile: Bad CRC-32)")


# ---------------------------------------------------------------------------------------------------------------- files


def test_pickles(tmp_path: Path) -> None:
    convert = r"; only safetensors are read, .*`safetensors.torch.save_file\(torch.load\(FILE, weights_only=True\)"
    files = {"adapter_config.json": b"{}", "adapter_model.bin": b"cos\nsystem\n(S'touch /tmp/owned'\ntR."}
    root = write_files(tmp_path / "a", files)
    refuses(root, rf"^adapter {root}: no adapter_model.safetensors, but the pickle 'adapter_model.bin'{convert}")
    refuses(f"{root}/adapter_model.bin", rf"^source '{root}/adapter_model.bin': a pickle{convert}")
    root = write_files(tmp_path / "b", {"adapter_model.bin": b""})
    refuses(root, rf"^adapter {root}/adapter_model.bin: .* the pickle 'adapter_model.bin'{convert}")
    root = write_files(tmp_path / "c", {"model.pt": b"", "x": b""})
    refuses(root, rf"^source {root}: no safetensors in it, but 'model.pt'{convert}")
    (tmp_path / "d.zip").write_bytes(zip_of(below("d", files)))
    refuses(tmp_path / "d.zip", rf"^adapter {tmp_path}/d.zip!d: .* the pickle 'adapter_model.bin'{convert}")
    root = write_files(tmp_path / "e", {"adapter_config.json": b"{}"})
    refuses(root, rf"^adapter {root}: no adapter_model.safetensors beside its adapter_config.json; get it again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (WEIGHTS[:5], "bytes in a file of 5"),
        (WEIGHTS[:-1], "tensors of 48 bytes in all, but 47 follow the header"),
        (WEIGHTS + b"\0", "tensors of 48 bytes in all, but 49 follow the header"),
        (WEIGHTS[:8] + b"[" + WEIGHTS[9:], "its header does not start with {"),
        (WEIGHTS[:20] + bytes([WEIGHTS[20] ^ 0x80]) + WEIGHTS[21:], "can't decode byte"),
        (struct.pack("<Q", 2**60) + b"{}", "a header of 1,152,921,504,606,846,976 bytes in a file of 10"),
        (safetensors_of({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "tensor 'b' starts at byte 4 in place of 8"),
        (safetensors_of({"a": tensor(0, 8), "b": tensor(0, 8)}, bytes(8)), "tensor 'b' starts at byte 0 in place of 8"),
        (safetensors_of({"a": tensor(4, 8)}, bytes(8)), "tensor 'a' starts at byte 4 in place of 0"),
        (safetensors_of({"a": tensor(0, 2**60)}, bytes(8)), "tensor 'a' has shape"),
        (safetensors_of({"a": tensor(0, 8, shape=[2**62, 2**62, 0])}), "tensor 'a' has shape"),
        (safetensors_of({"a": tensor(0, 8, shape=[-2])}, bytes(8)), r"tensor 'a' has shape \[-2\]"),
        (safetensors_of({"a": tensor(0, 8, shape=[2.0])}, bytes(8)), r"tensor 'a' has shape \[2.0\]"),
        (safetensors_of({"a": tensor(0, 8, shape=[True, 2])}, bytes(8)), r"tensor 'a' has shape \[True, 2\]"),
        (safetensors_of({"a": tensor(0, 8, shape=[3])}, bytes(8)), r"tensor 'a' of F32 \[3\] has the offsets \[0, 8\]"),
        (safetensors_of({"a": tensor(0, 8, dtype="F33")}, bytes(8)), "tensor 'a' has dtype 'F33', not one of BOOL, "),
        (safetensors_of({"a": [1]}, bytes(8)), "tensor 'a' is a list"),
        (safetensors_of({"__metadata__": {"a": 1}}), "its __metadata__ is not text by name"),
        (safetensors_of({"__metadata__": ["a"]}), "its __metadata__ is not text by name"),
        (safetensors_of(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'), "-0 is no integer"),
        (safetensors_of(b'{"__metadata__":{"a":"1","a":"2"}}'), "'a' stands in it twice"),
        (safetensors_of(b'{"a":' * 101 + b"1" + b"}" * 101), "nested too deeply"),
        (safetensors_of(b'{"a":' * 5000), "recursion"),
        (safetensors_of(b'{"\\ud800":1}'), "surrogates not allowed"),
    ],
)
def test_safetensors_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    root = write_files(tmp_path, BARE | {"adapter_model.safetensors": content})
    prefix = f"^adapter {root}: 'adapter_model.safetensors': no whole safetensors file"
    refuses(root, rf"{prefix} \(.*{message}.*\); get it again from its source$")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "config.json", "preprocessor_config.json", "processor_config.json", "lr_ray.json"]
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2]", r"ValueError: it holds a list"),
        (b"", r"JSONDecodeError: Expecting value"),
        (b'{"a": 1', r"JSONDecodeError: Expecting ',' delimiter"),
        (b'{"a": NaN}', r"ValueError: NaN is no finite number"),
        (b'{"a": -Infinity}', r"ValueError: -Infinity is no finite number"),
        (b'{"a": 1e999}', r"ValueError: 1e999 is no finite number"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"ValueError: Exceeds the limit"),
        ('{"a": "ä"}'.encode("latin-1"), r"UnicodeDecodeError: 'utf-8' codec can't decode"),
        ('{"a": 1}'.encode("utf-16"), r"UnicodeDecodeError"),
        (b'{"a": "\\ud800"}', r"UnicodeEncodeError: .* surrogates not allowed"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, r"ValueError: nested too deeply"),
        (b'{"a":' + b"[" * 200_000, r"RecursionError"),
        (b'{"a": 1, "b": 2, "a": 3}', r"ValueError: 'a' stands in it twice"),
    ],
)
def test_json_that_is_none(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    root = write_files(tmp_path, ADAPTER | {name: content})
    allowed = r"allowed: UTF-8, finite numbers, at most 100 levels; get it again from its source$"
    refuses(root, rf"^adapter {root}: {name}: no JSON object that can be read \({message}.*\); {allowed}")


@pytest.mark.parametrize("id2label", ['{"1": "a", "2": "b"}', '{"0": "a", "00": "b"}', '{"0": 1}', '"ab"', "7", '[["a"]]'])
def test_class_names_that_are_none(tmp_path: Path, id2label: str) -> None:
    root = write_files(tmp_path, BARE | {"config.json": f'{{"id2label": {id2label}}}'.encode()})
    refuses(root, rf"^adapter {root}: id2label of config.json does not number its class names 0, 1, 2, … .*; correct or remove")


def test_class_names_as_a_list(tmp_path: Path) -> None:
    root = write_files(tmp_path, BARE | {"config.json": b'{"id2label": ["b", "a"]}'})
    assert adapters(root)[root].class_names == ("b", "a")


@pytest.mark.parametrize(
    ("front_matter", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", r"YAMLError: aliases are not read"),
        ("a: &a {b: *a}", r"YAMLError: aliases are not read"),
        ("a: !!python/object/apply:os.system ['touch /tmp/owned']", r"ConstructorError: could not determine a constructor"),
        ("- a\n- b", r"ValueError: it holds a list"),
        ("a: [", r"ParserError"),
        ("a: " + "[" * 5000, r"RecursionError"),
        ("a: " + "[" * 150 + "]" * 150, r"ValueError: nested too deeply"),
        ("a: !!timestamp x", r"AttributeError"),
        ("a: !!int ''", r"IndexError|ValueError"),
        ("a: !!bool x", r"KeyError"),
        ("a: 2020-99-99", r"ValueError: month must be in"),
        ("? [a, b]\n: c", r"ConstructorError: .*unhashable key"),
        (f"? 0x{'f' * 20_000}\n: a", r"ValueError: Exceeds the limit"),
        ('a: "\\ud800"', r"UnicodeEncodeError|ScannerError"),
        ("a: x\n" * 20_000, r"ValueError: more than 65,536 characters"),
    ],
)
def test_a_model_card_of_a_stranger(tmp_path: Path, front_matter: str, message: str) -> None:
    root = write_files(tmp_path, BARE | {"README.md": f"---\n{front_matter}\n---\n".encode()})
    refuses(root, rf"^adapter {root}: README.md: its front matter is no YAML mapping \(({message}).*; correct or remove it$")


@pytest.mark.parametrize("card", ["", "# Only text\n", "---\n---\n", "---\n", "--- \n--- \n", "----\na: b\n---\n"])
def test_a_model_card_without_facts(tmp_path: Path, card: str) -> None:
    root = write_files(tmp_path, BARE | {"README.md": card.encode()})
    assert adapters(root)[root].card == {}


# -------------------------------------------------------------------------------------------------------------- sources


def test_links_in_a_folder(tmp_path: Path) -> None:
    """Those of the user's own disk are followed, once each; pipes and links to nothing are no files."""
    root = write_files(tmp_path / "root", below("a", BARE) | {"a/deep/x": b""})
    write_files(tmp_path / "elsewhere", BARE)
    (tmp_path / "root/a/deep/up").symlink_to(tmp_path / "root")
    (tmp_path / "root/a/self").symlink_to("self")
    (tmp_path / "root/nothing.safetensors").symlink_to("nowhere")
    (tmp_path / "root/z").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "root/pipe.safetensors")
    assert list(adapters(root)) == [f"{root}/a", f"{root}/z"]
    refuses(tmp_path / "root/a/self", "cannot list .*/a/self: Too many levels of symbolic links; ")
    refuses(tmp_path / "root/pipe.safetensors", "pipe.safetensors")


def test_sources_of_no_use(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    write_files(tmp_path, {"notes/a.md": b"", "x.pdf": b"", "e.txt": b"# nothing\n\n", "l.txt": b"\xff"})
    kinds = r"give a folder with adapter_config.json and adapter_model.safetensors or .* a \.txt list of those$"
    for source in (tmp_path / "absent", tmp_path / "absent.zip", tmp_path / "absent.txt", empty):
        refuses(source, rf"^source '{source}': no such file, nor a folder with files in it; {kinds}")
    refuses(tmp_path / "notes", rf"^source {tmp_path}/notes: no adapter in its 1 files; {kinds}")
    refuses(tmp_path / "x.pdf", rf"^source '{tmp_path}/x.pdf': a file of another kind; {kinds}")
    refuses(tmp_path / "e.txt", rf"^list {tmp_path}/e.txt: names no source; write one a line, each a folder")
    refuses(tmp_path / "l.txt", rf"^list {tmp_path}/l.txt: no UTF-8 text \(.*\); write one source a line")
    for source in ("", "  ", "a\0b", "a\x1b[2Jb"):
        refuses(source, rf"no name of a source; {kinds}")
    refuses("gopher://host/a", r"unknown scheme gopher:// .*; correct the URI")
    refuses("file://relative", r"file:// needs an absolute path")


def test_a_file_that_cannot_be_read_costs_no_other_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_files(tmp_path, below("a", BARE) | below("b", BARE) | {"c.zip": zip_of(BARE)} | {"d.zip": zip_of(BARE)})

    def refuse(uri: str) -> Any:
        raise StorageError(f"cannot read {uri}: gone")

    real, real_open = sources.read_bytes, sources.open_file
    monkeypatch.setattr(sources, "read_bytes", lambda uri: (refuse if "/a/" in uri else real)(uri))
    monkeypatch.setattr(sources, "open_file", lambda uri: (refuse if "/c.zip" in uri else real_open)(uri))
    first, second, third, fourth = read_sources(root)
    assert str(first) == f"adapter {root}/a: cannot read {root}/a/adapter_config.json: gone"
    assert str(third) == f"archive {root}/c.zip: cannot read {root}/c.zip: gone"
    assert isinstance(second, RawAdapter)
    assert isinstance(fourth, RawAdapter)


def test_a_file_that_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_files(tmp_path, BARE)
    monkeypatch.setattr(sources, "read_bytes", lambda _: b"{}")
    refuses(root, r"'adapter_config.json' has 2 bytes in place of the \d+ that were announced; .*: get it again")


# ----------------------------------------------------------------------------------------------------------- properties

MUTATED: dict[str, bytes] = {
    "adapter_model.safetensors": WEIGHTS,
    "adapter_config.json": ADAPTER["adapter_config.json"],
    "README.md": ADAPTER["README.md"],
    "a.tar": tar_of(below("in", BARE)),
    "a.tar.gz": tar_of(below("in", BARE), "w:gz"),
    "a.zip": zip_of(below("in", BARE)),
}
BYTES = st.sampled_from([bytes([byte]) for byte in b'\0\1\x7f\xff{}[]",:0-9e'])
CHANGES = st.lists(st.tuples(st.integers(0, 2**16), BYTES, st.integers(0, 2)), max_size=6)
"""Where, what, and in place of how many bytes."""


@pytest.mark.parametrize("name", MUTATED)
def test_mutated_bytes_are_an_adapter_or_an_error(tmp_path: Path, name: str) -> None:
    """No other exception; and what is taken, safetensors takes."""
    root = write_files(tmp_path, BARE | {"README.md": b""}) if name in ADAPTER else str(tmp_path)

    @settings(
        max_examples=200 if name in BARE else 100, derandomize=True, deadline=None, database=None, phases=[Phase.generate]
    )
    @given(changes=CHANGES, end=st.none() | st.integers(0, len(MUTATED[name])))
    def check(changes: list[tuple[int, bytes, int]], end: int | None) -> None:
        content = MUTATED[name]
        for place, byte, replaced in changes:
            at = place % (len(content) + 1)
            content = content[:at] + byte + content[at + replaced :]
        (tmp_path / name).write_bytes(content[:end])
        try:
            found = list(read_sources(root if name in ADAPTER else f"{root}/{name}"))
        except AdapterError as error:
            found = [error]
        for item in found:
            if isinstance(item, RawAdapter):
                load(item.weights)
            else:
                assert isinstance(item, AdapterError)
                assert str(item).isprintable()

    check()
