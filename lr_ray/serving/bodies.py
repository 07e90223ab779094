"""Bodies of requests: multipart, JSON with base64, or a zip, read in memory, into uploads by class.

Nothing is written to disk, and names serve as labels only. These functions take time and belong off the event loop.
"""

import asyncio
import binascii
import io
import re
import stat
import zipfile
from base64 import b64decode
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

import python_multipart  # noqa: F401 -- what starlette's parser needs, and misses only when a body comes
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from lr_ray.errors import RequestError, shown
from lr_ray.serving.images import Upload
from lr_ray.serving.limits import Limits

QUERY = "query"
"""Part of a multipart body, or folder of a zip, that holds queries where a request brings support images too."""
_CHUNK = 2**16
_ENTRY = b"PK\x01\x02"
"""How each entry of a zip's directory begins."""

Base64 = Annotated[str, Field(description="PNG, JPEG or WebP, in base64.")]


class SupportBody(BaseModel):
    """Labelled images."""

    model_config = ConfigDict(extra="forbid")
    classes: dict[str, list[Base64]] = Field(description="Images of each class, by its name.")


class QueryBody(BaseModel):
    """Images."""

    model_config = ConfigDict(extra="forbid")
    images: list[Base64]


class EpisodeBody(SupportBody):
    """Labelled images, and others to be classified."""

    images: list[Base64]


Body = TypeVar("Body", bound=BaseModel)


@dataclass(kw_only=True)
class Uploads:
    """What a request brought.

    Attributes:
        support: images of each class.
        query: images without a class.
    """

    support: dict[str, list[Upload]] = field(default_factory=dict)
    query: list[Upload] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """One for each of `images`."""
        return [name for name, members in self.support.items() for _ in members]

    @property
    def images(self) -> list[Upload]:
        """Of the support."""
        return [upload for members in self.support.values() for upload in members]


def read_support(content: bytes, content_type: str, limits: Limits) -> Uploads:
    """Labelled images: a part's class is the folder of its file name, else its own name; a zip holds class folders.

    Raises:
        RequestError: 400 a damaged body; 413 too large or too many; 415 none of these types; 422 not as described.
    """

    def sort(part: str, name: str) -> str | None:
        return _folder(name) or part

    uploads = _read(content, content_type, limits, sort, SupportBody)
    return _checked(uploads, limits)


def read_queries(content: bytes, content_type: str, limits: Limits) -> Uploads:
    """Images without classes, of any names; the body may also be one image by itself. Raises as `read_support`."""
    if content_type.partition("/")[0].strip().lower() == "image" or _kind(content_type) == "application/octet-stream":
        return Uploads(query=[Upload(name="image", content=content)])
    return _read(content, content_type, limits, lambda _part, _name: None, QueryBody)


def read_episode(content: bytes, content_type: str, limits: Limits) -> Uploads:
    """Both: what is in a part or folder called `query` has no class. Raises as `read_support`."""

    def sort(part: str, name: str) -> str | None:
        folder = _folder(name)
        return None if QUERY in (part, folder) else folder or part

    uploads = _read(content, content_type, limits, sort, EpisodeBody)
    return _checked(uploads, limits)


def _check_class_name(name: str, limits: Limits) -> None:
    """Raise (422) where it is empty, too long, not printable, or `.` or `..`, which in an address mean another place."""
    if not name.strip() or len(name) > limits.name_length or not name.isprintable() or name in (".", ".."):
        most = limits.name_length
        raise RequestError(f"class name {shown(name)}: give 1 to {most} printable characters, not '.' or '..'", 422)


def _checked(uploads: Uploads, limits: Limits) -> Uploads:
    if len(uploads.support) > limits.classes:
        raise RequestError(f"{len(uploads.support)} classes; at most {limits.classes} are allowed", 413)
    for name, members in uploads.support.items():
        _check_class_name(name, limits)
        if not members:
            raise RequestError(f"class {shown(name)} has no images; give at least one", 422)
    if not uploads.support:
        raise RequestError("no labelled images; give at least one of each class", 422)
    return uploads


def _kind(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _folder(name: str) -> str:
    """The folder that a file lies in directly, as its name says; empty if it says none."""
    return name.replace("\\", "/").rpartition("/")[0].rpartition("/")[2]


def _read(
    content: bytes, content_type: str, limits: Limits, sort: Callable[[str, str], str | None], model: type[BaseModel]
) -> Uploads:
    """What the body holds.

    Args:
        sort: name of a part, name of its file → class, or None for a query.
        model: of a JSON body.
    """
    kind = _kind(content_type)
    if kind == "multipart/form-data":
        return _read_multipart(content, content_type, limits, sort)
    if kind in ("application/zip", "application/x-zip-compressed"):
        return _read_zip(content, limits, sort)
    if kind == "application/json":
        return _read_json(content, limits, model)
    raise RequestError(
        f"content type {shown(kind)}; give multipart/form-data, application/json with base64, or application/zip", 415
    )


_CHARSET = re.compile(r";\s*charset\s*=[^;]*", re.IGNORECASE)


class _InMemoryParser(MultiPartParser):
    spool_max_size = 2**40  # a body that was let in stays in memory


def _read_multipart(content: bytes, content_type: str, limits: Limits, sort: Callable[[str, str], str | None]) -> Uploads:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield content

    plain = _CHARSET.sub("", content_type)  # names are UTF-8, and not whatever Python can decode
    parser = _InMemoryParser(Headers({"content-type": plain}), stream(), max_files=limits.images, max_fields=0)
    try:
        form = asyncio.run(parser.parse())
    except MultiPartException as error:
        status = 413 if error.message.startswith("Too many files") else 400
        raise RequestError(f"multipart body: {error.message} Give files only, at most {limits.images}", status) from error
    except Exception as error:  # of the parser, on bytes made to break it
        raise RequestError("multipart body: it is damaged; send it again", 400) from error
    uploads = Uploads()
    for part, value in form.multi_items():
        if not isinstance(value, UploadFile):
            raise RequestError(f"part {shown(part)} is no file; give files only", 422)
        _put(uploads, sort(part, value.filename or ""), Upload(name=value.filename or part, content=value.file.read()))
    return uploads


def _put(uploads: Uploads, name: str | None, upload: Upload) -> None:
    (uploads.query if name is None else uploads.support.setdefault(name, [])).append(upload)


def _read_json(content: bytes, limits: Limits, model: type[BaseModel]) -> Uploads:
    try:
        body = model.model_validate_json(content)
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False, include_context=False)[0]
        place = ".".join(map(str, wrong["loc"]))[:100]
        status = 400 if wrong["type"] == "json_invalid" else 422
        raise RequestError(f"JSON body: {place + ': ' if place else ''}{wrong['msg']}", status) from error
    support: dict[str, list[str]] = getattr(body, "classes", {})
    query: list[str] = getattr(body, "images", [])
    if (count := sum(map(len, support.values())) + len(query)) > limits.images:
        raise RequestError(f"{count} images; a request may bring {limits.images}", 413)
    return Uploads(
        support={
            name: [_from_base64(f"{name}[{i}]", text) for i, text in enumerate(members)] for name, members in support.items()
        },
        query=[_from_base64(f"images[{i}]", text) for i, text in enumerate(query)],
    )


def _from_base64(name: str, text: str) -> Upload:
    try:
        return Upload(name=name, content=b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise RequestError(
            f"image {shown(name)} is no base64; give the file's bytes so encoded, without a prefix", 422
        ) from error


def _read_zip(content: bytes, limits: Limits, sort: Callable[[str, str], str | None]) -> Uploads:
    uploads, left = Uploads(), limits.body_bytes
    if content.count(_ENTRY) > 4 * limits.images:  # zipfile would make an object of each
        raise RequestError(f"zip: more than {4 * limits.images} entries; a request may bring {limits.images} files", 413)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [member for member in archive.infolist() if not member.is_dir() and not _is_litter(member.filename)]
            if len(members) > limits.images:
                raise RequestError(f"zip: {len(members)} files; a request may bring {limits.images}", 413)
            for member in members:
                _check_member(member)
                unpacked = _unpack(archive, member, min(left, limits.image_bytes))
                left -= len(unpacked)
                _put(uploads, sort("", member.filename), Upload(name=member.filename, content=unpacked))
    except RequestError:
        raise
    except Exception as error:  # of zipfile and zlib, on bytes made to break them
        raise RequestError(f"zip: it is damaged ({type(error).__name__}); make it again", 400) from error
    return uploads


def _is_litter(name: str) -> bool:
    """What file managers leave in archives."""
    parts = name.split("/")
    return parts[0] == "__MACOSX" or parts[-1] in (".DS_Store", "Thumbs.db")


def _check_member(member: zipfile.ZipInfo) -> None:
    """Raise for what no honest archive of images holds, though names are only labels here and no path is made of them."""
    name = member.filename
    mode = member.external_attr >> 16
    parts = name.split("/")
    reasons = {
        "its path leaves the archive": name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0],
        "it is no regular file": bool(stat.S_IFMT(mode)) and not stat.S_ISREG(mode),
        "it is encrypted": bool(member.flag_bits & 1),
        "its compression is neither stored nor deflated": member.compress_type
        not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        raise RequestError(f"zip: {shown(name)}: {reason}; make the archive of class folders with images", 422)


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, most: int) -> bytes:
    """What it holds, however much its header announces."""
    unpacked = bytearray()
    with archive.open(member) as file:
        while chunk := file.read(_CHUNK):
            unpacked += chunk
            if len(unpacked) > most:
                raise RequestError(f"zip: {shown(member.filename)} unpacks to more than {most} bytes", 413)
    return bytes(unpacked)
