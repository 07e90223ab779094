"""Files under a local path or a URI, committed atomically: a name is either absent or holds the whole content."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from lr_ray.errors import StorageError


def join(root: str, *parts: str) -> str:
    """`root/part/…`, for a path as for a URI."""
    return "/".join([root.rstrip("/"), *parts])


def read_bytes(uri: str) -> bytes:
    """The whole content.

    Raises:
        StorageError: absent or unreadable.
    """
    with _resolved(uri, "read") as (filesystem, path), filesystem.open_input_stream(path) as stream:
        content: bytes = stream.read()
        return content


def write_bytes(uri: str, content: bytes) -> None:
    """Commit the content under the name at once, replacing what was there.

    Raises:
        StorageError: not writable, or no space left; the name keeps what it had.
    """
    with _resolved(uri, "write") as (filesystem, path):
        if not isinstance(filesystem, fs.LocalFileSystem):
            with filesystem.open_output_stream(path) as stream:  # object stores show it once it is complete
                stream.write(content)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def delete(uri: str) -> None:
    """Remove the file of that name, if there is one."""
    with _resolved(uri, "delete") as (filesystem, path):
        if filesystem.get_file_info(path).type == fs.FileType.File:
            filesystem.delete_file(path)


def exists(uri: str) -> bool:
    """Whether a file of that name has been committed."""
    with _resolved(uri, "look up") as (filesystem, path):
        return bool(filesystem.get_file_info(path).type == fs.FileType.File)


def list_files(uri: str, *, suffix: str) -> list[str]:
    """Names, relative to the folder and sorted, of all files below it that end in `suffix`; none if it is absent."""
    with _resolved(uri, "list") as (filesystem, path):
        selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
        found = [info.path for info in filesystem.get_file_info(selector) if info.type == fs.FileType.File]
        return sorted(os.path.relpath(file, path) for file in found if file.endswith(suffix))


@contextmanager
def _resolved(uri: str, verb: str) -> Iterator[tuple[fs.FileSystem, str]]:
    """The filesystem and the path in it; what goes wrong inside becomes a StorageError that names the URI."""
    try:
        yield fs.FileSystem.from_uri(uri) if "://" in uri else (fs.LocalFileSystem(), os.path.abspath(uri))
    except (OSError, pa.ArrowException) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(f"cannot {verb} {uri}: {reason}; nothing was changed: mend that and run again") from error
