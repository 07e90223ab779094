"""Errors in one shape, RFC 9457, with the id of the request; and what is refused before any of it is looked at."""

import ipaddress
import logging
import re
import uuid
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lr_ray.errors import LrRayError, RequestError
from lr_ray.serving.answers import Problem

logger = logging.getLogger("lr_ray.serving")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine and is reached from nowhere else."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware: a request id in and out; faults of ours as a bare 500; without keys, no other site's requests.

    A page of another site, open in a browser on this machine, can send requests here, and by a name that it points to
    127.0.0.1 also read the answers. So that without keys `Host`, and `Origin` where there is one, must be of this machine.
    """

    def __init__(self, app: ASGIApp, *, local_only: bool) -> None:
        self.app = app
        self.local_only = local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, started = Headers(scope=scope), False
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                out = MutableHeaders(scope=message)
                out["X-Request-ID"] = request_id
                out["X-Content-Type-Options"] = "nosniff"
                out["Cache-Control"] = "no-store"
            await send(message)

        if self.local_only and (reason := _foreign(headers)):
            await problem(403, reason, request_id)(scope, receive, send_with_id)
            return
        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            return  # nobody is there to be told
        except Exception:
            logger.exception("request %s failed", request_id)
            if started:
                raise
            await problem(500, "the service failed; its log has more under the request id", request_id)(
                scope, receive, send_with_id
            )


def _foreign(headers: Headers) -> str:
    """Why the request is not one of this machine; empty if it is."""
    try:
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        origin = urlsplit(headers["origin"]).hostname or "" if "origin" in headers else None
    except ValueError:
        host, origin = "", None
    if not is_loopback(host):
        return "without keys the service answers under a name of this machine only, such as 127.0.0.1"
    if origin is not None and not is_loopback(origin):
        return "without keys the service answers no page of another site"
    return ""


def problem(status: int, detail: str, request_id: str, headers: dict[str, str] | None = None) -> Response:
    """The response that says so."""
    content = Problem.of(status, detail, request_id).model_dump()
    return JSONResponse(content, status, headers, media_type="application/problem+json")


def add_problem_handlers(app: FastAPI) -> None:
    """Have every error answered in that shape."""
    app.add_exception_handler(LrRayError, _of_ours)
    app.add_exception_handler(HTTPException, _of_starlette)
    app.add_exception_handler(RequestValidationError, _of_parameters)


async def _of_ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, LrRayError)
    return refusal(error, _id_of(request))


def refusal(error: LrRayError, request_id: str) -> Response:
    """The response to what an error of ours ends."""
    if not isinstance(error, RequestError):  # its message may name files
        logger.error("request %s: %s: %s", request_id, type(error).__name__, error)
        return problem(503, "the service cannot reach what it needs; come again", request_id, {"Retry-After": "5"})
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 408:
        headers["Connection"] = "close"
    return problem(error.status, str(error), request_id, headers)


async def _of_starlette(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail), _id_of(request), dict(error.headers or {}))


async def _of_parameters(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong: dict[str, Any] = error.errors()[0]
    return problem(422, f"{' '.join(map(str, wrong['loc']))}: {wrong['msg']}", _id_of(request))


def _id_of(request: Request) -> str:
    return str(request.scope["state"]["request_id"])
