"""OpenTelemetry spans of requests and their stages, where OTEL_EXPORTER_OTLP_ENDPOINT says where to; else nothing."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from lr_ray.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_MODULES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")
_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_TRACE_HEADERS = ("traceparent", "tracestate")
Name = Callable[[str, int], None]
"""Given the template of the route and the status once they are known."""


class Tracer(Protocol):
    """What makes spans."""

    def request(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> AbstractContextManager[Name]:
        """The span of a request, below that of the W3C traceparent among its headers."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """Within that of the request."""


class _NoTracer:
    def request(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> AbstractContextManager[Name]:
        """None."""
        return nullcontext(lambda _route, _status: None)

    def span(self, name: str) -> AbstractContextManager[None]:
        """None."""
        return nullcontext()


no_tracer: Tracer = _NoTracer()


def check_tracing() -> None:
    """Raise where the environment asks for spans that cannot be made.

    Raises:
        ConfigError: there is an endpoint and OpenTelemetry is not installed.
    """
    if not os.environ.get(_ENDPOINT):
        return
    try:
        for module in _MODULES:
            import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{_ENDPOINT} is set, but {error.name} is not installed; `pip install 'lr-ray[otel]'`") from error


def tracer_of_environment() -> Tracer:
    """That which the environment asks for; without an endpoint nothing is imported.

    Raises: as `check_tracing`.
    """
    check_tracing()
    if not os.environ.get(_ENDPOINT):
        return no_tracer
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "lr-ray")}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OpenTelemetry(provider)


class OpenTelemetry:
    """Spans by a provider."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("lr_ray.serving")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def request(self, method: str, headers: Iterable[tuple[bytes, bytes]]) -> Iterator[Name]:
        """See `Tracer`."""
        from opentelemetry.trace import SpanKind

        carrier = {name: value for name, value in _decoded(headers) if name in _TRACE_HEADERS}
        context = self._propagator.extract(carrier)
        with self._tracer.start_as_current_span(method, context=context, kind=SpanKind.SERVER) as span:

            def name(route: str, status: int) -> None:
                span.update_name(f"{method} {route}")
                span.set_attribute("http.request.method", method)
                span.set_attribute("http.route", route)
                span.set_attribute("http.response.status_code", status)

            yield name

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """See `Tracer`."""
        with self._tracer.start_as_current_span(name):
            yield


def _decoded(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[str, str]]:
    for name, value in headers:
        yield name.decode("latin-1").lower(), value.decode("latin-1")
