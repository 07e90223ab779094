"""Tar and zip files from strangers: indexed whole before anything of them is read, and never unpacked to disk.

Lengths in headers are the stranger's, so that what tarfile and zipfile may read to index an archive is bounded too.
"""

import gzip
import io
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import BinaryIO

from lr_ray.errors import AdapterError
from lr_ray.library.files import MAX_FILES, Files, check_size, say

MAX_ARCHIVE_BYTES = 8 * 2**30
"""Of all that an archive holds, unpacked: a thousand adapters of 8 MB. One on S3 is held in memory, packed."""
_MAX_ARCHIVE_HEADERS = 128 * 2**20
"""Bytes read to learn what an archive holds: 2.5 kB a file. tarfile and zipfile keep in memory what they read there."""
_CHUNK_BYTES = 2**20

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


def open_archive(source: str, size: int, open_file: Callable[[], BinaryIO], stack: ExitStack) -> Files:
    """What an archive holds; `stack` closes it.

    Args:
        source: what to call it, which ends in one of `ARCHIVES`.

    Raises:
        AdapterError: too large, damaged, or it holds anything but files in folders.
        StorageError: unreadable.
    """
    check_size(f"archive {source}", size, MAX_ARCHIVE_BYTES)
    file = stack.enter_context(open_file())
    try:
        return _zip_files(source, file) if source.lower().endswith(".zip") else _tar_files(source, file)
    except _DAMAGED as error:
        raise AdapterError(f"archive {source}: damaged ({say(error)}); get it again from its source") from error


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


def _archive_files(source: str, sizes: dict[str, int], read: Callable[[str], bytes]) -> Files:
    def read_whole(name: str) -> bytes:
        try:
            return read(name)
        except _DAMAGED as error:
            raise AdapterError(f"archive {source}: {name!r} is damaged ({say(error)}); get it again") from error

    return Files(source=source, separator="!", sizes=sizes, read=read_whole)


def _tar_files(source: str, file: BinaryIO) -> Files:
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
    if packed:
        for _ in _chunks(plain.read, _MAX_ARCHIVE_HEADERS):  # at its end gzip checks the CRC of all
            pass

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


def _zip_files(source: str, file: BinaryIO) -> Files:
    metered = _Metered(file, _MAX_ARCHIVE_HEADERS)
    unpacked = zipfile.ZipFile(metered)
    metered.left_bytes = sys.maxsize  # from here on it reads in pieces, and no member beyond its size in the directory
    index = _Index(source)
    members: dict[str, zipfile.ZipInfo] = {}
    for member in unpacked.infolist():
        name = index.add(member.orig_filename, member.file_size, _zip_kind(member))
        if name is not None:
            members[name] = member

    def read(name: str) -> bytes:
        with unpacked.open(members[name]) as content:
            return b"".join(_chunks(content.read, index.sizes[name]))  # with the last of them it checks the CRC

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
