"""Uploads: the pixels are those of `lr_ray.load`; whatever is made to break the decoder is refused with 4xx, in time."""

import asyncio
import io
import pickle
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch
from PIL import ExifTags, Image
from starlette.testclient import TestClient

from bench.hostile import hostile_requests
from bench.uploads import (
    animated,
    base64_of,
    chunk,
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
from lr_ray.data.images import read_pixels
from lr_ray.errors import RequestError
from lr_ray.serving.api import make_app
from lr_ray.serving.bodies import read_episode, read_queries, read_support
from lr_ray.serving.images import Upload, decode_uploads
from lr_ray.serving.limits import Limits
from lr_ray.serving.service import Service
from tests.serving.conftest import LIMITS
from tests.serving.pictures import Bomb

GIF = encoded(picture(0), "GIF")
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
TEXT_BOMB = (
    png()[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 80_000_000)) + png()[33:]
)  # unpacked by a decoder that reads text
PALETTE_SHORT = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0)) + chunk(b"IEND", b"")


# ------------------------------------------------------------------------------------------------------ what is good


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pixels_are_those_of_files(mode: str, kind: str):
    image = picture(3, size=(50, 31))
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    try:
        content = encoded(image, kind)
    except OSError:
        pytest.skip(f"{kind} has no {mode}")
    expected = read_pixels([0], 16, open_image=lambda _: Image.open(io.BytesIO(content)), describe=str)
    assert torch.equal(decode_uploads([Upload(name="x.gif", content=content)], 16, Limits()), expected)


TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
    9: None,
}  # which way a photograph of each EXIF orientation is to be turned; 9 is none


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_photographs_are_turned_as_exif_says(orientation: int, kind: str):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    picture(3, size=(50, 31)).save(photograph := io.BytesIO(), kind, exif=exif)
    stored = Image.open(io.BytesIO(encoded(picture(3, size=(50, 31)), kind))).convert("RGB")
    turn = TURNS[orientation]
    expected = read_pixels([0], 16, open_image=lambda _: stored if turn is None else stored.transpose(turn), describe=str)
    assert torch.equal(decode_uploads([Upload(name="", content=photograph.getvalue())], 16, Limits()), expected)
    assert torch.equal(read_pixels([0], 16, open_image=lambda _: Image.open(photograph), describe=str), expected)


def test_exif_that_cannot_be_read_says_nothing():
    picture(3).save(content := io.BytesIO(), "JPEG", exif=b"Exif\0\0no TIFF at all")
    found, expected = (
        decode_uploads([Upload(name="", content=c)], 16, Limits()) for c in (content.getvalue(), encoded(picture(3), "JPEG"))
    )
    assert torch.equal(found, expected)


def test_a_photograph_of_two_views_shows_its_first():
    picture(0).save(content := io.BytesIO(), "MPO", save_all=True, append_images=[picture(1)])
    first = encoded(picture(0), "JPEG")
    found, expected = (decode_uploads([Upload(name="", content=c)], 16, Limits()) for c in (content.getvalue(), first))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_truncation_is_refused(kind: str):
    content = encoded(picture(0, size=(23, 17)), kind)
    for length in {*range(0, len(content), 37), *range(len(content) - 8, len(content))}:
        with pytest.raises(RequestError) as caught:
            decode_uploads([Upload(name="x", content=content[:length])], 16, Limits())
        assert caught.value.status in (415, 422), length


def test_flipped_bytes_decode_or_are_refused():
    """Never another kind of error, whatever the byte."""
    for kind in ("PNG", "JPEG", "WEBP"):
        content = encoded(picture(0, size=(23, 17)), kind)
        for place in range(0, len(content), max(1, len(content) // 120)):
            damaged = content[:place] + bytes([content[place] ^ 0xA5]) + content[place + 1 :]
            with suppress(RequestError):
                assert decode_uploads([Upload(name="x", content=damaged)], 16, LIMITS).shape == (1, 3, 16, 16)


BODIES = {
    "multipart by folder": multipart(("f", "cat/1.png", png(0)), ("f", "dog\\2.png", png(1)), ("f", "a/cat/3.png", png(2))),
    "multipart by part": multipart(("cat", "1.png", png(0)), ("dog", "1.png", png(1)), ("cat", "1.png", png(2))),
    "json": json_body(
        {"classes": {"cat": [base64_of(png(0)), base64_of(png(2))], "dog": [base64_of(png(1))]}}
    ),
    "zip": (
        zipped(
            {"cat/1.png": png(0), "all/dog/1.png": png(1), "cat/2.png": png(2)}
            | {"__MACOSX/cat/._1.png": b"x", "cat/.DS_Store": b"x"}
        ),
        "application/zip",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_labelled_images_come_in_four_ways(name: str):
    uploads = read_support(*BODIES[name], Limits())
    found = {label: [upload.content for upload in members] for label, members in uploads.support.items()}
    assert found == {"cat": [png(0), png(2)], "dog": [png(1)]}
    assert (uploads.labels, uploads.query) == (["cat", "cat", "dog"], [])


@pytest.mark.parametrize(
    "body",
    [
        multipart(("cat", "1.png", png(0)), ("query", "q.png", png(1))),
        multipart(("f", "support/cat/1.png", png(0)), ("f", "query/q.png", png(1))),
        json_body({"classes": {"cat": [base64_of(png(0))]}, "images": [base64_of(png(1))]}),
        (zipped({"support/cat/1.png": png(0), "query/q.png": png(1)}), "application/zip"),
    ],
)
def test_an_episode_comes_in_four_ways(body: tuple[bytes, str]):
    uploads = read_episode(*body, Limits())
    assert {name: [u.content for u in members] for name, members in uploads.support.items()} == {"cat": [png(0)]}
    assert [upload.content for upload in uploads.query] == [png(1)]


@pytest.mark.parametrize(
    "body",
    [
        multipart(("a", "b/q.png", png(0))),
        json_body({"images": [base64_of(png(0))]}),
        (zipped({"q.png": png(0)}), "application/zip"),
        (png(0), "image/png"),
        (png(0), "image/anything; charset=x"),
        (png(0), "application/octet-stream"),
    ],
)
def test_queries_come_in_four_ways(body: tuple[bytes, str]):
    assert [upload.content for upload in read_queries(*body, Limits()).query] == [png(0)]


# --------------------------------------------------------------------------------------------------- what is hostile

IMAGES = {
    "empty": (b"", 415),
    "one byte": (b"\x89", 415),
    "noise": (bytes(range(256)) * 8, 415),
    "png signature alone": (png()[:8], 422),
    "png header alone": (png()[:33], 422),
    "png without its end": (png()[:-12], 422),
    "png cut in half": (png()[: len(png()) // 2], 422),
    "png without pixels": (png_of(8, 8, rows=b""), 422),
    "png with too few rows": (png_of(64, 64, rows=b"\0" * 30), 422),
    "png of palette without palette": (PALETTE_SHORT, 422),
    "png of no width": (png_of(0, 8), 422),
    "png of no size": (png_of(0, 0), 422),
    "png bomb of 400 megapixels": (png_of(20_000, 20_000), 413),
    "png bomb of the largest header": (png_of(2**31 - 1, 2**31 - 1), 413),
    "png bomb of a header beyond": (png_of(2**32 - 1, 2**32 - 1), 413),
    "png bomb a little too large": (png_of(1001, 1000), 413),
    "png bomb that unpacks in full": (png_of(1200, 1200, rows=b"\0" * (1200 * 3601)), 413),
    "png as a line": (png_of(900_000, 1), 422),
    "png as a line upright": (png_of(1, 900_000), 422),
    "png with a text bomb": (TEXT_BOMB, 422),
    "png with a broken checksum": (png()[:29] + b"\0\0\0\0" + png()[33:], 422),
    "png with a chunk longer than the file": (png()[:33] + b"\x7f\xff\xff\xffIDAT" + png()[41:], 422),
    "png animated": (animated("PNG"), 415),
    "jpeg signature alone": (b"\xff\xd8\xff", 422),
    "jpeg cut in half": (encoded(picture(0), "JPEG")[:500], 422),
    "jpeg without its end": (encoded(picture(0), "JPEG")[:-2], 422),
    "jpeg bomb": (jpeg_of(65_500, 65_500), 413),
    "jpeg of no height": (jpeg_of(40, 0), 422),
    "jpeg with noise for a scan": (b"\xff\xd8\xff\xe0" + bytes(range(256)) + b"\xff\xd9", 422),
    "webp signature alone": (b"RIFF\0\0\0\0WEBP", 422),
    "webp cut": (encoded(picture(0), "WEBP")[:-20], 422),
    "webp with another length": (b"RIFF\xff\xff\xff\x7f" + encoded(picture(0), "WEBP")[8:], 422),
    "webp animated": (animated("WEBP"), 415),
    "wav": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), 415),
    "gif": (GIF, 415),
    "gif animated": (animated("GIF"), 415),
    "bmp": (encoded(picture(0), "BMP"), 415),
    "tiff": (encoded(picture(0), "TIFF"), 415),
    "ico": (encoded(picture(0), "ICO"), 415),
    "ppm": (encoded(picture(0), "PPM"), 415),
    "eps": (encoded(picture(0), "EPS"), 415),
    "svg": (SVG, 415),
    "svg after a png signature": (png()[:8] + SVG, 422),
    "pdf": (b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n%%EOF", 415),
    "html": (b"<!doctype html><script>1</script>", 415),
    "shell": (b"#!/bin/sh\ntouch /tmp/x\n", 415),
    "elf": (b"\x7fELF" + bytes(60), 415),
    "zip": (zipped({"a.png": png()}), 415),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), 415),
    "pickle": (pickle.dumps(Bomb(Path("/tmp/lr-ray-pickled"))), 415),
    "too many bytes": (png() + bytes(LIMITS.image_bytes), 413),
}  # fmt: skip

ONE = base64_of(png())
SUPPORT_BODIES = {
    "no body": ((b"", "multipart/form-data; boundary=x"), 4),
    "no type": ((b"x", ""), 415),
    "form": ((b"a=b", "application/x-www-form-urlencoded"), 415),
    "tar": ((b"x", "application/x-tar"), 415),
    "xml": ((b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]>", "application/xml"), 415),
    "multipart without boundary": ((multipart(("a", "a.png", png()))[0], "multipart/form-data"), 400),
    "multipart with another boundary": ((multipart(("a", "a.png", png()))[0], "multipart/form-data; boundary=y"), 400),
    "multipart cut": ((multipart(("a", "a.png", png()))[0][:-40], "multipart/form-data; boundary=" + "x" * 24), 4),
    "multipart of text fields": (
        (b'--x\r\nContent-Disposition: form-data; name="cat"\r\n\r\nmeow\r\n--x--\r\n', "multipart/form-data; boundary=x"),
        400,
    ),
    "multipart of no disposition": ((b"--x\r\nA: b\r\n\r\nc\r\n--x--\r\n", "multipart/form-data; boundary=x"), 400),
    "multipart of many files": (multipart(*[(str(i % 3), "a.png", png()[:8]) for i in range(41)]), 413),
    "multipart of many classes": (multipart(*[(str(i), "a.png", png()) for i in range(7)]), 413),
    "multipart of a path as class": (multipart(("\x01", "a.png", png())), 422),
    "multipart of a long class": (multipart(("x" * 201, "a.png", png())), 422),
    "multipart of an empty class": (multipart(("", "a.png", png()), (" ", "b.png", png())), 4),
    "multipart of a class that is another place": (multipart(("..", "a.png", png()), ("b", "b.png", png())), 422),
    "multipart of a line break in a name": (multipart(("a\x7fb", "a.png", png())), 422),
    "json cut": ((b'{"classes": {"a": [', "application/json"), 400),
    "json deep": ((b'{"classes": ' + b"[" * 100_000, "application/json"), 400),
    "json deep in an image": (
        (b'{"classes": {"a": [' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"]}}", "application/json"),
        4,
    ),
    "json of no object": (json_body([1, 2]), 422),
    "json of null": (json_body(None), 422),
    "json of a number": ((b"1e999999", "application/json"), 4),
    "json not in utf-8": ((b'{"classes": {"\xff": []}}', "application/json"), 400),
    "json of lone surrogates": ((b'{"classes": {"\\ud800": ["' + ONE.encode() + b'"]}}', "application/json"), 4),
    "json of unknown keys": (json_body({"classes": {"a": [ONE]}, "path": "/etc/passwd"}), 422),
    "json of no classes": (json_body({"classes": {}}), 422),
    "json of a class without images": (json_body({"classes": {"a": [ONE], "b": []}}), 422),
    "json of another type": (json_body({"classes": {"a": [7]}}), 422),
    "json of a path": (json_body({"classes": {"a": ["/etc/passwd"], "b": [ONE]}}), 4),
    "json of a url": (json_body({"classes": {"a": ["http://169.254.169.254/latest"], "b": [ONE]}}), 422),
    "json of a data url": (json_body({"classes": {"a": ["data:image/png;base64," + ONE], "b": [ONE]}}), 422),
    "json of broken base64": (json_body({"classes": {"a": [ONE[:-3]], "b": [ONE]}}), 422),
    "json of base64 of base64": (json_body({"classes": {"a": [base64_of(ONE.encode())], "b": [ONE]}}), 415),
    "json of empty images": (json_body({"classes": {"a": [""], "b": [ONE]}}), 415),
    "json of many images": (json_body({"classes": {"a": ["x"] * 41}}), 413),
    "json of many classes": (json_body({"classes": {str(i): [ONE] for i in range(7)}}), 413),
    "zip of nothing": ((b"", "application/zip"), 400),
    "zip of noise": ((bytes(range(256)), "application/zip"), 400),
    "zip cut": ((zipped({"a/a.png": png()})[:-30], "application/zip"), 400),
    "zip without files": ((zipped({}), "application/zip"), 422),
    "zip of files in no folder": ((zipped({"a.png": png()}), "application/zip"), 422),
    "zip that climbs": ((zipped({"../../cat/a.png": png()}), "application/zip"), 422),
    "zip that climbs later": ((zipped({"a/../../cat/a.png": png()}), "application/zip"), 422),
    "zip from the root": ((zipped({"/etc/cat/a.png": png()}), "application/zip"), 422),
    "zip of backslashes": ((zipped({"..\\cat\\a.png": png()}), "application/zip"), 422),
    "zip of a drive": ((zipped({"C:/cat/a.png": png()}), "application/zip"), 422),
    "zip of a link": ((linked_zip(), "application/zip"), 422),
    "zip encrypted": ((encrypted_zip(), "application/zip"), 422),
    "zip in bzip2": ((zipped({"cat/a.png": png()}, compression=12), "application/zip"), 422),
    "zip in lzma": ((zipped({"cat/a.png": png()}, compression=14), "application/zip"), 422),
    "zip bomb": ((zipped({"cat/a.png": bytes(50_000_000)}), "application/zip"), 413),
    "zip bomb in parts": ((zipped({f"cat/{i}.png": png() + bytes(90_000) for i in range(9)}), "application/zip"), 413),
    "zip of a zip bomb": ((zipped({"cat/a.zip": zipped({"b": bytes(20_000_000)})}), "application/zip"), 415),
    "zip of many files": ((zipped({f"cat/{i}.png": b"" for i in range(41)}), "application/zip"), 413),
    "zip of very many files": ((zipped({f"cat/{i}": b"" for i in range(2000)}), "application/zip"), 413),
    "zip with a broken checksum": (
        (zipped({"cat/a.png": png()}, compression=0).replace(png()[60:90], bytes(30)), "application/zip"),
        400,
    ),
    "zip that lies about lengths": (
        (zipped({"cat/a.png": bytes(200_000)}).replace(struct.pack("<I", 200_000), struct.pack("<I", 5)), "application/zip"),
        4,
    ),
}  # fmt: skip


def refused(client: TestClient, path: str, body: tuple[bytes, str], status: int) -> None:
    answer = client.post(path, content=body[0], headers={"content-type": body[1]})
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.status_code == status or answer.status_code // 100 == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert "\n" not in problem["detail"]
    assert len(problem["detail"]) < 400


@pytest.mark.parametrize("name", IMAGES)
def test_a_hostile_image_is_refused(client: TestClient, name: str, tmp_path: Path):
    content, status = IMAGES[name]
    refused(client, "/v1/embeddings", multipart(("image", "good.png", content)), status)
    refused(client, "/v1/embeddings", (content, "image/png"), status)
    refused(client, "/v1/tasks", multipart(("a", "good.png", png()), ("b", "bad.png", content)), status)
    assert not Path("/tmp/lr-ray-pickled").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SUPPORT_BODIES)
def test_a_hostile_body_is_refused(client: TestClient, name: str, tmp_path: Path):
    refused(client, "/v1/tasks", *SUPPORT_BODIES[name])
    assert list(tmp_path.iterdir()) == []


def test_bodies_are_bounded(client: TestClient):
    refused(client, "/v1/tasks", (bytes(LIMITS.body_bytes + 1), "application/zip"), 413)


def test_a_body_without_a_length_is_bounded(service: Service):
    sent = []

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1000):
            sent.append(10_000)
            yield bytes(10_000)

    async def scene() -> int:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            answer = await client.post("/v1/tasks", content=endless(), headers={"content-type": "application/zip"})
            return answer.status_code

    assert asyncio.run(scene()) == 413
    assert sum(sent) <= LIMITS.body_bytes + 20_000


def test_all_pixels_together_are_bounded(client: TestClient):
    large = encoded(Image.new("RGB", (1000, 1000)))
    refused(client, "/v1/embeddings", multipart(*[("a", "a.png", large)] * 4), 413)


def test_the_names_of_a_multipart_body_are_utf_8(client: TestClient):
    """Whatever it says of itself; else a name could be what no answer can hold."""
    body, kind = multipart(("image", "\\ud800.png", png()))
    for charset in ("unicode_escape", "no-such"):
        answer = client.post("/v1/embeddings", content=body, headers={"content-type": f"{kind}; charset={charset}"})
        assert (answer.status_code, answer.json()["files"]) == (200, ["\\ud800.png"])


def test_one_decoded_image_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch):
    seen: list[Image.Image] = []

    def square(image: Image.Image, side: int) -> torch.Tensor:
        for before in seen:
            with pytest.raises(ValueError, match="closed"):
                before.getpixel((0, 0))
        seen.append(image)
        return torch.zeros(3, side, side, dtype=torch.uint8)

    monkeypatch.setattr("lr_ray.serving.images.square_pixels", square)
    decode_uploads([Upload(name=f"{i}.png", content=png(i)) for i in range(3)], 8, LIMITS)
    assert len(seen) == 3


def test_headers_are_checked_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    bad: list[Callable[[], bytes]] = [lambda: png_of(9000, 9000), lambda: GIF, lambda: png()[:-12]]
    for make in bad:
        with pytest.raises(RequestError):
            decode_uploads([Upload(name="a", content=png()), Upload(name="b", content=make())], 16, Limits())


def test_over_200_hostile_uploads_are_refused(client: TestClient, tmp_path: Path):
    """Those that `lr-ray bench serve` sends, at the limits of the tests and at those of the service."""
    found = list(hostile_requests())
    assert len({request.name for request in found}) == len(found) > 200
    for request in found:
        refused(client, request.path, (request.content, request.content_type), 4)
    client.app.state.service.limits = Limits()  # type: ignore[attr-defined]
    for request in found:
        refused(client, request.path, (request.content, request.content_type), 4)
    assert list(tmp_path.iterdir()) == []
