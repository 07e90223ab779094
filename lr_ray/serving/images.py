"""Images that strangers upload: decoded in memory, what they are told by their content, sizes checked before pixels."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from lr_ray.data.images import square_pixels
from lr_ray.errors import RequestError, shown
from lr_ray.serving.limits import Limits

_MAX_ASPECT = 64
"""Longest side by shortest: the short side is enlarged to the model's, and the long one with it."""
_MAX_CHUNKS = 20_000
"""Of a PNG, of some kB each as encoders write them."""
_UNLIKE = "give PNG, JPEG or WebP; a name or content type does not count"

Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """An image as it came.

    Attributes:
        name: of the file, for messages; never opened.
        content: encoded.
    """

    name: str
    content: bytes


def decode_uploads(uploads: Sequence[Upload], image_px: int, limits: Limits) -> Tensor:
    """(N, 3, image_px, image_px) uint8, the same pixels that `lr_ray.load(…)` makes of the files.

    Count, bytes, formats and the pixels that the headers announce are checked of all images before one is decoded.

    Raises:
        RequestError: 413 too many images, bytes or pixels; 415 neither PNG, JPEG nor WebP, or animated; 422 no images,
            or one that is damaged, truncated, empty or too elongated.
    """
    if not uploads:
        raise RequestError("no images; give at least one", 422)
    if len(uploads) > limits.images:
        raise RequestError(f"{len(uploads)} images; a request may bring {limits.images}", 413)
    opened = [_open(upload, limits) for upload in uploads]
    if (pixels := sum(image.width * image.height for image in opened)) > limits.pixels:
        raise RequestError(f"{pixels} pixels in all; a request may bring {limits.pixels}", 413)
    return torch.stack([_pixels(upload, image, image_px) for upload, image in zip(uploads, opened, strict=True)])


def check_bytes(name: str, num_bytes: int, limits: Limits) -> None:
    """Raise where an encoded image has more bytes than one may have.

    Raises:
        RequestError: 413.
    """
    if num_bytes > limits.image_bytes:
        raise RequestError(f"image {shown(name)} has {num_bytes} bytes; at most {limits.image_bytes} are allowed", 413)


def _open(upload: Upload, limits: Limits) -> Image.Image:
    """The image with nothing but its header read."""
    what, content = f"image {shown(upload.name)}", upload.content
    check_bytes(upload.name, len(content), limits)
    kind = _format_of(content)
    if kind is None:
        raise RequestError(f"{what} is no PNG, JPEG or WebP; {_UNLIKE}", 415)
    _check_whole(what, kind, content)
    try:
        image = Image.open(io.BytesIO(content), formats=[kind])
        animated = kind != "JPEG" and getattr(image, "n_frames", 1) > 1  # photographs of two views (MPO) show their first
    except Image.DecompressionBombError as error:
        raise RequestError(f"{what} announces too many pixels; at most {limits.image_pixels} are allowed", 413) from error
    except Exception as error:
        raise _damaged(what, error) from error
    if image.width * image.height > limits.image_pixels:
        size = f"{image.width}×{image.height}"
        raise RequestError(f"{what} announces {size} pixels; at most {limits.image_pixels} are allowed", 413)
    if animated:
        raise RequestError(f"{what} is animated; give a still image", 415)
    if max(image.size) > _MAX_ASPECT * min(image.size):
        size = f"{image.width}×{image.height}"
        raise RequestError(f"{what} has {size} pixels; a side may be {_MAX_ASPECT} times the other", 422)
    return image


def _format_of(content: bytes) -> str | None:
    """As Pillow calls it, by the first bytes."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    return "WEBP" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def _check_whole(what: str, kind: str, content: bytes) -> None:
    """Raise where the end is missing, which decoders overlook if all pixels are there."""
    if kind == "PNG":
        whole = _ends_in_chunks(content)
    elif kind == "JPEG":
        whole = content.rfind(b"\xff\xd9") > content.rfind(b"\xff\xda")
    else:
        whole = int.from_bytes(content[4:8], "little") <= len(content) - 8
    if not whole:
        raise RequestError(f"{what} is truncated; send the whole {kind} file", 422)


def _ends_in_chunks(png: bytes) -> bool:
    """Whether its chunks follow each other to the last."""
    place = 8
    for _ in range(_MAX_CHUNKS):
        end = place + 12 + int.from_bytes(png[place : place + 4], "big")
        if end > len(png):
            return False
        if png[place + 4 : place + 8] == b"IEND":
            return True
        place = end
    return False


def _pixels(upload: Upload, image: Image.Image, image_px: int) -> Tensor:
    """Of the image, which is closed: decoded it takes a hundred times its bytes, and others wait to be."""
    try:
        return square_pixels(image, image_px)
    except Exception as error:
        raise _damaged(f"image {shown(upload.name)}", error) from error
    finally:
        image.close()


def _damaged(what: str, error: Exception) -> RequestError:
    """Whatever Pillow raises on bytes made to break it (of a dozen kinds) means that they are no image."""
    return RequestError(f"{what} does not decode ({type(error).__name__}); send it whole and undamaged", 422)
