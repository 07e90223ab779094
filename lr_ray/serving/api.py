"""The HTTP interface, /v1: a FastAPI application over whatever makes features of pixels."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import quote

import torch
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from torch import Tensor

from lr_ray.errors import RequestError
from lr_ray.serving.admission import Admission, Gate
from lr_ray.serving.answers import (
    AttentionAnswer,
    ClassifyAnswer,
    EmbeddingsAnswer,
    ModelsAnswer,
    Problem,
    StateAnswer,
    TaskAnswer,
    TasksAnswer,
)
from lr_ray.serving.bodies import EpisodeBody, QueryBody, SupportBody, Uploads, read_episode, read_queries, read_support
from lr_ray.serving.images import Limits, decode_uploads
from lr_ray.serving.keys import Key, Keyring, bounds_of
from lr_ray.serving.metrics import Measure, Metrics
from lr_ray.serving.models import Catalogue, ServedModel
from lr_ray.serving.page import page
from lr_ray.serving.problems import Guard, add_problem_handlers
from lr_ray.serving.store import Bounds, TaskStore
from lr_ray.serving.tasks import Support, Task

_NOBODY = "local"
"""Owner of the tasks where there are no keys."""
_READY_S = 2.0
_READY_TIMEOUT_S = 10.0


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


def make_app(service: Service) -> FastAPI:
    """The application. It has no CORS headers, and no pages that load scripts from elsewhere."""
    app = FastAPI(title="LR-Ray", version="1", docs_url=None, redoc_url=None, description=_ABOUT)
    app.state.service = service
    app.include_router(_open)
    app.include_router(_v1)
    app.include_router(page)
    add_problem_handlers(app)
    app.add_middleware(Admission, gate=service.gate)
    app.add_middleware(Guard, local_only=service.keyring is None)
    app.add_middleware(Measure, metrics=service.metrics)
    return app


_ABOUT = (
    "Few-shot classification without training: labelled images make a task, others get its nearest class. "
    "Images are PNG, JPEG or WebP, as multipart files, base64 in JSON, or a zip. Errors are problem+json (RFC 9457)."
)


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceHere = Annotated[Service, Depends(_service)]


async def _key(service: ServiceHere, authorization: Annotated[str | None, Header(include_in_schema=False)] = None) -> Key | None:
    if service.keyring is None:
        return None
    scheme, _, secret = (authorization or "").partition(" ")
    return service.keyring.identify(secret.strip() if scheme.lower() == "bearer" else None)


KeyHere = Annotated[Key | None, Depends(_key)]


async def _caller(service: ServiceHere, key: KeyHere) -> Caller:
    if service.keyring is None or key is None:
        return Caller(owner=_NOBODY, bounds=service.bounds, key=None)
    service.keyring.charge(key, requests=1)
    return Caller(owner=key.name, bounds=bounds_of(key), key=key)


CallerHere = Annotated[Caller, Depends(_caller)]
Temperature = Annotated[float, Query(gt=0, le=1000, description="Times minus the distance, before the softmax.")]
Top = Annotated[int, Query(ge=1, le=1000, description="How many classes are ranked.")]
ModelName = Annotated[str | None, Query(alias="model", description="One of those of /v1/models; default the first.")]
IfMatch = Annotated[str | None, Header(description="The version (ETag) that the change is meant for; another is a 409.")]

_problem = {"content": {"application/problem+json": {"schema": Problem.model_json_schema()}}}
_open = APIRouter()
_v1 = APIRouter(
    prefix="/v1",
    responses={
        "4XX": {"description": "Refused.", **_problem},
        422: {"description": "Not as described.", **_problem},
        503: {"description": "Not now.", **_problem},
    },
)


def _takes(model: Any, about: str, *, one_image: bool = False) -> dict[str, Any]:
    """The request body as OpenAPI tells it; FastAPI knows nothing of it, for it is read and bounded here."""
    files = {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string", "format": "binary"}}}
    binary = {"schema": {"type": "string", "format": "binary"}}
    content = {"multipart/form-data": {"schema": files}, "application/json": {"schema": model.model_json_schema()}}
    images = {"image/png": binary, "image/jpeg": binary, "image/webp": binary} if one_image else {}
    return {"requestBody": {"required": True, "description": about, "content": content | {"application/zip": binary} | images}}


async def _read_body(request: Request, service: Service, caller: Caller) -> bytes:
    """The body, no more of it in memory than is allowed.

    Raises:
        RequestError: 413 too large; 429 more bytes than the key may send now.
    """
    most = service.limits.body_bytes
    too_large = RequestError(f"the body is larger than {most} bytes; send less at once", 413)
    declared = request.headers.get("content-length", "")
    announced = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
    if announced > most:
        raise too_large
    _charge(service, caller, announced)
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > most:
            raise too_large
    _charge(service, caller, max(0, len(content) - announced))
    return bytes(content)


def _charge(service: Service, caller: Caller, num_bytes: int) -> None:
    if service.keyring is not None and caller.key is not None and num_bytes:
        service.keyring.charge(caller.key, num_bytes=num_bytes)


async def _uploads(
    request: Request, service: Service, caller: Caller, read: Callable[[bytes, str, Limits], Uploads]
) -> tuple[Uploads, Tensor]:
    """What came, and its pixels, those of the support first; taken apart and decoded in a thread."""
    with service.metrics.stage("read"):
        content = await _read_body(request, service, caller)
    content_type = request.headers.get("content-type", "")

    def work() -> tuple[Uploads, Tensor]:
        uploads = read(content, content_type, service.limits)
        return uploads, decode_uploads([*uploads.images, *uploads.query], service.image_px, service.limits)

    with service.metrics.stage("decode"):
        uploads, pixels = await asyncio.to_thread(work)
    service.metrics.count_images(len(pixels))
    return uploads, pixels


async def _support(request: Request, service: Service, caller: Caller, model: ServedModel) -> Support:
    uploads, pixels = await _uploads(request, service, caller, read_support)
    return Support.of(await service.features(pixels, model.name), uploads.labels)


def _check_two(class_names: tuple[str, ...]) -> None:
    if len(class_names) < 2:
        raise RequestError("one class only; give images of two or more", 422)


def _version(if_match: str | None) -> int | None:
    if if_match is None or if_match.strip() == "*":
        return None
    text = if_match.strip().removeprefix("W/").strip('"')
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RequestError('If-Match: give the ETag of the task, such as "3"', 400)
    return int(text)


@_open.get("/healthz")
async def healthz() -> StateAnswer:
    """The process answers."""
    return StateAnswer(status="ok")


@_open.get("/readyz", responses={503: {"description": "Not yet.", **_problem}})
async def readyz(service: ServiceHere) -> StateAnswer:
    """The backbone answers too."""
    await service.check_ready()
    return StateAnswer(status="ready")


@_open.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus's text format.", "content": {"text/plain": {}}},
        401: {**_problem, "description": "No key."},
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


@_v1.post(
    "/tasks", status_code=201, openapi_extra=_takes(SupportBody, "Labelled images: parts or folders named by their class.")
)
async def create_task(
    request: Request, response: Response, service: ServiceHere, caller: CallerHere, model_name: ModelName = None
) -> TaskAnswer:
    """Make a task of labelled images, of two classes or more. It stays with its model."""
    model = service.models.find(model_name)
    support = await _support(request, service, caller, model)
    _check_two(support.class_names)
    task = await asyncio.to_thread(service.store.create, caller.owner, support, caller.bounds, model=model.digest)
    response.headers["Location"] = f"/v1/tasks/{quote(task.task_id)}"
    response.headers["ETag"] = f'"{task.version}"'
    return _told(task, service, caller)


def _told(task: Task, service: Service, caller: Caller, *, prototypes: bool = False) -> TaskAnswer:
    return TaskAnswer.of(task, caller.bounds, model=service.models.of_digest(task.model).name, prototypes=prototypes)


@_v1.get("/tasks")
async def list_tasks(service: ServiceHere, caller: CallerHere) -> TasksAnswer:
    """All tasks of the key, oldest first."""
    tasks = await asyncio.to_thread(service.store.list, caller.owner, caller.bounds)
    return TasksAnswer(tasks=[_told(task, service, caller) for task in tasks])


@_v1.get("/tasks/{task_id}")
async def get_task(
    task_id: str, response: Response, service: ServiceHere, caller: CallerHere, prototypes: bool = False
) -> TaskAnswer:
    """A task, with `?prototypes=true` its prototypes too."""
    task = await asyncio.to_thread(service.store.read, caller.owner, task_id, caller.bounds)
    response.headers["ETag"] = f'"{task.version}"'
    return _told(task, service, caller, prototypes=prototypes)


@_v1.delete("/tasks/{task_id}", status_code=204)
async def delete_task(task_id: str, service: ServiceHere, caller: CallerHere) -> None:
    """Delete a task."""
    await asyncio.to_thread(service.store.delete, caller.owner, task_id, caller.bounds)


@_v1.post("/tasks/{task_id}/classes", openapi_extra=_takes(SupportBody, "Labelled images, as for a new task."))
async def add_images(
    task_id: str, request: Request, response: Response, service: ServiceHere, caller: CallerHere, if_match: IfMatch = None
) -> TaskAnswer:
    """Add classes, or images to classes that are there."""
    version = _version(if_match)
    task = await asyncio.to_thread(service.store.read, caller.owner, task_id, caller.bounds)  # 404 before anything is decoded
    more = await _support(request, service, caller, service.models.of_digest(task.model))

    def change(support: Support) -> Support:
        grown = support.add(more)
        if len(grown.class_names) > service.limits.classes:
            raise RequestError(f"{len(grown.class_names)} classes; at most {service.limits.classes} are allowed", 413)
        return grown

    return await _change(task_id, change, version, response, service, caller)


@_v1.delete("/tasks/{task_id}/classes/{name:path}")
async def remove_class(
    task_id: str, name: str, response: Response, service: ServiceHere, caller: CallerHere, if_match: IfMatch = None
) -> TaskAnswer:
    """Remove a class; two must be left."""
    return await _change(task_id, lambda support: support.remove_class(name), _version(if_match), response, service, caller)


async def _change(
    task_id: str,
    change: Callable[[Support], Support],
    version: int | None,
    response: Response,
    service: Service,
    caller: Caller,
) -> TaskAnswer:
    def update() -> TaskAnswer:
        task = service.store.update(caller.owner, task_id, change, caller.bounds, version=version)
        return _told(task, service, caller)

    answer = await asyncio.to_thread(update)
    response.headers["ETag"] = f'"{answer.version}"'
    return answer


@_v1.post("/tasks/{task_id}/classify", openapi_extra=_takes(QueryBody, "Images of any names.", one_image=True))
async def classify(
    task_id: str,
    request: Request,
    service: ServiceHere,
    caller: CallerHere,
    temperature: Temperature = 1.0,
    top: Top = 5,
) -> ClassifyAnswer:
    """Classify images by a task."""
    task = await asyncio.to_thread(service.store.read, caller.owner, task_id, caller.bounds)
    uploads, pixels = await _uploads(request, service, caller, read_queries)
    features = await service.features(pixels, service.models.of_digest(task.model).name)
    return await _answer(service, task.support, uploads, features, temperature, top)


@_v1.post("/classify", openapi_extra=_takes(EpisodeBody, "Labelled images, and queries in parts or a folder called `query`."))
async def classify_once(
    request: Request,
    service: ServiceHere,
    caller: CallerHere,
    temperature: Temperature = 1.0,
    top: Top = 5,
    model_name: ModelName = None,
) -> ClassifyAnswer:
    """Classify images by others that come with them; nothing is kept."""
    model = service.models.find(model_name)
    uploads, pixels = await _uploads(request, service, caller, read_episode)
    _check_two(tuple(uploads.support))
    if not uploads.query:
        raise RequestError("no images to classify; give at least one, in a part or folder called query", 422)
    features = await service.features(pixels, model.name)
    support = Support.of(features[: len(uploads.labels)], uploads.labels)
    return await _answer(service, support, uploads, features[len(uploads.labels) :], temperature, top)


async def _answer(
    service: Service, support: Support, uploads: Uploads, queries: Tensor, temperature: float, top: int
) -> ClassifyAnswer:
    """For the (M, D) features of the queries; worked out in a thread, since there may be 500 queries and 1,000 classes."""
    files = [upload.name for upload in uploads.query]

    def work() -> ClassifyAnswer:
        predictions = support.classify(queries, temperature=temperature)
        return ClassifyAnswer.of(files, predictions, support.threshold(), top=top)

    with service.metrics.stage("prototypes"):
        return await asyncio.to_thread(work)


@_v1.post("/embeddings", openapi_extra=_takes(QueryBody, "Images of any names.", one_image=True))
async def embeddings(
    request: Request, service: ServiceHere, caller: CallerHere, model_name: ModelName = None
) -> EmbeddingsAnswer:
    """Features of images."""
    model = service.models.find(model_name)
    uploads, pixels = await _uploads(request, service, caller, read_queries)
    return EmbeddingsAnswer.of([upload.name for upload in uploads.query], await service.features(pixels, model.name))


@_v1.post("/attention", openapi_extra=_takes(QueryBody, "Images of any names.", one_image=True))
async def attention(
    request: Request, service: ServiceHere, caller: CallerHere, model_name: ModelName = None
) -> AttentionAnswer:
    """Where the class token of the last block looks, in each image's central square."""
    model = service.models.find(model_name)
    uploads, pixels = await _uploads(request, service, caller, read_queries)
    return AttentionAnswer.of([upload.name for upload in uploads.query], await service.attend(pixels, model.name))


@_v1.get("/models")
async def list_models(service: ServiceHere, _caller: CallerHere) -> ModelsAnswer:
    """The models: meta-LoRAs, and their backbone without any."""
    return ModelsAnswer.of(service.models, service.image_px)
