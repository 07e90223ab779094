"""Where tasks are kept: any local folder or URI, shared by whoever serves from it, and there again after a restart.

A version of a task is a file of its own, OWNER/ID/VERSION.safetensors, written only while that name is free: of two
writers of the same next version one loses, wherever they run. The names of the last 16 versions that were replaced stay
taken by files of one byte; a writer so late that the version it read has no name any more has lost, too. An empty file is
the version in which the task was deleted.
Ids begin with the time of creation, so that a listing tells what has expired.
"""

import logging
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from lr_ray.errors import RequestError, StorageError
from lr_ray.serving.limits import OWNER, Bounds
from lr_ray.serving.tasks import Support, Task
from lr_ray.storage.filesystem import (
    create_bytes,
    delete,
    delete_empty_folder,
    join,
    list_sizes,
    read_if_there,
    read_many,
    write_bytes,
)

_logger = logging.getLogger("lr_ray.serving")
_ID = re.compile(r"[0-9a-f]{8}[A-Za-z0-9_-]{22}")
_FILE = re.compile(r"(?P<version>[0-9]{8})\.safetensors")
_ATTEMPTS = 5
_KEPT_NAMES = 16
_REPLACED = b"-"
_CACHE_BYTES = 128 * 2**20
_KEPT_DELETED = 100
"""Of an owner's deleted tasks so many stay as empty files, so that a change that began before finds its version taken."""
_NO_TASK = "there is no such task"


@dataclass(kw_only=True)
class TaskStore:
    """Tasks by owner and id. Another owner's task, one that expired and one that never was are all the same: 404.

    Methods may be called from several threads. Every one raises `StorageError` where the storage fails.

    Attributes:
        root: folder or URI.
        models: digests of the models that make features here; tasks of others are refused (409).
        clock: seconds since 1970.
    """

    root: str
    models: Collection[str]
    clock: Callable[[], float] = time.time
    _cache: "OrderedDict[str, Task]" = field(default_factory=OrderedDict)
    _cached_bytes: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _creating: threading.Lock = field(default_factory=threading.Lock)

    @property
    def cached(self) -> tuple[int, int]:
        """Versions in memory, and their bytes as stored."""
        with self._lock:
            return len(self._cache), sum(self._cached_bytes.values())

    def create(self, owner: str, support: Support, bounds: Bounds, *, model: str) -> Task:
        """Keep a new task of the model of that digest.

        Raises:
            RequestError: 413 the owner's tasks would be too many or too large; 500 as of `_perhaps_written`.
        """
        task_id = f"{int(self.clock()):08x}{secrets.token_urlsafe(16)}"
        task = Task(task_id=task_id, owner=owner, version=1, model=model, support=support)
        content = task.to_bytes(nonce=secrets.token_hex(8))
        with self._creating:  # of two that come at once here, the second sees the first
            sizes = self._sizes(owner, bounds)
            if len(sizes) >= bounds.tasks:
                raise RequestError(f"{len(sizes)} tasks are kept already, and no more may be; delete one", 413)
            _check_bytes(sum(sizes.values()) + len(content), bounds)
            with _perhaps_written(task_id, 1):
                created = create_bytes(self._uri(owner, task_id, 1), content)
            if not created:
                raise RequestError("the task's name was taken; ask again", 503, 1)
        return task

    def read(self, owner: str, task_id: str, bounds: Bounds) -> Task:
        """The newest version.

        Raises:
            RequestError: 404 no such task of this owner; 409 it was made by a model that is not here.
        """
        for _ in range(_ATTEMPTS):
            if (found := self._newest(owner, task_id, bounds)) is None:
                break
            version, size = found
            if (task := self._read_version(owner, task_id, version, size)) is not None:
                if task.model not in self.models:
                    raise RequestError("the task was made with a model that this service does not have; make it again", 409)
                return task
        raise RequestError(_NO_TASK, 404)

    def update(
        self, owner: str, task_id: str, change: Callable[[Support], Support], bounds: Bounds, *, version: int | None = None
    ) -> Task:
        """Keep a changed task as the next version.

        Args:
            change: of the classes; called again on the newer ones if another change came between.
            version: that which the change is meant for; None for whichever is the newest.

        Raises:
            RequestError: as of `read` and of `change`; 409 another change came first; 413 the tasks would be too large.
        """
        for _ in range(_ATTEMPTS):
            task = self.read(owner, task_id, bounds)
            if version not in (None, task.version):
                raise RequestError(f"the task has version {task.version} by now, not {version}; read it and try again", 409)
            changed = task.with_support(change(task.support))
            content = changed.to_bytes(nonce=secrets.token_hex(8))
            others = sum(size for other, size in self._sizes(owner, bounds).items() if other != task_id)
            _check_bytes(others + len(content), bounds)
            if self._commit(owner, task_id, changed.version, content):
                return changed
        raise RequestError("the task is being changed by others; read it and try again", 409, 1)

    def delete(self, owner: str, task_id: str, bounds: Bounds) -> None:
        """Delete a task.

        Raises:
            RequestError: 404 no such task of this owner; 409 it was being changed all the time.
        """
        for _ in range(_ATTEMPTS):
            if (found := self._newest(owner, task_id, bounds)) is None:
                raise RequestError(_NO_TASK, 404)
            if self._commit(owner, task_id, found[0] + 1, b""):
                return
        raise RequestError("the task is being changed by others; try again", 409, 1)

    def list(self, owner: str, bounds: Bounds) -> list[Task]:
        """All of an owner's tasks that the models here can use, oldest first."""

        def read(task_id: str) -> Task | None:
            with suppress(RequestError):  # deleted meanwhile, or of another model
                return self.read(owner, task_id, bounds)
            return None

        return [task for task in read_many(read, sorted(self._sizes(owner, bounds))) if task is not None]

    def _uri(self, owner: str, task_id: str, version: int) -> str:
        assert OWNER.fullmatch(owner), "owners are names of keys, which are checked where they are made"
        assert _ID.fullmatch(task_id), "ids of requests are checked before they name anything"
        return join(self.root, owner, task_id, f"{version:08d}.safetensors")

    def _expired(self, task_id: str, bounds: Bounds) -> bool:
        return int(task_id[:8], 16) + bounds.age_s <= self.clock()

    def _newest(self, owner: str, task_id: str, bounds: Bounds) -> tuple[int, int] | None:
        """Version and bytes, unless the task was deleted, has expired or never was."""
        if not _ID.fullmatch(task_id) or self._expired(task_id, bounds):
            return None
        versions = _versions(list_sizes(join(self.root, owner, task_id)))
        newest = max(versions, default=0)
        return (newest, versions[newest]) if versions.get(newest) else None

    def _sizes(self, owner: str, bounds: Bounds) -> dict[str, int]:
        """Bytes of each of the owner's tasks; files of those that expired or were deleted long ago go on the way."""
        files: dict[str, dict[str, int]] = {}
        for name, size in list_sizes(join(self.root, owner)).items():
            task_id, _, file = name.partition("/")
            if _ID.fullmatch(task_id) and _FILE.fullmatch(file):
                files.setdefault(task_id, {})[file] = size
        newest = {task_id: max(_versions(found).items()) for task_id, found in files.items()}
        gone = [task_id for task_id in sorted(newest) if self._expired(task_id, bounds)]
        deleted = [task_id for task_id in sorted(newest) if not newest[task_id][1] and task_id not in gone]
        for task_id in gone + deleted[:-_KEPT_DELETED]:
            self._remove(owner, task_id, _versions(files[task_id]))
        return {task_id: size for task_id, (_, size) in newest.items() if size and task_id not in gone}

    def _read_version(self, owner: str, task_id: str, version: int, size: int) -> Task | None:
        """None if it has been replaced since it was listed."""
        uri = self._uri(owner, task_id, version)
        with self._lock:
            if (task := self._cache.get(uri)) is not None:
                self._cache.move_to_end(uri)
                return task
        content = read_if_there(uri)
        if content is None or content in (b"", _REPLACED):
            return None
        task = Task.from_bytes(content)
        if (task.owner, task.task_id, task.version) != (owner, task_id, version):
            raise StorageError("a stored task is not the one that its name says; delete it")
        with self._lock:
            self._cache[uri], self._cached_bytes[uri] = task, size
            while sum(self._cached_bytes.values()) > _CACHE_BYTES and len(self._cache) > 1:
                oldest, _ = self._cache.popitem(last=False)
                del self._cached_bytes[oldest]
        return task

    def _commit(self, owner: str, task_id: str, version: int, content: bytes) -> bool:
        """Write the version if it is the next one, and make less of those before it; whether it is.

        Those that cannot be removed now are left to the next change.
        """
        with _perhaps_written(task_id, version):
            if not create_bytes(self._uri(owner, task_id, version), content):
                return False
            versions = _versions(list_sizes(join(self.root, owner, task_id)))
        if version - 1 not in versions:  # the name was free because this comes too late
            self._remove(owner, task_id, [version])
            return False
        replaced = [older for older in versions if version - _KEPT_NAMES <= older < version]
        for older in replaced if content else []:
            if versions[older] > len(_REPLACED):
                with suppress(StorageError):
                    write_bytes(self._uri(owner, task_id, older), _REPLACED)
                self._uncache([self._uri(owner, task_id, older)])
        self._remove(owner, task_id, [older for older in versions if older < version and not (content and older in replaced)])
        return True

    def _remove(self, owner: str, task_id: str, versions: Iterable[int]) -> None:
        uris = [self._uri(owner, task_id, version) for version in versions]
        for uri in uris:
            with suppress(StorageError):
                delete(uri)
        self._uncache(uris)

        with suppress(StorageError):
            delete_empty_folder(join(self.root, owner, task_id))

    def _uncache(self, uris: Iterable[str]) -> None:
        with self._lock:
            for uri in uris:
                self._cache.pop(uri, None)
                self._cached_bytes.pop(uri, None)


@contextmanager
def _perhaps_written(task_id: str, version: int) -> Iterator[None]:
    """What fails inside may be done nevertheless.

    Raises:
        RequestError: 500 the storage failed, and to ask again may do it twice.
    """
    try:
        yield
    except StorageError as error:
        _logger.error("task %s, version %d: %s", task_id, version, error)
        raise RequestError("the storage failed, and the change may have been made; look at the task", 500) from error


def _versions(sizes: dict[str, int]) -> dict[int, int]:
    """Bytes by version, of what a task's folder holds."""
    return {int(match["version"]): size for name, size in sizes.items() if (match := _FILE.fullmatch(name))}


def _check_bytes(num_bytes: int, bounds: Bounds) -> None:
    if num_bytes > bounds.bytes:
        raise RequestError(f"the tasks would take {num_bytes} bytes; {bounds.bytes} are allowed: delete some", 413)
