"""From what a user names - a folder, a file, an archive, a repository, a list - to the raw files of adapters.

Nothing here looks into the tensors, and nothing that is read decides what runs: no pickle is opened, no name in a config
imported, no member of an archive written to disk. Sizes are checked before bytes are read.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lr_ray.errors import AdapterError, StorageError
from lr_ray.library.archives import open_archive
from lr_ray.library.files import (
    ARCHIVES,
    BESIDE,
    CONVERT,
    MAX_CONFIG_BYTES,
    MAX_FILES,
    MODEL_CONFIG_NAME,
    PICKLES,
    PREPROCESSOR_NAME,
    PROCESSOR_NAME,
    Files,
    check_size,
)
from lr_ray.library.headers import MAX_WEIGHTS_BYTES, check_safetensors, class_names_of, front_matter, json_object
from lr_ray.library.hub import HUB, hub_files
from lr_ray.storage.filesystem import file_size, join, list_sizes, open_file, read_bytes
from lr_ray.storage.manifest import CARD_NAME, CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME

_KINDS = (
    f"a folder with {CONFIG_NAME} and {WEIGHTS_NAME} or a folder of such folders (a path or s3://bucket/prefix), a "
    ".safetensors file, a .tar, .tar.gz, .tgz or .zip of those, hf://OWNER/NAME[@REVISION][/FOLDER], or a .txt list of those"
)


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


def read_sources(source: str) -> Iterator[RawAdapter | AdapterError]:
    """The adapters that a source holds, one in memory at a time; in the place of one that is unusable, what is wrong with it.

    Args:
        source: a folder with adapter_config.json and adapter_model.safetensors or a folder of such folders, a .safetensors
            file, an archive (.tar, .tar.gz, .tgz, .zip) of those, each as a path or URI; hf://OWNER/NAME[@REVISION][/FOLDER];
            or a .txt list of those, one a line, relative to the list. What lies beside an adapter_config.json belongs to that
            adapter, which naming its adapter_model.safetensors means too; another safetensors file is an adapter by itself,
            and an archive in a folder holds more of them. Names that start with a dot are left out, archives in archives too.

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
    check_size(f"list {path}", size, MAX_CONFIG_BYTES)
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise AdapterError(f"list {path}: no UTF-8 text ({error}); write one source a line") from error
    entries = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"]
    if not entries:
        raise AdapterError(f"list {path}: names no source; write one a line, each {_KINDS}")
    folder = _folder_of(path)
    for number, entry in entries:
        try:
            if entry.lower().endswith(".txt"):
                raise AdapterError(f"source {entry!r}: a list in a list is not read; write its lines here")
            yield from _read_source(entry if "://" in entry or entry.startswith("/") else join(folder, entry))
        except (AdapterError, StorageError) as error:
            yield AdapterError(f"list {path}, line {number}: {error}")


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0] or ("/" if path.startswith("/") else ".")


def _read_source(source: str) -> Iterator[RawAdapter | AdapterError]:
    with ExitStack() as stack:
        yield from _adapters_in(_open_source(source, stack))


def _open_source(source: str, stack: ExitStack) -> Files:
    """The files that the source means; `stack` closes them."""
    if not source.strip() or not source.isprintable():
        raise AdapterError(f"source {source!r}: no name of a source; give {_KINDS}")
    if source.startswith(HUB):
        return hub_files(source)
    lower = source.lower()
    if (size := file_size(source)) is None:
        sizes = list_sizes(source)
        if not sizes:
            raise AdapterError(f"source {source!r}: no such file, nor a folder with files in it; give {_KINDS}")
        return _folder_files(source, sizes)
    if lower.endswith(".safetensors"):
        return _single_file(source, size)
    if lower.endswith(ARCHIVES):
        return open_archive(source, size, lambda: open_file(source), stack)
    if lower.endswith(PICKLES):
        raise AdapterError(f"source {source!r}: a pickle; {CONVERT}")
    raise AdapterError(f"source {source!r}: a file of another kind; give {_KINDS}")


def _folder_files(folder: str, sizes: dict[str, int]) -> Files:
    return Files(
        source=folder.rstrip("/"),
        separator="/",
        sizes=sizes,
        read=lambda name: read_bytes(join(folder, name)),
        open=lambda name: open_file(join(folder, name)),
    )


def _single_file(path: str, size: int) -> Files:
    """A safetensors file, with what lies beside it if it goes by the name of an adapter's and a config is there."""
    folder, name = _folder_of(path), path.rpartition("/")[2]
    if name == WEIGHTS_NAME and file_size(join(folder, CONFIG_NAME)) is not None:
        beside = {small: file_size(join(folder, small)) for small in BESIDE}
        return _folder_files(folder, {name: size} | {small: known for small, known in beside.items() if known is not None})
    return Files(source=path.removesuffix(name), separator="", sizes={name: size}, read=lambda _: read_bytes(path))


def _adapters_in(files: Files) -> Iterator[RawAdapter | AdapterError]:
    """What its folders hold: an adapter where there is a config, elsewhere one for each safetensors file; then its archives."""
    if len(files.sizes) > MAX_FILES:
        raise AdapterError(f"source {files.source}: {len(files.sizes):,} files, but at most {MAX_FILES:,}; give it in parts")
    folders: dict[str, list[str]] = {}
    for path in files.sizes:
        name = path.rpartition("/")[2]
        if not any(part.startswith(".") or part == "__MACOSX" for part in path.split("/")):
            folders.setdefault(path.removesuffix(name), []).append(name)
    empty = True
    archives: list[str] = []
    for folder, names in folders.items():
        units = [CONFIG_NAME] if CONFIG_NAME in names else [name for name in names if name.lower().endswith(".safetensors")]
        if not units:
            units = [name for name in names if Path(name).stem == Path(WEIGHTS_NAME).stem and Path(name).suffix in PICKLES]
        if CONFIG_NAME not in names:
            archives += [folder + name for name in names if name.lower().endswith(ARCHIVES)]
        for name in units:
            empty = False
            yield _adapter_or_error(files, folder, names if name == CONFIG_NAME else [name])
    if files.open is not None:
        for path in archives:
            empty = False
            yield from _adapters_in_archive(files, path, files.open)
    if empty:
        raise _no_adapter(files, archives)


def _adapters_in_archive(files: Files, path: str, open_file: Callable[[str], BinaryIO]) -> Iterator[RawAdapter | AdapterError]:
    label = files.label(path)
    try:
        with ExitStack() as stack:
            yield from _adapters_in(open_archive(label, files.sizes[path], lambda: open_file(path), stack))
    except AdapterError as error:
        yield error
    except StorageError as error:
        yield AdapterError(f"archive {label}: {error}")


def _no_adapter(files: Files, archives: list[str]) -> AdapterError:
    pickles = [path for path in files.sizes if path.lower().endswith(PICKLES)]
    if pickles:
        return AdapterError(f"source {files.source}: no safetensors in it, but {pickles[0]!r}; {CONVERT}")
    if archives:
        return AdapterError(
            f"source {files.source}: no adapter in it but in the archive {archives[0]!r}; unpack it, none in another is read"
        )
    return AdapterError(f"source {files.source}: no adapter in its {len(files.sizes)} files; give {_KINDS}")


def _adapter_or_error(files: Files, folder: str, names: list[str]) -> RawAdapter | AdapterError:
    try:
        return _read_adapter(files, folder, names)
    except AdapterError as error:
        return error
    except StorageError as error:
        return AdapterError(f"adapter {files.label(folder.rstrip('/'))}: {error}")


def _read_adapter(files: Files, folder: str, names: list[str]) -> RawAdapter:
    """The adapter of a folder, or that of the one name that is given and no config.

    Args:
        folder: with the slash at its end; empty for that of `files` itself.

    Raises:
        AdapterError: no safetensors, or a file that is damaged or too large.
        StorageError: a file that cannot be read.
    """
    whole = CONFIG_NAME in names
    label = files.label(folder.rstrip("/") if whole else folder + names[0])
    weights_name = WEIGHTS_NAME if whole else names[0]
    if weights_name not in names or weights_name.lower().endswith(PICKLES):
        pickles = [name for name in names if name.lower().endswith(PICKLES)]
        raise AdapterError(
            f"adapter {label}: no {WEIGHTS_NAME}, but the pickle {pickles[0]!r}; {CONVERT}"
            if pickles
            else f"adapter {label}: no {WEIGHTS_NAME} beside its {CONFIG_NAME}; get it again from its source"
        )
    wanted = {name: folder + name for name in names if name == weights_name or (whole and name in BESIDE)}
    contents = _read_all(files, wanted, label)
    objects = {
        name: json_object(contents[name], f"adapter {label}: {name}") if name in contents else {}
        for name in (CONFIG_NAME, PREPROCESSOR_NAME, PROCESSOR_NAME, MANIFEST_NAME, MODEL_CONFIG_NAME)
    }
    of_images = objects[PROCESSOR_NAME].get("image_processor")  # which transformers looks for first, too
    labelled = MODEL_CONFIG_NAME if objects[MODEL_CONFIG_NAME].get("id2label") else CONFIG_NAME
    return RawAdapter(
        source=label,
        config=objects[CONFIG_NAME],
        weights=contents[weights_name],
        preprocessor=of_images if isinstance(of_images, dict) else objects[PREPROCESSOR_NAME],
        manifest=objects[MANIFEST_NAME],
        metadata=check_safetensors(contents[weights_name], f"adapter {label}: {weights_name!r}"),
        card=front_matter(contents.get(CARD_NAME, b""), f"adapter {label}: {CARD_NAME}"),
        class_names=class_names_of(objects[labelled].get("id2label"), f"adapter {label}: id2label of {labelled}"),
    )


def _read_all(files: Files, paths: dict[str, str], label: str) -> dict[str, bytes]:
    """The content by name, read in the order of `paths` and only once all are known to be small enough."""
    for name, path in paths.items():
        limit = MAX_CONFIG_BYTES if name in BESIDE else MAX_WEIGHTS_BYTES
        check_size(f"adapter {label}: {name!r}", files.sizes[path], limit)
    contents: dict[str, bytes] = {}
    for name, path in paths.items():
        contents[name] = files.read(path)
        if len(contents[name]) != files.sizes[path]:
            raise AdapterError(
                f"adapter {label}: {name!r} has {len(contents[name]):,} bytes in place of the {files.sizes[path]:,} that were "
                "announced; it is damaged or was being written: get it again"
            )
    return contents
