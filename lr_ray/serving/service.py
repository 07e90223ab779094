"""What the application works with, and who asks it."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch
from fastapi import Depends, Header, Request
from starlette.datastructures import Headers
from torch import Tensor

from lr_ray.errors import RequestError
from lr_ray.serving.admission import Gate
from lr_ray.serving.answers import Problem
from lr_ray.serving.keys import Key, Keyring, bounds_of
from lr_ray.serving.limits import Bounds, Limits
from lr_ray.serving.metrics import Metrics
from lr_ray.serving.models import Catalogue
from lr_ray.serving.store import TaskStore

PROBLEM = {"content": {"application/problem+json": {"schema": Problem.model_json_schema()}}}
"""Of an error, in the OpenAPI document."""

_NOBODY = "local"
"""Owner of the tasks where there are no keys."""
_READY_S = 2.0
_READY_TIMEOUT_S = 10.0


def announced_bytes(headers: Headers) -> int:
    """Of the body, by `Content-Length`; 0 where there is none that is a number."""
    declared = headers.get("content-length", "")
    return int(declared) if declared.isascii() and declared.isdecimal() and len(declared) < 20 else 0


def too_large(limits: Limits) -> RequestError:
    """413, for a body."""
    return RequestError(f"the body is larger than {limits.body_bytes} bytes; send less at once", 413)


@dataclass(kw_only=True)
class Service:
    """What the application works with.

    Attributes:
        embed: (N, 3, image_px, image_px) uint8 and a model's name → (N, D) features; raises `RequestError` 503 where it
            cannot.
        attend: the same → (N, h, w) attention maps.
        models: whose names there are.
        image_px: side of the images.
        store: of the tasks.
        keyring: who may ask; None for everyone, on this machine only.
        limits: of a request.
        bounds: of what is kept, where there are no keys.
        gate: that requests pass.
        metrics: of this process.
    """

    embed: Callable[[Tensor, str], Awaitable[Tensor]]
    attend: Callable[[Tensor, str], Awaitable[Tensor]]
    models: Catalogue
    image_px: int
    store: TaskStore
    keyring: Keyring | None = None
    limits: Limits = field(default_factory=Limits)
    bounds: Bounds = field(default_factory=Bounds)
    gate: Gate = field(default_factory=Gate)
    metrics: Metrics = field(default_factory=Metrics)
    _ready_s: float = -_READY_S
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    def check_headers(self, headers: Headers) -> Key | None:
        """Whose request it is; None where there are no keys. Nothing is charged.

        Raises:
            ConfigError: the file of keys is gone or damaged.
            RequestError: 401 no valid key; 413 a body is announced that is too large.
        """
        key = self.identify(headers.get("authorization"))
        if announced_bytes(headers) > self.limits.body_bytes:
            raise too_large(self.limits)
        return key

    def identify(self, authorization: str | None) -> Key | None:
        """Whose key the header shows; None where there are no keys. Raises as `Keyring.identify`."""
        if self.keyring is None:
            return None
        scheme, _, secret = (authorization or "").partition(" ")
        return self.keyring.identify(secret.strip() if scheme.lower() == "bearer" else None)

    async def features(self, pixels: Tensor, model: str) -> Tensor:
        """As `embed`, timed."""
        with self.metrics.stage("embed"):
            return await self.embed(pixels, model)

    async def check_ready(self) -> None:
        """Have one image embedded, unless that was done a moment ago.

        Raises:
            RequestError: 503 the backbone does not answer, or the service is about to end.
        """
        if self.gate.draining:
            raise RequestError("the service is about to end", 503, 5)
        async with self._asking:
            if time.monotonic() - self._ready_s < _READY_S:
                return
            blank = torch.zeros(1, 3, self.image_px, self.image_px, dtype=torch.uint8)
            try:
                await asyncio.wait_for(self.embed(blank, self.models.default.name), _READY_TIMEOUT_S)
            except TimeoutError as error:
                raise RequestError("the backbone does not answer yet; come again", 503, 5) from error
            self._ready_s = time.monotonic()


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        owner: of the tasks that they see.
        bounds: of what they keep.
        key: theirs, or None where there are no keys.
    """

    owner: str
    bounds: Bounds
    key: Key | None


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceHere = Annotated[Service, Depends(_service)]


async def _key(
    service: ServiceHere, authorization: Annotated[str | None, Header(include_in_schema=False)] = None
) -> Key | None:
    return service.identify(authorization)


KeyHere = Annotated[Key | None, Depends(_key)]


async def _caller(service: ServiceHere, key: KeyHere) -> Caller:
    if service.keyring is None or key is None:
        return Caller(owner=_NOBODY, bounds=service.bounds, key=None)
    service.keyring.charge(key, requests=1)
    return Caller(owner=key.name, bounds=bounds_of(key), key=key)


CallerHere = Annotated[Caller, Depends(_caller)]
