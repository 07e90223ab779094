"""From what a user names - a folder, a file, an archive, a repository, a list - to the raw files of adapters.

Nothing here looks into the tensors, and nothing that is read decides what runs: no pickle is opened, no name in a config
imported, no member of an archive written to disk. Sizes are checked before bytes are read.
"""

import gzip
import io
import json
import math
import re
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from lr_ray.errors import AdapterError, StorageError
from lr_ray.storage.adapters import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from lr_ray.storage.filesystem import file_size, join, list_sizes, open_file, read_bytes
from lr_ray.storage.manifest import MANIFEST_NAME

MAX_WEIGHTS_BYTES = 2 * 2**30
"""Of one safetensors file: rank 256 on every layer of the largest ViT in float32 is half of it; it is held in memory."""
MAX_CONFIG_BYTES = 1 * 2**20
"""Of one JSON file, model card or list: an `id2label` of 10,000 classes is a third of it."""
MAX_ARCHIVE_BYTES = 8 * 2**30
"""Of all that an archive holds, unpacked: a thousand adapters of 8 MB. One on S3 is held in memory, packed."""
MAX_FILES = 50_000
"""In one folder, archive or repository: ten thousand adapters of five files."""
MAX_DEPTH = 100
"""Of nested JSON. The parser takes ten times that, but not all that later walks through the values does."""

_MAX_CARD_BYTES = 2**16
"""Of the front matter of a model card: YAML is parsed at some 100 kB/s."""
_MAX_ARCHIVE_HEADERS = 128 * 2**20
"""Bytes read to learn what an archive holds: 2.5 kB a file. tarfile and zipfile keep in memory what they read there."""
_MAX_HEADER_BYTES = 100_000_000
"""Of the header of a safetensors file; the limit of the safetensors library itself."""
_MAX_DIMS = 8
_CHUNK_BYTES = 2**20

PREPROCESSOR_NAME = "preprocessor_config.json"
MODEL_CONFIG_NAME = "config.json"
HUB = "hf://"
_HUB_ADDRESS = re.compile(
    r"hf://(?!(?:datasets|spaces|buckets)/)(?P<repo>\w[\w.-]*/\w[\w.-]*)"
    r"(@(?P<revision>refs/(convert|pr)/\w+|[^/@]+))?(/(?P<path>.+))?"
)
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_KINDS = (
    f"a folder with {CONFIG_NAME} and {WEIGHTS_NAME} or a folder of such folders (a path or s3://bucket/prefix), a "
    ".safetensors file, a .tar, .tar.gz, .tgz or .zip of those, hf://OWNER/NAME[@REVISION][/FOLDER], or a .txt list of those"
)
_CONVERT = (
    "only safetensors are read, since a pickle can run any code: convert it yourself, "
    "`safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'adapter_model.safetensors')`"
)
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

_DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    struct.error,
    zlib.error,
    tarfile.TarError,
    zipfile.BadZipFile,
)
"""What tarfile, zipfile, gzip and zlib raise for archives that are broken or made to break them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RawAdapter:
    """The files of one adapter: JSON and YAML parsed, the safetensors file found whole."""

    source: str
    """What to call it: a path or URI, hf://owner/name@commit/folder, dir/a.tar.gz!folder."""
    config: dict[str, Any]
    """adapter_config.json; empty for a single safetensors file."""
    weights: bytes
    """The safetensors file."""
    preprocessor: dict[str, Any]
    """preprocessor_config.json, or empty."""
    manifest: dict[str, Any]
    """lr_ray.json, or empty."""
    metadata: dict[str, str]
    """`__metadata__` of the safetensors file."""
    card: dict[str, Any]
    """The front matter of README.md (license, base_model, …), or empty."""
    class_names: tuple[str, ...]
    """`id2label` of config.json or else of adapter_config.json, in the order of its indices, or empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Files:
    """Files by name, wherever they are."""

    source: str
    separator: str
    """Between the source and a name in what an adapter is called."""
    sizes: dict[str, int]
    """Name, with `/` between folders → bytes. In the order in which they are best read."""
    read: Callable[[str], bytes]
    """The content of the file of that name; AdapterError or StorageError where it cannot be had."""

    def label(self, name: str) -> str:
        shown = name if name.isprintable() else ascii(name)
        return f"{self.source}{self.separator}{shown}" if name else self.source


def read_sources(source: str) -> Iterator[RawAdapter | AdapterError]:
    """The adapters that a source holds, one in memory at a time; in the place of one that is unusable, what is wrong with it.

    Args:
        source: a folder with adapter_config.json and adapter_model.safetensors or a folder of such folders, a .safetensors
            file, an archive (.tar, .tar.gz, .tgz, .zip) of those, each as a path or URI; hf://OWNER/NAME[@REVISION][/FOLDER];
            or a .txt list of those, one a line, relative to the list. A safetensors file beside an adapter_config.json belongs
            to that; alone it is an adapter. Names that start with a dot are left out.

    Raises:
        AdapterError: at the first step, where the source itself is of no use: nothing there, no adapter in it, an archive that
            is damaged, too large, or holds anything but files in folders.
        StorageError: likewise, where it cannot be reached.
    """
    if source.lower().endswith(".txt") and not source.startswith(HUB) and (size := file_size(source)) is not None:
        yield from _read_list(source, size)
    else:
        yield from _read_source(source)


def _read_list(path: str, size: int) -> Iterator[RawAdapter | AdapterError]:
    _check_size(f"list {path}", size, MAX_CONFIG_BYTES)
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise AdapterError(f"list {path}: no UTF-8 text ({error}); write one source a line") from error
    entries = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"]
    if not entries:
        raise AdapterError(f"list {path}: names no source; write one a line, each {_KINDS}")
    folder = path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")
    for number, entry in entries:
        try:
            if entry.lower().endswith(".txt"):
                raise AdapterError(f"source {entry!r}: a list in a list is not read; write its lines here")
            yield from _read_source(entry if "://" in entry or entry.startswith("/") else join(folder, entry))
        except (AdapterError, StorageError) as error:
            yield AdapterError(f"list {path}, line {number}: {error}")


def _read_source(source: str) -> Iterator[RawAdapter | AdapterError]:
    with ExitStack() as stack:
        yield from _adapters_in(_open_source(source, stack))


def _open_source(source: str, stack: ExitStack) -> _Files:
    """The files that the source means; `stack` closes them."""
    if source.startswith(HUB):
        return _hub_files(source)
    if not source.strip() or not source.isprintable():
        raise AdapterError(f"source {source!r}: no name of a source; give {_KINDS}")
    lower = source.lower()
    if (size := file_size(source)) is None:
        sizes = list_sizes(source)
        if not sizes:
            raise AdapterError(f"source {source!r}: no such file, nor a folder with files in it; give {_KINDS}")
        folder = source.rstrip("/")
        return _Files(source=folder, separator="/", sizes=sizes, read=lambda name: read_bytes(join(source, name)))
    if lower.endswith(".safetensors"):
        name = source.rpartition("/")[2]
        folder = source.removesuffix(name)
        return _Files(source=folder, separator="", sizes={name: size}, read=lambda _: read_bytes(source))
    if lower.endswith(_ARCHIVES):
        _check_size(f"archive {source}", size, MAX_ARCHIVE_BYTES)
        file = stack.enter_context(open_file(source))
        try:
            return _zip_files(source, file) if lower.endswith(".zip") else _tar_files(source, file)
        except _DAMAGED as error:
            raise AdapterError(f"archive {source}: damaged ({_say(error)}); get it again from its source") from error
    if lower.endswith(_PICKLES):
        raise AdapterError(f"source {source!r}: a pickle; {_CONVERT}")
    raise AdapterError(f"source {source!r}: a file of another kind; give {_KINDS}")


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _check_size(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise AdapterError(f"{what}: {size:,} bytes, but at most {limit:,} are read; leave it out or make it smaller")


# ------------------------------------------------------------------------------------------------------------- adapters


def _adapters_in(files: _Files) -> Iterator[RawAdapter | AdapterError]:
    """What its folders hold: an adapter where there is a config, elsewhere one for each safetensors file."""
    if len(files.sizes) > MAX_FILES:
        raise AdapterError(f"source {files.source}: {len(files.sizes):,} files, but at most {MAX_FILES:,}; give it in parts")
    folders: dict[str, list[str]] = {}
    for path in files.sizes:
        folder, _, name = path.rpartition("/")
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.split("/")):
            folders.setdefault(folder, []).append(name)
    empty = True
    for folder, names in folders.items():
        units = [CONFIG_NAME] if CONFIG_NAME in names else [name for name in names if name.lower().endswith(".safetensors")]
        if not units:
            units = [name for name in names if Path(name).stem == Path(WEIGHTS_NAME).stem and Path(name).suffix in _PICKLES]
        for name in units:
            empty = False
            yield _adapter_or_error(files, folder, names if name == CONFIG_NAME else [name])
    if empty:
        pickles = [path for path in files.sizes if path.lower().endswith(_PICKLES)]
        if pickles:
            raise AdapterError(f"source {files.source}: no safetensors in it, but {pickles[0]!r}; {_CONVERT}")
        raise AdapterError(f"source {files.source}: no adapter in its {len(files.sizes)} files; give {_KINDS}")


def _adapter_or_error(files: _Files, folder: str, names: list[str]) -> RawAdapter | AdapterError:
    try:
        return _read_adapter(files, folder, names)
    except AdapterError as error:
        return error
    except StorageError as error:
        return AdapterError(f"adapter {files.label(folder)}: {error}")


def _read_adapter(files: _Files, folder: str, names: list[str]) -> RawAdapter:
    """The adapter of a folder, or that of the one name that is given and no config.

    Raises:
        AdapterError: no safetensors, or a file that is damaged or too large.
        StorageError: a file that cannot be read.
    """
    whole = CONFIG_NAME in names
    paths = {name: f"{folder}/{name}" if folder else name for name in names}
    label = files.label(folder if whole else paths[names[0]])
    weights_name = WEIGHTS_NAME if whole else names[0]
    if weights_name not in names or weights_name.lower().endswith(_PICKLES):
        pickles = [name for name in names if name.lower().endswith(_PICKLES)]
        raise AdapterError(
            f"adapter {label}: no {WEIGHTS_NAME}, but the pickle {pickles[0]!r}; {_CONVERT}"
            if pickles
            else f"adapter {label}: no {WEIGHTS_NAME} beside its {CONFIG_NAME}; get it again from its source"
        )
    small = (CONFIG_NAME, PREPROCESSOR_NAME, MANIFEST_NAME, MODEL_CONFIG_NAME, CARD_NAME)
    wanted = {paths[name]: name for name in names if name == weights_name or (whole and name in small)}
    for path, name in wanted.items():
        limit = MAX_WEIGHTS_BYTES if name == weights_name else MAX_CONFIG_BYTES
        _check_size(f"adapter {label}: {name!r}", files.sizes[path], limit)
    contents: dict[str, bytes] = {}
    for path, name in wanted.items():  # in the order of `files`
        contents[name] = files.read(path)
        if len(contents[name]) != files.sizes[path]:
            raise AdapterError(
                f"adapter {label}: {name!r} has {len(contents[name]):,} bytes in place of the {files.sizes[path]:,} that were "
                "announced; it is damaged or was being written: get it again"
            )
    objects = {
        name: _json_object(contents[name], f"adapter {label}: {name}") if name in contents else {}
        for name in (CONFIG_NAME, PREPROCESSOR_NAME, MANIFEST_NAME, MODEL_CONFIG_NAME)
    }
    labelled = MODEL_CONFIG_NAME if objects[MODEL_CONFIG_NAME].get("id2label") else CONFIG_NAME
    return RawAdapter(
        source=label,
        config=objects[CONFIG_NAME],
        weights=contents[weights_name],
        preprocessor=objects[PREPROCESSOR_NAME],
        manifest=objects[MANIFEST_NAME],
        metadata=_check_safetensors(contents[weights_name], f"adapter {label}: {weights_name!r}"),
        card=_front_matter(contents.get(CARD_NAME, b""), f"adapter {label}: {CARD_NAME}"),
        class_names=_class_names(objects[labelled].get("id2label"), f"adapter {label}: id2label of {labelled}"),
    )


def _class_names(id2label: Any, what: str) -> tuple[str, ...]:
    """Of {"0": "cat", "1": "dog"}, as Transformers writes it, or ["cat", "dog"]."""
    if not id2label:
        return ()
    if isinstance(id2label, list):
        id2label = {str(index): name for index, name in enumerate(id2label)}
    keys = [str(index) for index in range(len(id2label))] if isinstance(id2label, dict) else []
    if not keys or set(id2label) != set(keys) or not all(isinstance(name, str) for name in id2label.values()):
        raise AdapterError(f"{what} does not number its class names 0, 1, 2, … ({id2label!r:.60}); correct or remove it")
    return tuple(id2label[key] for key in keys)


def _json_object(content: bytes, what: str) -> dict[str, Any]:
    try:
        return _parse_object(content)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{what}: no JSON object that can be read ({_say(error)}); allowed: UTF-8, finite numbers, at most {MAX_DEPTH} "
            "levels; get it again from its source"
        ) from error


def _parse_object(content: bytes) -> dict[str, Any]:
    """A JSON object that every later reader takes: UTF-8, numbers finite, not nested too deeply.

    Raises:
        ValueError, RecursionError: it is anything else.
    """
    value = json.loads(content.decode("utf-8-sig"), parse_constant=_finite, parse_float=_finite)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}")
    _check_values(value)
    return value


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal[:20]} is no finite number")
    return value


def _check_values(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str):
                item.encode()  # half a surrogate pair is a str, but no text that could be written
        if not below:
            return
        level = below
    raise ValueError("nested too deeply")


class _CardLoader(yaml.SafeLoader):
    """Without aliases, of which nine can stand for a billion values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def _front_matter(content: bytes, what: str) -> dict[str, Any]:
    """The YAML between the `---` lines that a model card starts with; none if it starts with other text.

    Raises:
        AdapterError: no UTF-8, or no YAML mapping between them.
    """
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n")
        found = re.match(r"---[ \t]*\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
        if found is None:
            return {}
        if len(found[1]) > _MAX_CARD_BYTES:
            raise ValueError(f"more than {_MAX_CARD_BYTES:,} characters")
        card = yaml.load(found[1], _CardLoader)
        if not isinstance(card, dict | None):
            raise ValueError(f"it holds a {type(card).__name__}")
        _check_values(card)
    except (ValueError, ArithmeticError, LookupError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise AdapterError(f"{what}: its front matter is no YAML mapping ({_say(error)}); correct or remove it") from error
    return {str(key): value for key, value in (card or {}).items()}


# ---------------------------------------------------------------------------------------------------------- safetensors


def _check_safetensors(content: bytes, what: str) -> dict[str, str]:
    """The metadata of a safetensors file, once every tensor is known to lie in it: none larger than it says, none overlapping.

    Raises:
        AdapterError: damaged, or not of that format.
    """
    try:
        size = int.from_bytes(content[:8], "little")
        if len(content) < 8 or size > min(len(content) - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"a header of {size:,} bytes in a file of {len(content):,}")
        if content[8:9] != b"{":
            raise ValueError("its header does not start with {")
        header = _parse_object(content[8 : 8 + size])
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its __metadata__ is not text by name")
        end = 0
        extents = [_extent(name, entry) for name, entry in header.items()]
        for name, begin, stop in sorted(extents, key=lambda extent: extent[1:]):
            if begin != end:
                raise ValueError(f"tensor {name!r:.80} starts at byte {begin:,} in place of {end:,}")
            end = stop
        if 8 + size + end != len(content):
            raise ValueError(f"tensors of {end:,} bytes in all, but {len(content) - 8 - size:,} follow the header")
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what}: no whole safetensors file ({str(error)[:300]}); get it again from its source") from error
    return metadata


def _extent(name: str, entry: Any) -> tuple[str, int, int]:
    """Where a tensor says to begin and end; ValueError where its type and shape do not fill that."""
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {name!r:.80} is a {type(entry).__name__}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise ValueError(f"tensor {name!r:.80} has dtype {dtype!r:.40}, not one of {', '.join(_ITEM_BYTES)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMS or math.prod(size or 1 for size in shape) > MAX_WEIGHTS_BYTES:
        raise ValueError(f"tensor {name!r:.80} has shape {shape!r:.80}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"tensor {name!r:.80} of {dtype} {shape} has the offsets {offsets!r:.80}")
    return name, offsets[0], offsets[1]


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


# ------------------------------------------------------------------------------------------------------------- archives


class _Metered:
    """A file of which no more than so many bytes can be read, whatever the lengths in it say."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file = file
        self.left_bytes = num_bytes

    def read(self, size: int = -1) -> bytes:
        if size > self.left_bytes:
            raise ValueError(f"{size:,} bytes to read to learn what it holds; at most {_MAX_ARCHIVE_HEADERS:,} are in all")
        content = self._file.read(size if size >= 0 else self.left_bytes)
        self.left_bytes -= len(content)
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


class _Index:
    """What an archive is found to hold, member by member: within the limits, and nothing but files in folders."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._num_members = self._total_bytes = 0
        self.sizes: dict[str, int] = {}

    def add(self, member: str, size: int, kind: str) -> str | None:
        """The name of a file; None for a folder.

        Args:
            kind: file, folder, or what else to call it.

        Raises:
            AdapterError: not to be had from a stranger.
        """
        parts = [part for part in member.split("/") if part not in ("", ".")]
        name = "/".join(parts)
        self._num_members += 1
        self._total_bytes += size
        if kind not in ("file", "folder"):
            raise self._refusal(
                f"{member!r:.200} is {kind}; pack it again with files in the place of links (tar --dereference)"
            )
        if member.startswith("/") or ".." in parts or "\\" in member or ":" in member[:2] or not member.isprintable():
            raise self._refusal(
                f"{member!r:.200} leads outside of it or is no portable name; pack it again with relative names"
            )
        if size < 0 or self._total_bytes > MAX_ARCHIVE_BYTES:
            raise self._refusal(
                f"with {member!r:.200} it holds {self._total_bytes:,} bytes, but at most {MAX_ARCHIVE_BYTES:,}; split it"
            )
        if self._num_members > MAX_FILES:
            raise self._refusal(f"it holds more than {MAX_FILES:,} members; split it")
        if kind == "folder":
            return None
        if name in self.sizes:
            raise self._refusal(f"{name!r:.200} is in it twice; pack it again")
        self.sizes[name] = size
        return name

    def _refusal(self, reason: str) -> AdapterError:
        return AdapterError(f"archive {self._source}: {reason}")


def _archive_files(source: str, sizes: dict[str, int], read: Callable[[str], bytes]) -> _Files:
    def read_whole(name: str) -> bytes:
        try:
            return read(name)
        except _DAMAGED as error:
            raise AdapterError(f"archive {source}: {name!r} is damaged ({_say(error)}); get it again") from error

    return _Files(source=source, separator="!", sizes=sizes, read=read_whole)


def _tar_files(source: str, file: BinaryIO) -> _Files:
    """The members in the order of the archive, so that a compressed one is gone through once more, not once a file."""
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    plain: BinaryIO = gzip.GzipFile(fileobj=file) if packed else file  # type: ignore[assignment]
    index = _Index(source)
    places: dict[str, int] = {}
    with tarfile.open(fileobj=_Metered(plain, _MAX_ARCHIVE_HEADERS), mode="r:") as tar:  # type: ignore[call-overload]
        while (member := tar.next()) is not None:
            tar.members.clear()  # it keeps them all
            name = index.add(member.name, member.size, _tar_kind(member))
            if name is not None:
                places[name] = member.offset_data
        end = tar.offset
    plain.seek(end)
    if plain.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
        raise tarfile.ReadError(f"no header at byte {end:,}")

    def read(name: str) -> bytes:
        plain.seek(places[name])
        return b"".join(_chunks(plain.read, index.sizes[name]))

    return _archive_files(source, index.sizes, read)


def _chunks(read: Callable[[int], bytes], size: int) -> Iterator[bytes]:
    """Up to so many bytes, of which none are set aside before they are there."""
    while size and (chunk := read(min(size, _CHUNK_BYTES))):
        size -= len(chunk)
        yield chunk


def _tar_kind(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"a link to {member.linkname!r:.200}"
    if member.isdir():
        return "folder"
    return "file" if member.isreg() and not member.issparse() else "a device, a pipe or a file with holes"


def _zip_files(source: str, file: BinaryIO) -> _Files:
    metered = _Metered(file, _MAX_ARCHIVE_HEADERS)
    unpacked = zipfile.ZipFile(metered)  # type: ignore[call-overload]
    metered.left_bytes = sys.maxsize  # from here on it reads in pieces, and no member beyond its size in the directory
    index = _Index(source)
    members: dict[str, zipfile.ZipInfo] = {}
    for member in unpacked.infolist():
        name = index.add(member.orig_filename, member.file_size, _zip_kind(member))
        if name is not None:
            members[name] = member

    def read(name: str) -> bytes:
        with unpacked.open(members[name]) as content:
            return b"".join(_chunks(content.read, index.sizes[name] + 1))  # the last byte that is not there checks the CRC

    return _archive_files(source, index.sizes, read)


def _zip_kind(member: zipfile.ZipInfo) -> str:
    mode = member.external_attr >> 16
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a device or a pipe"
    if member.flag_bits & 1:
        return "encrypted"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"compressed by method {member.compress_type}, not stored or deflated"  # bz2 and lzma unpack without a limit
    return "folder" if member.is_dir() else "file"


# ------------------------------------------------------------------------------------------------------------------ hub


def _hub_files(address: str) -> _Files:
    """The files of a model repository at the commit that its revision is now, each downloaded once it is asked for.

    Raises:
        AdapterError: no such address, unreachable, or nothing at that path.
    """
    from huggingface_hub import HfApi, hf_hub_download  # a second to import, which no other source should pay for

    found = _HUB_ADDRESS.fullmatch(address)
    if found is None:
        raise AdapterError(f"source {address!r}: no model of the hub; expected hf://OWNER/NAME[@REVISION][/FOLDER]")
    repo, revision, below = found["repo"], found["revision"], (found["path"] or "").strip("/")
    remedy = (
        "see that the model exists, that this machine reaches huggingface.co (HF_HUB_OFFLINE unset), and that `hf auth login` "
        "was run if it is gated"
    )
    try:
        model = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception as error:  # of the hub, of HTTP, of its arguments: all say what failed
        raise AdapterError(f"source {address}: not found ({_say(error)}); {remedy}") from error
    commit = model.sha or revision
    sizes = {file.rfilename: file.size for file in model.siblings or []}
    prefix = f"{below}/" if below and below not in sizes else ""
    inside = [below] if below in sizes else sorted(name for name in sizes if name.startswith(prefix))
    if not inside:
        raise AdapterError(f"source {address}: no files at {below!r} in that model; correct the folder")
    known = {name.removeprefix(prefix): size for name in inside if (size := sizes[name]) is not None}
    if len(known) != len(inside):
        raise AdapterError(f"source {address}: the hub does not say how large its files are; download it and give the folder")

    def read(name: str) -> bytes:
        path = prefix + name
        if ".." in path.split("/") or path.startswith("/"):
            raise AdapterError(f"source {address}: {path!r} leads outside of the model; it is not read")
        try:
            return Path(hf_hub_download(repo, path, revision=commit)).read_bytes()
        except Exception as error:
            raise AdapterError(f"source {address}: {path!r} not fetched ({_say(error)}); {remedy}") from error

    source = f"{HUB}{repo}@{commit}/{prefix}".rstrip("/")
    return _Files(source=source, separator="/", sizes=known, read=read)
