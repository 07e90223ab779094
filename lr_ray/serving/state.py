"""How the service is: alive, ready, and in numbers."""

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lr_ray.serving.answers import StateAnswer
from lr_ray.serving.service import PROBLEM, KeyHere, ServiceHere

state = APIRouter()


@state.get("/healthz")
async def healthz() -> StateAnswer:
    """The process answers."""
    return StateAnswer(status="ok")


@state.get("/readyz", responses={503: {"description": "Not yet.", **PROBLEM}})
async def readyz(service: ServiceHere) -> StateAnswer:
    """The backbone answers too."""
    await service.check_ready()
    return StateAnswer(status="ready")


@state.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus's text format.", "content": {"text/plain": {}}},
        401: {**PROBLEM, "description": "No key."},
    },
)
async def metrics(service: ServiceHere, _: KeyHere) -> Response:
    """What is counted, for Prometheus. Where there are keys it needs one, and counts for none of its limits."""
    tasks, tasks_bytes = service.store.cached
    content = service.metrics.expose(
        requests_under_way=service.gate.under_way,
        requests_waiting=service.gate.waiting,
        tasks_cached=tasks,
        tasks_cached_bytes=tasks_bytes,
    )
    return Response(content, media_type=CONTENT_TYPE_LATEST)
