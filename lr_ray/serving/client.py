"""A client of the service. It imports neither torch nor Ray; of packages it needs `lr-ray[client]`."""

import base64
import os
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from lr_ray.errors import ConfigError, DataError, ServiceError
from lr_ray.serving.answers import (
    AttentionAnswer,
    ClassifyAnswer,
    EmbeddingsAnswer,
    ModelsAnswer,
    Problem,
    TaskAnswer,
    TasksAnswer,
)

ImageFile: TypeAlias = str | os.PathLike[str] | bytes
"""Path of a PNG, JPEG or WebP file, or its content."""
Answer = TypeVar("Answer", bound=BaseModel)

_TRY_LATER = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_ATTEMPTS = 5


class Client:
    """Requests to a service, one at a time; a context manager, which closes its connections.

    What the service puts off (429, 503) is asked again when its `Retry-After` says so, without one after 1, 2, 4 and 8 s;
    five attempts, all waits together no longer than `patience_s`. Every method raises

    - `ServiceError`: the service refuses, cannot be reached, or answers something else than a service of LR-Ray;
    - `DataError`: a file that cannot be read.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = 120.0,
        patience_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: of the service, such as http://127.0.0.1:8000.
            key: API key that `lr-ray serve key add` showed; None where the service wants none.
            timeout_s: of the network, for each step of a request.
            patience_s: how long all waits of a request may be together.
            transport: httpx's, for certificates or proxies of one's own.

        Raises:
            ConfigError: not the URL of a service, or a key that cannot be one.
        """
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"{url!r} is no URL of a service; give one such as http://127.0.0.1:8000")
        headers = {} if key is None else {"Authorization": f"Bearer {_checked(key)}"}
        self._url = url
        self._patience_s = patience_s
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, transport=transport)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self) -> ModelsAnswer:
        """The models of the service."""
        return self._ask(ModelsAnswer, "GET", "/v1/models")

    def create_task(self, classes: Mapping[str, Sequence[ImageFile]], *, model: str | None = None) -> TaskAnswer:
        """Make a task of labelled images.

        Args:
            classes: images of each class, by its name; two classes or more.
            model: its name; None for the service's default.
        """
        return self._ask(TaskAnswer, "POST", "/v1/tasks", {"classes": _encoded_classes(classes)}, model=model)

    def tasks(self) -> list[TaskAnswer]:
        """All tasks of the key, oldest first."""
        return self._ask(TasksAnswer, "GET", "/v1/tasks").tasks

    def task(self, task_id: str, *, prototypes: bool = False) -> TaskAnswer:
        """A task; with its prototypes, if asked for."""
        return self._ask(TaskAnswer, "GET", _task(task_id), prototypes="true" if prototypes else None)

    def delete(self, task_id: str) -> None:
        """Delete a task."""
        self._send("DELETE", _task(task_id))

    def add_images(self, task_id: str, classes: Mapping[str, Sequence[ImageFile]], *, version: int | None = None) -> TaskAnswer:
        """Add classes to a task, or images to its classes.

        Args:
            task_id: as `create_task` gave it.
            classes: images of each class, by its name.
            version: that which the change is meant for (another is a 409); None for whichever is the newest.
        """
        body = {"classes": _encoded_classes(classes)}
        return self._ask(TaskAnswer, "POST", f"{_task(task_id)}/classes", body, version=version)

    def remove_class(self, task_id: str, name: str, *, version: int | None = None) -> TaskAnswer:
        """Remove a class from a task; two must be left. `version` is as of `add_images`."""
        return self._ask(TaskAnswer, "DELETE", f"{_task(task_id)}/classes/{_segment(name)}", version=version)

    def classify(self, task_id: str, images: Sequence[ImageFile], *, temperature: float = 1.0, top: int = 5) -> ClassifyAnswer:
        """Classify images by a task.

        Args:
            task_id: as `create_task` gave it.
            images: to be classified.
            temperature: of the probabilities.
            top: how many classes are ranked.
        """
        path, body = f"{_task(task_id)}/classify", {"images": _encoded(images)}
        return _named(self._ask(ClassifyAnswer, "POST", path, body, temperature=temperature, top=top), images)

    def classify_once(
        self,
        classes: Mapping[str, Sequence[ImageFile]],
        images: Sequence[ImageFile],
        *,
        model: str | None = None,
        temperature: float = 1.0,
        top: int = 5,
    ) -> ClassifyAnswer:
        """Classify images by labelled ones; the service keeps nothing. Arguments as of `create_task` and `classify`."""
        body = {"classes": _encoded_classes(classes), "images": _encoded(images)}
        found = self._ask(ClassifyAnswer, "POST", "/v1/classify", body, model=model, temperature=temperature, top=top)
        return _named(found, images)

    def embed(self, images: Sequence[ImageFile], *, model: str | None = None) -> EmbeddingsAnswer:
        """Features of images."""
        found = self._ask(EmbeddingsAnswer, "POST", "/v1/embeddings", {"images": _encoded(images)}, model=model)
        return found.model_copy(update={"files": _names(images)})

    def attend(self, images: Sequence[ImageFile], *, model: str | None = None) -> AttentionAnswer:
        """Where the last block's class token looks in each image."""
        found = self._ask(AttentionAnswer, "POST", "/v1/attention", {"images": _encoded(images)}, model=model)
        return found.model_copy(update={"files": _names(images)})

    def _ask(
        self,
        kind: type[Answer],
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        version: int | None = None,
        **params: str | float | None,
    ) -> Answer:
        response = self._send(method, path, body, version=version, **params)
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise ServiceError(f"{self._url} answered something else than a service of LR-Ray; check the URL") from error

    def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        version: int | None = None,
        **params: str | float | None,
    ) -> httpx.Response:
        request = self._http.build_request(
            method,
            path,
            json=body,
            params={name: value for name, value in params.items() if value is not None},
            headers={} if version is None else {"If-Match": f'"{version}"'},
        )
        left_s = self._patience_s
        for attempt in range(_ATTEMPTS):
            try:
                response = self._http.send(request)
            except httpx.TransportError as error:
                shown = "" if isinstance(error, httpx.LocalProtocolError) else str(error)  # that quotes headers, so keys
                reason = shown or type(error).__name__
                raise ServiceError(f"{self._url} cannot be reached ({reason}); is it up, and the URL right?") from error
            wait_s = _wait_s(response, attempt)
            if response.status_code not in _TRY_LATER or attempt == _ATTEMPTS - 1 or wait_s > left_s:
                break
            left_s -= wait_s
            time.sleep(wait_s)
        if not response.is_success:
            raise _problem(response)
        return response


def _checked(key: str) -> str:
    """The key without the white space around it, such as the end of the line that it was read from; never shown."""
    key = key.strip()
    if not (key.isascii() and key.isprintable() and key) or " " in key:
        raise ConfigError("the key has characters that no key has, or none; give it as `lr-ray serve key add` showed it")
    return key


def _wait_s(response: httpx.Response, attempt: int) -> float:
    """What `Retry-After` says in seconds, else longer from attempt to attempt."""
    said = response.headers.get("Retry-After", "")
    return float(said) if said.isdecimal() and len(said) < 9 else float(2**attempt)


def _problem(response: httpx.Response) -> ServiceError:
    """Also of what is no problem+json: a proxy's page, or Ray Serve's own refusal."""
    try:
        told = Problem.model_validate_json(response.content)
    except ValidationError:
        phrase = response.reason_phrase or "no reason given"
        return ServiceError(phrase, status=response.status_code, title=phrase, request_id=response.headers.get("X-Request-ID"))
    return ServiceError(told.detail, status=told.status, title=told.title, request_id=told.request_id)


def _task(task_id: str) -> str:
    return f"/v1/tasks/{_segment(task_id)}"


def _segment(text: str) -> str:
    """A part of a path; `.` and `..` would be taken out of it, and another thing be asked."""
    if text in ("", ".", ".."):
        raise ConfigError(f"{text!r} names no task and no class; give the id or the name that the service gave")
    return quote(text, safe="")


def _encoded_classes(classes: Mapping[str, Sequence[ImageFile]]) -> dict[str, list[str]]:
    return {name: _encoded(images) for name, images in classes.items()}


def _encoded(images: Sequence[ImageFile]) -> list[str]:
    """In base64: JSON, unlike multipart, takes every class name."""
    if isinstance(images, str | bytes | os.PathLike):
        raise DataError(f"images: one {type(images).__name__}; give a list of them")
    return [base64.b64encode(_content(image)).decode() for image in images]


def _content(image: ImageFile) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise DataError(f"image {os.fspath(image)}: {error.strerror}; give the path of a PNG, JPEG or WebP file") from error


def _names(images: Sequence[ImageFile]) -> list[str]:
    return [f"images[{i}]" if isinstance(image, bytes) else os.fspath(image) for i, image in enumerate(images)]


def _named(answer: ClassifyAnswer, images: Sequence[ImageFile]) -> ClassifyAnswer:
    """With the files' names, which JSON does not carry."""
    rows = zip(answer.results, _names(images), strict=True)
    return answer.model_copy(update={"results": [row.model_copy(update={"file": name}) for row, name in rows]})
