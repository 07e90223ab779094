"""Every error that LR-Ray raises for its user to act on.

::

    LrRayError
    ├── ConfigError      a key, value or combination in a config, flag or argument
    ├── BackboneError    a model that cannot serve as backbone or prior, or weights that do not fit it
    ├── AdapterError     an adapter that is unreadable, damaged, or made for another backbone
    ├── DataError        real images: unreadable, too few, unknown classes
    ├── StorageError     reading or committing an artefact
    ├── InversionError   an inversion that failed
    ├── EpisodeError     an episode that cannot be drawn from the images at hand
    ├── ClusterError     Ray and its clusters: starting, joining, reaching, losing workers
    ├── ExportError      a model that cannot be exported or pushed, or whose export gives other features
    ├── RequestError     a request to the service that is refused
    └── ServiceError     what a client of the service is told, or that the service cannot be reached

A message is one line: what failed, the value received, what is allowed, the remedy. The command line prints it and
exits with 1; every other exception is a fault of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable
from functools import partial
from typing import Any


class LrRayError(Exception):
    """Base of all errors that a user can act on. Takes one message, so that every subclass survives pickling."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ConfigError(LrRayError):
    """A key, value or combination in a config, flag or argument."""


class BackboneError(LrRayError):
    """A model that cannot serve as backbone or prior, or weights that do not fit it."""


class AdapterError(LrRayError):
    """An adapter that is unreadable, damaged, or made for another backbone."""


class DataError(LrRayError):
    """Real images that are unreadable, too few, or of unknown classes."""


class StorageError(LrRayError):
    """Reading or committing an artefact failed."""


class InversionError(LrRayError):
    """An inversion failed."""


class EpisodeError(LrRayError):
    """An episode cannot be drawn from the images at hand."""


class ClusterError(LrRayError):
    """Ray could not be started or joined, or lost more workers than it may."""


class ExportError(LrRayError):
    """A model that cannot be exported or pushed, or whose export gives other features."""


class RequestError(LrRayError):
    """A request to the service is refused; whoever sent it is told the message, so that it names no path and no secret.

    Attributes:
        status: the HTTP status that says so, 4xx, or 5xx where the service itself is at a loss.
        retry_after_s: when to come again, or None.
    """

    def __init__(self, message: str, status: int = 400, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type["RequestError"], tuple[str, int, int | None]]:
        return type(self), (str(self), self.status, self.retry_after_s)


class ServiceError(LrRayError):
    """The service refused a request of its client, or cannot be reached; the message is the problem's detail.

    Attributes:
        status: the HTTP status, or None where nothing answered.
        title: of the status.
        request_id: by which the service's log tells more, or None.
    """

    def __init__(
        self, detail: str, *, status: int | None = None, title: str = "No answer", request_id: str | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.title = title
        self.request_id = request_id

    @property
    def detail(self) -> str:
        return str(self)

    def __reduce__(self) -> tuple[Any, ...]:
        again = partial(type(self), status=self.status, title=self.title, request_id=self.request_id)
        return again, (str(self),)


_FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def gpu_is_full(error: BaseException) -> bool:
    """Whether a GPU's memory did not suffice; torch has an error for that, cuBLAS and cuDNN have others."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _FULL)


def cut(text: str, most: int) -> str:
    """A text of at most so many characters; one that was longer ends in "…"."""
    return text if len(text) <= most else text[: most - 1] + "…"


def shown(name: str) -> str:
    """A stranger's name, as a message quotes it: printable, and not long."""
    return repr(cut(name, 60))


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """`did you mean X? `, or nothing where no known name is close enough."""
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(close)}? " if close else ""
