"""The page at `/`: files of our own, which are the whole of it; nothing is loaded from elsewhere, so that it works offline."""

from importlib.resources import files
from pathlib import PurePosixPath

from fastapi import APIRouter, Response

from lr_ray.errors import RequestError

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    ),
    "Referrer-Policy": "no-referrer",
}
_CONTENTS = {
    entry.name: entry.read_bytes()
    for folder in ("files", "sample")
    for entry in files(__name__).joinpath(folder).iterdir()
    if PurePosixPath(entry.name).suffix in _TYPES
}
"""By name; requests are looked up here, and never make a path."""

page = APIRouter(include_in_schema=False)


@page.get("/")
async def index() -> Response:
    """The page itself."""
    return _answer("index.html")


@page.get("/page/{name}")
async def part(name: str) -> Response:
    """What it is made of, and the images of its sample task."""
    if name not in _CONTENTS:
        raise RequestError("there is no such part of the page", 404)
    return _answer(name)


def _answer(name: str) -> Response:
    return Response(_CONTENTS[name], media_type=_TYPES[PurePosixPath(name).suffix], headers=_HEADERS)
