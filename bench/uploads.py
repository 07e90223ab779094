"""Encoded images and request bodies, as benches and tests of the service send them; also such as no honest client makes."""

import base64
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
from PIL import Image


def picture(seed: int, *, size: tuple[int, int] = (40, 36), shade: int = 0) -> Image.Image:
    """Noise around a shade: pictures of the same shade are alike."""
    noise = np.random.default_rng(seed).integers(0, 60, (size[1], size[0], 3))
    return Image.fromarray((noise + shade).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    image.save(content := io.BytesIO(), kind)
    return content.getvalue()


def png(seed: int = 0, *, shade: int = 0) -> bytes:
    return encoded(picture(seed, shade=shade))


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, *, rows: bytes = b"\x00") -> bytes:
    """A PNG whose header announces that size, whatever it holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose header announces that size."""
    content = bytearray(encoded(picture(0), "JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def zipped(files: Mapping[str, bytes], *, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(content := io.BytesIO(), "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return content.getvalue()


def linked_zip() -> bytes:
    with zipfile.ZipFile(content := io.BytesIO(), "w") as archive:
        member = zipfile.ZipInfo("cat/link.png")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    return content.getvalue()


def encrypted_zip() -> bytes:
    content = bytearray(zipped({"cat/a.png": png()}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    return bytes(content)


def multipart(*files: tuple[str, str, bytes], boundary: str = "x" * 24) -> tuple[bytes, str]:
    """Body and content type of (part, file name, content)."""
    lines = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{part}"; filename="{name}"\r\n\r\n'.encode() + content + b"\r\n"
        for part, name, content in files
    ]
    return b"".join(lines) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def json_body(body: object) -> tuple[bytes, str]:
    return json.dumps(body).encode(), "application/json"


def animated(kind: str) -> bytes:
    frames = [picture(seed, shade=60 * seed) for seed in range(3)]
    frames[0].save(content := io.BytesIO(), kind, save_all=True, append_images=frames[1:], duration=50)
    return content.getvalue()
