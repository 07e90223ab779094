"""What the service counts, for Prometheus: durations, sizes, states; never names, paths or keys of anyone."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lr_ray.serving.tracing import Tracer, no_tracer

Stage = Literal["read", "decode", "embed", "prototypes"]
"""Of a request: its body comes; is taken apart and decoded; waits for the backbone and goes through it; is answered."""

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_GROUPS = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One pass of the backbone, in another process.

    Attributes:
        images: in it.
        groups: of how many requests' images, or parts of large ones.
        seconds: that it took.
    """

    images: int
    groups: int
    seconds: float


class Metrics:
    """Of one process of the application, in a registry of its own."""

    def __init__(self, tracer: Tracer = no_tracer) -> None:
        self.registry = CollectorRegistry()
        self.tracer = tracer
        ProcessCollector(registry=self.registry)
        self._requests = Counter("lr_ray_requests", "Requests answered.", ("method", "route", "status"), registry=self.registry)
        self._seconds = Histogram(
            "lr_ray_request_seconds", "From the first byte in to the last one out.", ("route",), buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._stages = Histogram(
            "lr_ray_stage_seconds", "Of the stages of requests.", ("stage",), buckets=_SECONDS, registry=self.registry
        )
        self._images = Counter("lr_ray_images", "Images decoded.", registry=self.registry)
        self._pass_images = Histogram(
            "lr_ray_pass_images", "Images of a pass of the backbone.", buckets=_IMAGES, registry=self.registry
        )
        self._pass_groups = Histogram(
            "lr_ray_pass_groups", "Requests' shares in a pass of the backbone.", buckets=_GROUPS, registry=self.registry
        )
        self._pass_seconds = Histogram(
            "lr_ray_pass_seconds", "Of a pass of the backbone.", buckets=_SECONDS, registry=self.registry
        )
        self._states = {
            name: Gauge(f"lr_ray_{name}", about, registry=self.registry)
            for name, about in {
                "requests_under_way": "Requests worked on now.",
                "requests_waiting": "Requests that wait for those.",
                "tasks_cached": "Versions of tasks in memory.",
                "tasks_cached_bytes": "Their bytes as stored.",
            }.items()
        }

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """Time it, and make a span of it."""
        start = time.perf_counter()
        with self.tracer.span(stage):
            yield
        self._stages.labels(stage).observe(time.perf_counter() - start)

    def count_images(self, images: int) -> None:
        """That were decoded."""
        self._images.inc(images)

    def count_pass(self, found: Pass) -> None:
        """That a replica tells of."""
        self._pass_images.observe(found.images)
        self._pass_groups.observe(found.groups)
        self._pass_seconds.observe(found.seconds)

    def count_request(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """That was answered.

        Args:
            route: its template.
        """
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def expose(self, **states: float) -> bytes:
        """Everything in Prometheus's text format.

        Args:
            states: of the gauges, as they are now.
        """
        for name, value in states.items():
            self._states[name].set(value)
        return generate_latest(self.registry)


@dataclass(frozen=True, slots=True)
class Measure:
    """ASGI middleware, the outermost: every request is counted by the template of its route, and is a span.

    Attributes:
        app: the application.
        metrics: that count.
    """

    app: ASGIApp
    metrics: Metrics
    _methods: frozenset[str] = field(default=frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 499  # the client went away, unless it is answered

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"] if scope["method"] in self._methods else "other"
        with self.metrics.tracer.request(method, scope["headers"]) as name_span:
            try:
                await self.app(scope, receive, send_counted)
            finally:
                route = _template(scope)
                name_span(route, status)
                seconds = time.perf_counter() - start
                self.metrics.count_request(method=method, route=route, status=status, seconds=seconds)


def _template(scope: Scope) -> str:
    """Of the route that answered, such as /v1/tasks/{task_id}; what matched none is all the same."""
    return str(getattr(scope.get("route"), "path", "none"))
