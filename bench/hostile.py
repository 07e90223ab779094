"""Over 200 uploads that break decoders and parsers, or would: each is to be refused as the sender's mistake (4xx)."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

from lr_ray.bench.uploads import (
    animated,
    base64_of,
    encoded,
    encrypted_zip,
    jpeg_of,
    json_body,
    linked_zip,
    multipart,
    picture,
    png,
    png_of,
    zipped,
)

_ZIP, _JSON = "application/zip", "application/json"
_CUTS = 16
"""Lengths at which an encoded image or body is cut off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostileRequest:
    """A POST.

    Attributes:
        name: what is wrong with it.
        path: with its query.
    """

    name: str
    path: str
    content: bytes
    content_type: str


def hostile_requests() -> Iterator[HostileRequest]:
    """All of them; the largest has some hundred kB."""
    for name, content in _images():
        yield HostileRequest(name=name, path="/v1/embeddings", content=content, content_type="image/png")
    for name, (content, kind) in _support_bodies():
        yield HostileRequest(name=name, path="/v1/tasks", content=content, content_type=kind)
    for query in ("temperature=nan", "temperature=0", "temperature=-1", "temperature=inf", "top=0", "top=1e9", "top=%00"):
        body, kind = multipart(("a", "a.png", png()), ("b", "b.png", png(1)), ("query", "q.png", png(2)))
        yield HostileRequest(name=f"query {query}", path=f"/v1/classify?{query}", content=body, content_type=kind)


def _images() -> Iterator[tuple[str, bytes]]:
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = encoded(picture(0), kind)
        for index in range(_CUTS):
            length = len(whole) * index // _CUTS
            yield f"{kind} cut to {length} bytes", whole[:length]
        yield f"{kind} without its last byte", whole[:-1]
    for kind in ("GIF", "BMP", "TIFF", "ICO", "PPM", "EPS", "TGA", "PCX", "SGI", "PDF", "JPEG2000", "ICNS"):
        yield f"{kind} under the name of PNG", encoded(picture(0, size=(32, 32)), kind)
    for kind in ("PNG", "WEBP"):
        yield f"{kind} animated", animated(kind)
    for side in (5_001, 20_000, 60_000, 2**20, 2**31 - 1, 2**31, 2**32 - 1):
        yield f"PNG that announces {side} pixels a side", png_of(side, side)
    for side in (5_001, 20_000, 65_500):
        yield f"JPEG that announces {side} pixels a side", jpeg_of(side, side)
    for width, height in ((0, 0), (0, 9), (9, 0), (6_500, 1), (1, 6_500), (9, 9)):
        yield f"PNG of {width}×{height} without rows", png_of(width, height, rows=b"")
    for name, start in _OTHERS.items():
        yield f"{name} under the name of PNG", start + bytes(64)
        yield f"{name} behind a PNG's signature", png()[:8] + start + bytes(64)


_OTHERS = {
    "a shell script": b"#!/bin/sh\ntouch /tmp/x\n",
    "a web page": b"<!doctype html><script>1</script>",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "XML with an entity": b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>",
    "PostScript": b"%!PS\n(/etc/passwd) (r) file\n",
    "an ELF file": b"\x7fELF\x02\x01\x01",
    "gzip": b"\x1f\x8b\x08\x00",
    "a pickle": b"\x80\x04cposix\nsystem\n(S'touch /tmp/x'\ntR.",
    "a picture's address": b"http://169.254.169.254/latest/meta-data",
    "a wave file": b"RIFF\x24\x00\x00\x00WAVEfmt ",
    "AVIF": b"\x00\x00\x00\x20ftypavif",
}


def _support_bodies() -> Iterator[tuple[str, tuple[bytes, str]]]:
    yield from _of_kinds()
    yield from _multiparts()
    yield from _jsons()
    yield from _zips()


def _of_kinds() -> Iterator[tuple[str, tuple[bytes, str]]]:
    for kind in ("", "x", "text/plain", "text/html", "application/xml", "application/x-tar", "application/gzip", "image/png"):
        yield f"content type {kind!r}", (png(), kind)
    for kind in ("application/x-www-form-urlencoded", "multipart/mixed; boundary=x", "application/jsonp", "*/*"):
        yield f"content type {kind!r}", (b"a=b", kind)
    for kind in ("multipart/form-data; boundary=x", _ZIP, _JSON):
        yield f"nothing as {kind}", (b"", kind)
        yield f"zeros as {kind}", (bytes(1000), kind)
        yield f"noise as {kind}", (bytes(range(256)) * 4, kind)


def _multiparts() -> Iterator[tuple[str, tuple[bytes, str]]]:
    content, kind = multipart(("a", "a.png", png()), ("b", "b.png", png(1)))
    for index in range(1, _CUTS):
        yield f"multipart cut at {index}/{_CUTS}", (content[: len(content) * index // _CUTS], kind)
    for boundary in ("", '""', "y", "x" * 23):
        yield f"multipart with boundary {boundary!r}", (content, f"multipart/form-data; boundary={boundary}")
    for name in (" ", "\t", "\x01", "a\x7fb", "\u202e", "x" * 201):
        yield f"class {name!r}", multipart((name, "a.png", png()), ("b", "b.png", png(1)))
    yield "one class", multipart(("a", "a.png", png()), ("a", "b.png", png(1)))
    yield "multipart of 501 files", multipart(*[(str(i % 2), "a.png", b"\x89PNG") for i in range(501)])
    yield "a good image and a damaged one", multipart(("a", "a.png", png()), ("b", "b.png", png()[:-20]))


def _jsons() -> Iterator[tuple[str, tuple[bytes, str]]]:
    good = base64_of(png())
    for value in (None, True, 7, -1.5, "x", [], [1], {}, {"images": [good]}, {"classes": None}, {"classes": []}):
        yield f"JSON {value!r:.40}", json_body(value)
    for value in (None, 7, {}, {"a": good}, [7], [None], [[good]], [{"path": "/etc/passwd"}], [""], ["é"], ["/etc/passwd"]):
        yield f"JSON with images {value!r:.40}", json_body({"classes": {"a": value, "b": [good]}})
    for name, text in {
        "behind a prefix": "data:image/png;base64," + good,
        "cut": good[:-3],
        "with too much padding": good + "=",
        "behind a line break": "\n" + good,
        "for addresses": good.replace("A", "-"),
        "of another format": base64_of(b"GIF89a"),
    }.items():
        yield f"JSON with base64 {name}", json_body({"classes": {"a": [text], "b": [good]}})
    for content in (
        b"{",
        b'{"classes": {',
        b"nan",
        b"\xff\xfe{}",
        b'{"classes": {"\\ud800": []}}',
        b"[" * 50_000,
        b'{"a":' * 9_999,
    ):
        yield f"JSON {content[:20]!r}…", (content, _JSON)
    yield "JSON with unknown keys", json_body({"classes": {"a": [good], "b": [good]}, "__proto__": {}, "path": "/etc/passwd"})
    yield "JSON of 501 images", json_body({"classes": {"a": [good[:8]] * 501}})


def _zips() -> Iterator[tuple[str, tuple[bytes, str]]]:
    whole = zipped({"a/a.png": png(), "b/b.png": png(1)})
    for index in range(1, _CUTS):
        yield f"zip cut at {index}/{_CUTS}", (whole[: len(whole) * index // _CUTS], _ZIP)
    for name in ("/a/a.png", "../a/a.png", "a/../../b.png", "..\\a\\a.png", "C:/a/a.png", "//host/a/a.png", "a\\b/c.png"):
        yield f"zip with {name}", (zipped({name: png(), "b/b.png": png()}), _ZIP)
    for name, compression in (("bzip2", zipfile.ZIP_BZIP2), ("LZMA", zipfile.ZIP_LZMA)):
        yield f"zip in {name}", (zipped({"a/a.png": png(), "b/b.png": png()}, compression=compression), _ZIP)
    yield "zip with a link", (linked_zip(), _ZIP)
    yield "zip encrypted", (encrypted_zip(), _ZIP)
    yield "zip without folders", (zipped({"a.png": png(), "b.png": png()}), _ZIP)
    yield "zip of nothing", (zipped({}), _ZIP)
    yield "zip of a zip", (zipped({"a/a.zip": whole, "b/b.zip": whole}), _ZIP)
    yield "zip of one class", (zipped({"a/a.png": png(), "a/b.png": png(1)}), _ZIP)
    yield "zip bomb of 40 MB", (zipped({"a/a.png": bytes(40_000_000), "b/b.png": png()}), _ZIP)
    yield "zip of 501 files", (zipped({f"{i % 2}/{i}.png": b"\x89PNG" for i in range(501)}), _ZIP)
