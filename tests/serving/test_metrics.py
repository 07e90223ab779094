"""What is counted: by template of the route, never by what a stranger sends; and a dashboard that asks for nothing else."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from bench.uploads import multipart, png
from lr_ray.errors import ConfigError
from lr_ray.serving.api import Service
from lr_ray.serving.metrics import Metrics, Pass
from lr_ray.serving.tracing import OpenTelemetry, no_tracer, tracer_of_environment

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana.json"
SUPPORT = multipart(("a", "a.png", png()), ("b", "b.png", png(1, shade=90)))


def exposed(client: TestClient) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by name of the sample and values of its labels."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, tuple(s.labels[k] for k in sorted(s.labels))): s.value for f in families for s in f.samples}


def make_task(client: TestClient) -> str:
    answer = client.post("/v1/tasks", content=SUPPORT[0], headers={"content-type": SUPPORT[1]})
    return str(answer.json()["id"])


def test_requests_are_counted_by_template_and_stages_are_timed(client: TestClient):
    task = make_task(client)
    client.post(f"/v1/tasks/{task}/classify", content=png(), headers={"content-type": "image/png"})
    client.post(f"/v1/tasks/{task}/classify", content=b"GIF89a", headers={"content-type": "image/png"})
    client.get("/v1/tasks/nothing")
    client.get("/etc/passwd?key=secret")
    client.request("SECRET", "/v1/tasks")
    found = exposed(client)
    requests = {labels: value for (name, labels), value in found.items() if name == "lr_ray_requests_total"}
    assert requests == {
        ("POST", "/v1/tasks", "201"): 1,
        ("POST", "/v1/tasks/{task_id}/classify", "200"): 1,
        ("POST", "/v1/tasks/{task_id}/classify", "415"): 1,
        ("GET", "/v1/tasks/{task_id}", "404"): 1,
        ("GET", "none", "404"): 1,
        ("other", "/v1/tasks", "405"): 1,
    }
    counts = {labels[0]: value for (name, labels), value in found.items() if name == "lr_ray_stage_seconds_count"}
    assert counts == {"read": 3, "decode": 2, "embed": 2, "prototypes": 1}
    assert found["lr_ray_images_total", ()] == 3
    assert found["lr_ray_request_seconds_count", ("/v1/tasks/{task_id}/classify",)] == 2
    assert (found["lr_ray_tasks_cached", ()], found["lr_ray_requests_under_way", ()]) == (1, 0)
    assert found["lr_ray_tasks_cached_bytes", ()] > 100
    text = client.get("/metrics").text
    assert [word for word in (task, "secret", "SECRET", "passwd") if word in text] == []


def test_what_is_refused_at_the_door_is_counted_too(service: Service, connect: Callable[..., TestClient]):
    assert connect(service, host="evil.example").get("/v1/tasks").status_code == 403
    assert exposed(connect(service))["lr_ray_requests_total", ("GET", "none", "403")] == 1


def test_where_there_are_keys_the_metrics_need_one(keyed: Callable[..., TestClient], connect: Callable[..., TestClient]):
    client = keyed("ann", requests_per_minute=1)
    for _ in range(3):
        assert exposed(client)
    client.headers.pop("authorization")
    assert client.get("/metrics").status_code == 401


def test_the_dashboard_asks_for_what_is_exposed(service: Service, client: TestClient):
    make_task(client)
    service.metrics.count_pass(Pass(images=3, groups=2, seconds=0.1))
    names = {name for name, _ in exposed(client)}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(?:lr_ray|process)_\w+", query)}
    assert asked - names == set()
    assert {
        name for name in names if name.startswith("lr_ray") and not name.endswith(("_created", "_sum", "_count"))
    } - asked == set()


def test_spans_of_a_request_and_its_stages_below_the_callers(service: Service, connect: Callable[..., TestClient]):
    provider, kept = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    service.metrics = Metrics(OpenTelemetry(provider))
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    client = connect(service, traceparent=f"00-{trace}-{parent}-01")
    make_task(client)
    spans = {span.name: span for span in kept.get_finished_spans()}
    assert set(spans) == {"read", "decode", "embed", "POST /v1/tasks"}
    request = spans.pop("POST /v1/tasks")
    assert (f"{request.context.trace_id:032x}", f"{request.parent.span_id:016x}") == (trace, parent)
    assert request.attributes["http.response.status_code"] == 201
    assert {span.parent.span_id for span in spans.values()} == {request.context.span_id}


def test_without_an_endpoint_there_is_no_trace(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert tracer_of_environment() is no_tracer
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"is not installed; `pip install 'lr-ray\[otel\]'`"):
        tracer_of_environment()
