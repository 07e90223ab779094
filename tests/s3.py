"""An S3 server on loopback (moto's) behind a proxy that counts requests and does to them what networks do."""

import http.client
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from typing import Literal

from moto.server import ThreadedMotoServer

Fault = Literal[
    "forbidden", "conflict", "slow down", "server error", "reset", "lost answer", "truncated", "damaged", "delay", "stall"
]
"""403, 409, 503 and 500; the connection reset before or after the request was carried out; half of a body; a body with one byte
changed; an answer that is late, and one that never comes."""
FAULTS: tuple[Fault, ...] = ("slow down", "server error", "reset", "lost answer", "truncated", "damaged", "delay")
_DELAY_S = 0.3
_REFUSALS: dict[Fault, tuple[int, bytes]] = {
    "forbidden": (403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"),
    "conflict": (409, b"<Error><Code>ConditionalRequestConflict</Code><Message>A conflicting operation.</Message></Error>"),
    "slow down": (503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"),
    "server error": (500, b"<Error><Code>InternalError</Code><Message>We met an internal error.</Message></Error>"),
}
_CONNECTION_HEADERS = {"connection", "content-length", "transfer-encoding", "expect", "date", "server"}


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to a server at `port`; the n-th one suffers the n-th of the faults that were set."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target_port = port
        self.requests: list[str] = []
        """Method and path of each request so far."""
        self.sent = 0
        """Bytes of bodies so far."""
        self._lock = threading.Lock()
        self.set_faults(())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def set_faults(self, faults: Iterable[Fault | None]) -> None:
        """Of the requests from now on; those after the last are left alone. Forgets the requests so far."""
        with self._lock:
            self._faults: Iterator[Fault | None] = chain(faults, repeat(None))
            self.requests.clear()
            self.sent = 0

    def take(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            return next(self._faults)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client, or one of the faults, has closed the connection
            self.close_connection = True

    def _serve(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.take(f"{self.command} {self.path}")
        if fault == "stall":
            self.connection.recv(1)  # returns when the client has given up
            self.close_connection = True
        elif fault == "reset":
            self._reset()
        elif fault in _REFUSALS:
            self._answer(*_REFUSALS[fault], {"Content-Type": "application/xml"})
        else:
            if fault == "delay":
                threading.Event().wait(_DELAY_S)
            self._answer(*self._forward(content), fault=fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815

    def _forward(self, content: bytes) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target_port)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("expect", "connection")}
        connection.request(self.command, self.path, body=content or None, headers=headers)
        response = connection.getresponse()
        body = response.read()
        kept = {name: value for name, value in response.getheaders() if name.lower() not in _CONNECTION_HEADERS}
        if self.command == "HEAD":
            kept["Content-Length"] = response.getheader("Content-Length", "0")
        connection.close()
        return response.status, body, kept

    def _answer(self, status: int, body: bytes, headers: dict[str, str], *, fault: Fault | None = None) -> None:
        if fault == "lost answer":
            self._reset()
            return
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.server.sent += len(body)
        if fault == "damaged" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.wfile.write(body[: len(body) // 2] if fault == "truncated" else body)
        self.close_connection = self.close_connection or fault == "truncated"

    def _reset(self) -> None:
        """Close with RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Says nothing."""


def environment(proxy: FaultyProxy) -> dict[str, str]:
    """What a user of that server sets."""
    return {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def s3_server() -> Iterator[FaultyProxy]:
    """Both of them, for as long as the context lasts."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = FaultyProxy(server.get_host_and_port()[1])
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        thread.join()
        proxy.server_close()
        server.stop()
