"""How many requests are worked on at once, how many wait for that, and the end of it all."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lr_ray.errors import LrRayError, RequestError
from lr_ray.serving.problems import refusal

_GUARDED = "/v1/"


@dataclass(kw_only=True)
class Gate:
    """Lets so many requests through at once and has so many others wait in line; all on one event loop.

    Attributes:
        at_once: requests that are worked on.
        in_line: requests that wait for one of those to end.
        wait_s: how long they wait.
        under_way, waiting: requests that there are now.
        draining: whether new ones are refused, for the service is about to end.
    """

    at_once: int = 32
    in_line: int = 32
    wait_s: float = 30.0
    under_way: int = 0
    waiting: int = 0
    draining: bool = False
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @asynccontextmanager
    async def passage(self) -> AsyncIterator[None]:
        """For as long as a request is worked on.

        Raises:
            RequestError: 503 the service is about to end, the line is full, or the wait was too long.
        """
        await self._enter()
        try:
            yield
        finally:
            self.under_way -= 1
            async with self._changed:
                self._changed.notify_all()

    async def _enter(self) -> None:
        if self.draining:
            raise RequestError("the service is about to end; come again", 503, 5)
        if self.under_way >= self.at_once or self.waiting:
            if self.waiting >= self.in_line:
                raise RequestError(f"{self.under_way} requests are worked on and {self.waiting} wait; come again", 503, 1)
            self.waiting += 1
            try:
                async with asyncio.timeout(self.wait_s), self._changed:
                    await self._changed.wait_for(lambda: self.under_way < self.at_once)
                    self.under_way += 1
                    return
            except TimeoutError as error:
                raise RequestError(
                    f"{self.at_once} requests were worked on for {self.wait_s:.0f} s; come again", 503, 5
                ) from error
            finally:
                self.waiting -= 1
        self.under_way += 1

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, and wait for those that wait or are worked on; whether all ended in time."""
        self.draining = True
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: not self.under_way and not self.waiting)
        except TimeoutError:
            return False
        return True


class Admission:
    """ASGI middleware: everything below /v1/ passes the gate before its body is read; health and metrics always pass.

    What its headers alone tell against is refused before, so that it takes no place and no memory.
    """

    def __init__(self, app: ASGIApp, *, gate: Gate, check: Callable[[Headers], object]) -> None:
        """Args: app; gate; check, which raises for headers that tell against a request."""
        self.app = app
        self.gate = gate
        self.check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or not scope["path"].startswith(_GUARDED):
            await self.app(scope, receive, send)
            return
        try:
            self.check(Headers(scope=scope))
            async with self.gate.passage():
                await self.app(scope, receive, send)
        except LrRayError as error:  # of the check or the gate: the application answers its own
            response = refusal(error, scope["state"]["request_id"])
            if self.gate.draining:
                response.headers["Connection"] = "close"
            await response(scope, receive, send)
