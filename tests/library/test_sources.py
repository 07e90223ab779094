"""Every kind of source, from what a user names to the raw files of adapters."""

import io
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import boto3
import pytest
from huggingface_hub import HfApi
from huggingface_hub.hf_api import ModelInfo

from lr_ray.errors import AdapterError
from lr_ray.library.sources import RawAdapter, read_sources
from lr_ray.storage.filesystem import write_bytes
from tests.library.made import (
    ADAPTER,
    BARE,
    PACK,
    WEIGHTS,
    adapters,
    assert_alone,
    assert_whole,
    below,
    refuses,
    tar_of,
    write_files,
    zip_of,
)


def test_a_folder(tmp_path: Path) -> None:
    root = write_files(tmp_path, ADAPTER | {"other.safetensors": b"", "logs.zip": b"", "adapter_model.bin": b""})
    for source in (root, f"{root}/", f"file://{root}"):
        ((name, adapter),) = adapters(source).items()
        assert name == source.rstrip("/")
        assert_whole(adapter)


def test_what_transformers_5_saves_of_images_comes_before_what_4_did(tmp_path: Path) -> None:
    processor = b'{"image_processor": {"image_mean": [0.1, 0.2, 0.3], "size": 64}, "processor_class": "CLIPProcessor"}'
    root = write_files(tmp_path, ADAPTER | {"processor_config.json": processor})
    (found,) = read_sources(root)
    assert isinstance(found, RawAdapter)
    assert found.preprocessor == {"image_mean": [0.1, 0.2, 0.3], "size": 64}


def test_a_folder_of_folders(tmp_path: Path) -> None:
    files = below("a", ADAPTER) | below("b/deep", BARE) | {"c/one.safetensors": WEIGHTS, "c/two.safetensors": WEIGHTS}
    root = write_files(tmp_path, files | below(".cache", ADAPTER) | below("__MACOSX/a", BARE) | {"a/.x.safetensors": b""})
    found = adapters(root)
    assert list(found) == [f"{root}/{name}" for name in ("a", "b/deep", "c/one.safetensors", "c/two.safetensors")]
    assert_whole(found[f"{root}/a"])
    assert found[f"{root}/b/deep"].class_names == ("of the config",)
    assert_alone(found[f"{root}/c/one.safetensors"])


def test_a_folder_with_archives_and_loose_files(tmp_path: Path) -> None:
    """An archive that is unusable, or lies in another, costs no other adapter."""
    packed = {f"p{suffix}": pack(below("in", ADAPTER)) for suffix, pack in PACK.items()}
    files = below("a", ADAPTER) | packed | {"loose.safetensors": WEIGHTS, "bad.zip": b"no", "sub/q.zip": zip_of(BARE)}
    root = write_files(tmp_path, files | {"z.tar": tar_of({"inner.zip": zip_of(BARE)})} | {"y.tar": tar_of({"notes": b""})})
    found = list(read_sources(root))
    good = {item.source.removeprefix(f"{root}/"): item for item in found if isinstance(item, RawAdapter)}
    bad = [str(item) for item in found if isinstance(item, AdapterError)]
    assert list(good) == ["a", "loose.safetensors", "p.tar!in", "p.tar.gz!in", "p.tgz!in", "p.zip!in", "sub/q.zip"]
    for name in ("a", "p.tar!in", "p.tar.gz!in", "p.zip!in"):
        assert_whole(good[name])
    assert len(bad) == 3
    assert bad[0].startswith(f"archive {root}/bad.zip: damaged (BadZipFile: File is not a zip file); get it again")
    assert f"source {root}/y.tar: no adapter in its 1 files; give a folder" in bad[1]
    assert f"source {root}/z.tar: no adapter in it but in the archive 'inner.zip'; unpack it" in bad[2]


def test_a_folder_of_archives_alone(tmp_path: Path) -> None:
    assert list(adapters(write_files(tmp_path, {"a.zip": zip_of(BARE)}))) == [f"{tmp_path}/a.zip"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "other.safetensors", "OTHER.SAFETENSORS"])
def test_a_single_file(tmp_path: Path, name: str) -> None:
    source = f"{write_files(tmp_path, {name: WEIGHTS})}/{name}"
    ((label, adapter),) = adapters(source).items()
    assert label == source
    assert_alone(adapter)


def test_the_weights_of_an_adapters_folder_mean_that_adapter(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_files(tmp_path, ADAPTER | {"other.safetensors": WEIGHTS} | below("below", ADAPTER))
    for name, content in ADAPTER.items():
        write_bytes(f"{bucket}/a/{name}", content)
    monkeypatch.chdir(tmp_path)
    for source, label in ((f"{root}/", root), ("", "."), (f"{bucket}/a/", f"{bucket}/a")):
        ((name, adapter),) = adapters(f"{source}adapter_model.safetensors").items()
        assert name == label
        assert_whole(adapter)
    ((name, adapter),) = adapters("other.safetensors").items()
    assert name == "other.safetensors"
    assert_alone(adapter)


@pytest.mark.parametrize("suffix", PACK)
def test_an_archive(tmp_path: Path, suffix: str) -> None:
    files = below("./x/a", ADAPTER) | below("x/b", BARE) | {"one.safetensors": WEIGHTS, "x/.git/config": b"", "._x": b""}
    source = tmp_path / f"all{suffix}"
    source.write_bytes(PACK[suffix](files))
    found = adapters(source)
    assert list(found) == [f"{source}!{name}" for name in ("x/a", "x/b", "one.safetensors")]
    assert_whole(found[f"{source}!x/a"])
    assert found[f"{source}!x/b"].config["r"] == 2
    assert_alone(found[f"{source}!one.safetensors"])


def test_an_archive_whose_root_is_the_adapter(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(tar_of(ADAPTER, "w:gz"))
    ((name, adapter),) = adapters(tmp_path / "a.tar.gz").items()
    assert name == f"{tmp_path}/a.tar.gz"
    assert_whole(adapter)


def test_archives_with_folders_and_from_other_tools(tmp_path: Path) -> None:
    """Entries for folders, long names in GNU's and in POSIX's way, sizes after the content (a zip that was streamed)."""
    root = write_files(tmp_path / "in", below("n" * 120 + "/a", ADAPTER))
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as tar:
            tar.add(root, arcname=".")
        assert_whole(adapters(tmp_path / "a.tar")[f"{tmp_path}/a.tar!{'n' * 120}/a"])

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError("a stream")

    stream = Stream()
    with zipfile.ZipFile(stream, "w") as unpacked:
        unpacked.mkdir("a")
        for name, content in ADAPTER.items():
            unpacked.writestr(f"a/{name}", content)
    (tmp_path / "a.zip").write_bytes(stream.getvalue())
    assert_whole(adapters(tmp_path / "a.zip")[f"{tmp_path}/a.zip!a"])


def test_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "\ufeff# what we have",
        "",
        "a",
        "  ../one.safetensors  ",
        "absent",
        "b.zip",
        str(tmp_path / "lists" / "a"),
        "more.txt",
    ]
    files = below("a", ADAPTER) | {"b.zip": zip_of(BARE), "list.txt": "\r\n".join(lines).encode(), "more.txt": b"a"}
    write_files(tmp_path, below("lists", files) | {"one.safetensors": WEIGHTS})
    monkeypatch.chdir(tmp_path / "lists")
    for source, root in ((f"{tmp_path}/lists/list.txt", f"{tmp_path}/lists"), ("list.txt", ".")):
        first, one, absent, packed, again, nested = read_sources(source)
        good = [item for item in (first, one, packed, again) if isinstance(item, RawAdapter)]
        assert [item.source for item in good] == [
            f"{root}/a",
            f"{root}/../one.safetensors",
            f"{root}/b.zip",
            f"{tmp_path}/lists/a",
        ]
        assert_whole(good[0])
        assert str(absent).startswith(f"list {source}, line 5: source '{root}/absent': no such file, nor a folder with files")
        assert str(nested) == f"list {source}, line 8: source 'more.txt': a list in a list is not read; write its lines here"


def test_s3_keys_with_empty_parts(bucket: str) -> None:
    for key in ("a//x.safetensors", "a/x.safetensors", "a/b//adapter_config.json", "a/b//adapter_model.safetensors"):
        boto3.client("s3").put_object(Bucket=bucket[5:], Key=key, Body=b"{}" if key.endswith("json") else WEIGHTS)
    assert list(adapters(f"{bucket}/a")) == [f"{bucket}/a/{name}" for name in ("/x.safetensors", "b", "x.safetensors")]


def test_s3(bucket: str, tmp_path: Path) -> None:
    files = below("all/a", ADAPTER) | below("all/b", BARE) | {"all/c.tar.gz": tar_of(below("in", ADAPTER), "w:gz")}
    for name, content in (files | {"all/one.safetensors": WEIGHTS, "all/list.txt": b"a\nc.tar.gz\nnothing\n"}).items():
        write_bytes(f"{bucket}/{name}", content)
    found = adapters(f"{bucket}/all")
    assert list(found) == [f"{bucket}/all/{name}" for name in ("a", "b", "one.safetensors", "c.tar.gz!in")]
    assert_whole(found[f"{bucket}/all/a"])
    assert_whole(found[f"{bucket}/all/c.tar.gz!in"])
    assert adapters(bucket).keys() == found.keys()
    assert_alone(adapters(f"{bucket}/all/one.safetensors")[f"{bucket}/all/one.safetensors"])
    assert_whole(adapters(f"{bucket}/all/c.tar.gz")[f"{bucket}/all/c.tar.gz!in"])
    one, packed, nothing = read_sources(f"{bucket}/all/list.txt")
    assert isinstance(one, RawAdapter)
    assert isinstance(packed, RawAdapter)
    assert f"line 3: source '{bucket}/all/nothing': no such file" in str(nothing)
    refuses(f"{bucket}x", r"there is no bucket '.*'; create it or correct the URI")
    (tmp_path / "uris.txt").write_text(f"{bucket}/all/a\n{bucket}x\n")
    good, bad = read_sources(str(tmp_path / "uris.txt"))
    assert isinstance(good, RawAdapter)
    assert re.search(r"^list .*uris.txt, line 2: cannot list .*: there is no bucket", str(bad))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A stand-in for the hub, with the model someone/loras at the commit c0ffee; what is asked of it, at which revision."""
    files = ADAPTER | below("cats/a", ADAPTER) | below("cats/b", BARE) | {"one.safetensors": WEIGHTS}
    files |= {"packed/c.zip": zip_of(below("in", ADAPTER)), "w.bin": b"", "/evil.safetensors": WEIGHTS}
    asked: list[tuple[str, str | None]] = []

    def model_info(self: HfApi, repo_id: str, *, revision: str | None = None, files_metadata: bool = False) -> ModelInfo:
        asked.append((repo_id, revision))
        if repo_id != "someone/loras":
            raise OSError("401 Client Error: Repository Not Found")
        assert files_metadata
        known = [{"rfilename": name, "size": None if revision == "mute" else len(files[name])} for name in files]
        return ModelInfo(id=repo_id, sha="c0ffee", siblings=known)

    def hf_hub_download(repo_id: str, filename: str, *, revision: str | None = None) -> str:
        asked.append((filename, revision))
        if filename == "one.safetensors":
            raise OSError("connection lost")
        assert ".." not in filename
        return f"{write_files(tmp_path / 'cache', {filename: files[filename]})}/{filename}"

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    return asked


@pytest.mark.parametrize(
    ("address", "revision", "found"),
    [
        ("hf://someone/loras/cats", None, ["cats/a", "cats/b"]),
        ("hf://someone/loras@v1.0/cats/a/", "v1.0", ["cats/a"]),
        ("hf://someone/loras@refs/pr/3/cats/b", "refs/pr/3", ["cats/b"]),
        ("hf://someone/loras/cats/a/adapter_model.safetensors", None, ["cats/a"]),
        ("hf://someone/loras@c0/packed", "c0", ["packed/c.zip!in"]),
        ("hf://someone/loras/packed/c.zip", None, ["packed/c.zip!in"]),
    ],
)
def test_the_hub(hub: list[Any], address: str, revision: str | None, found: list[str]) -> None:
    """All of one commit, whatever its branch is meanwhile; and nothing is fetched but what is read."""
    read = adapters(address)
    assert list(read) == [f"hf://someone/loras@c0ffee/{name}" for name in found]
    for adapter in read.values():
        if adapter.source.endswith("b"):
            assert adapter.config["r"] == 2
        else:
            assert_whole(adapter)
    (first, *rest) = hub
    assert first == ("someone/loras", revision)
    assert {commit for _, commit in rest} == {"c0ffee"}
    assert len(rest) == (8 if address.endswith("cats") else 2 if "cats/b" in address else 1 if "packed" in address else 6)


def test_a_whole_model_of_the_hub(hub: list[Any]) -> None:
    evil, first, *rest = read_sources("hf://someone/loras")
    assert isinstance(first, RawAdapter)
    assert first.source == "hf://someone/loras@c0ffee"
    assert_whole(first)
    assert [type(item) for item in rest] == [RawAdapter] * 3
    assert str(evil).endswith("'/evil.safetensors' leads outside of the model; it is not read")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "hf://nobody/loras",
            r"^source hf://nobody/loras: not found \(OSError: 401 .*\); see .*`hf auth login`",
        ),
        ("hf://loras", r"'hf://loras': no model of the hub; expected hf://OWNER/NAME\[@REVISION\]\[/FOLDER\]"),
        ("hf://datasets/someone/loras", "no model of the hub; expected"),
        ("hf://someone/loras/dogs", "no files at 'dogs' in that model; correct the folder"),
        ("hf://someone/loras/cat", "no files at 'cat' in that model"),
        ("hf://someone/loras@mute", "does not say how large its files are; download it and give the folder"),
        ("hf://someone/loras/one.safetensors", r"'one.safetensors' not fetched \(OSError: connection lost\); see that"),
        ("hf://someone/loras/w.bin", "no safetensors in it, but 'w.bin'; only safetensors are read"),
        ("hf://someone/lo\x1bras", r"'hf://someone/lo\\x1bras': no name of a source"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_model_of_the_hub_that_is_of_no_use(address: str, message: str) -> None:
    refuses(address, message)
