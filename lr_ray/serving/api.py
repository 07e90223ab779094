"""The HTTP interface, /v1: a FastAPI application over whatever makes features of pixels."""

import asyncio
from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi.security import HTTPBearer
from torch import Tensor

from lr_ray.errors import RequestError
from lr_ray.serving.admission import Admission
from lr_ray.serving.answers import (
    AttentionAnswer,
    ClassifyAnswer,
    EmbeddingsAnswer,
    ModelsAnswer,
    TaskAnswer,
    TasksAnswer,
)
from lr_ray.serving.bodies import EpisodeBody, QueryBody, SupportBody, Uploads, read_episode, read_queries, read_support
from lr_ray.serving.images import decode_uploads
from lr_ray.serving.limits import Limits
from lr_ray.serving.metrics import Measure
from lr_ray.serving.models import ServedModel
from lr_ray.serving.page import page
from lr_ray.serving.problems import Guard, add_problem_handlers
from lr_ray.serving.service import PROBLEM, Caller, CallerHere, Service, ServiceHere, announced_bytes, too_large
from lr_ray.serving.state import state
from lr_ray.serving.tasks import Support, Task


def make_app(service: Service) -> FastAPI:
    """The application. It has no CORS headers, and no pages that load scripts from elsewhere."""
    app = FastAPI(title="LR-Ray", version="1", docs_url=None, redoc_url=None, description=_ABOUT)
    app.state.service = service
    app.include_router(state)
    keyed = [] if service.keyring is None else [Depends(_bearer)]
    app.include_router(_v1, dependencies=keyed)
    app.include_router(page)
    add_problem_handlers(app)
    app.add_middleware(Admission, gate=service.gate, check=service.check_headers)
    app.add_middleware(Guard, local_only=service.keyring is None)
    app.add_middleware(Measure, metrics=service.metrics)
    return app


_bearer = HTTPBearer(auto_error=False, description="An API key.")
"""Tells in /openapi.json how; who asks is found out in `Service.identify`."""
_ABOUT = (
    "Few-shot classification without training: labelled images make a task, others get its nearest class. "
    "Images are PNG, JPEG or WebP, as multipart files, base64 in JSON, or a zip. Errors are problem+json (RFC 9457)."
)


Temperature = Annotated[float, Query(gt=0, le=1000, description="Times minus the distance, before the softmax.")]
Top = Annotated[int, Query(ge=1, le=1000, description="How many classes are ranked.")]
ModelName = Annotated[str | None, Query(alias="model", description="One of those of /v1/models; default the first.")]
IfMatch = Annotated[str | None, Header(description="The version (ETag) that the change is meant for; another is a 409.")]

_v1 = APIRouter(
    prefix="/v1",
    responses={
        "4XX": {"description": "Refused.", **PROBLEM},
        422: {"description": "Not as described.", **PROBLEM},
        503: {"description": "Not now.", **PROBLEM},
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
        RequestError: 408 too slow; 413 too large; 429 more bytes than the key may send now.
    """
    limits, announced = service.limits, announced_bytes(request.headers)
    _charge(service, caller, announced)
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in request.stream():
                content += chunk
                if len(content) > limits.body_bytes:
                    raise too_large(limits)
    except TimeoutError as error:
        raise RequestError(f"the body did not come in {limits.body_s:g} s; send less at once", 408) from error
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

    def work() -> TaskAnswer:
        return _told(service.store.create(caller.owner, support, caller.bounds, model=model.digest), service, caller)

    answer = await asyncio.to_thread(work)
    response.headers["Location"] = f"/v1/tasks/{quote(answer.id)}"
    response.headers["ETag"] = f'"{answer.version}"'
    return answer


def _told(task: Task, service: Service, caller: Caller, *, prototypes: bool = False) -> TaskAnswer:
    """Not for the event loop: the threshold of 1,000 classes takes long."""
    return TaskAnswer.of(task, caller.bounds, model=service.models.of_digest(task.model).name, prototypes=prototypes)


@_v1.get("/tasks")
async def list_tasks(service: ServiceHere, caller: CallerHere) -> TasksAnswer:
    """All tasks of the key, oldest first."""

    def work() -> TasksAnswer:
        tasks = service.store.list(caller.owner, caller.bounds)
        return TasksAnswer(tasks=[_told(task, service, caller) for task in tasks])

    return await asyncio.to_thread(work)


@_v1.get("/tasks/{task_id}")
async def get_task(
    task_id: str, response: Response, service: ServiceHere, caller: CallerHere, prototypes: bool = False
) -> TaskAnswer:
    """A task, with `?prototypes=true` its prototypes too."""

    def work() -> TaskAnswer:
        task = service.store.read(caller.owner, task_id, caller.bounds)
        return _told(task, service, caller, prototypes=prototypes)

    answer = await asyncio.to_thread(work)
    response.headers["ETag"] = f'"{answer.version}"'
    return answer


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
        return ClassifyAnswer.of(files, predictions, support.threshold, top=top)

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
