"""API keys: 256 random bits, of which a file keeps the SHA-256; and how much each of them may ask for."""

import hashlib
import hmac
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock
from pydantic import Field, TypeAdapter, ValidationError

from lr_ray.errors import ConfigError, RequestError
from lr_ray.section import Section
from lr_ray.serving.limits import MIB, OWNER, Bounds

_PREFIX = "lrray_"


class Key(Section):
    """A key as the file keeps it.

    Nobody guesses 256 random bits, so that a fast hash hides them as well as a slow one would.
    """

    name: str = Field(pattern=f"^{OWNER.pattern}$")
    """Whose tasks it opens: a key of the same name, made after this one was removed, opens them too."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the key as it was shown."""
    requests_per_minute: int = Field(default=600, gt=0)
    """Also how many may come at once."""
    bytes_per_minute: int = Field(default=256 * MIB, gt=0)
    """Of request bodies; also how many may come at once."""
    tasks: int = Field(default=100, ge=0)
    """Kept at once."""
    task_bytes: int = Field(default=256 * MIB, ge=0)
    """Of all tasks kept at once."""


_KEYS = TypeAdapter(list[Key])


def add_key(path: Path, name: str, **limits: int) -> str:
    """Make a key and keep its hash in the file; returns the key, which is nowhere else.

    Args:
        limits: those of `Key` that differ from its defaults.

    Raises:
        ConfigError: a name that cannot be, or is taken; a limit that cannot be; a damaged or unwritable file.
    """
    if not OWNER.fullmatch(name):
        raise ConfigError(f"key name {name!r}: give 1 to 63 of a-z, 0-9, _ and -, the first a letter or digit")
    secret = _PREFIX + secrets.token_urlsafe(32)
    try:
        key = Key.model_validate({"name": name, "sha256": _hash(secret), **limits})
    except ValidationError as error:
        raise ConfigError(f"key {name!r}: {_first(error)}") from error
    with _changing(path):
        keys = read_keys(path) if path.exists() else []
        if name in [other.name for other in keys]:
            raise ConfigError(
                f"key {name!r} is in {path} already; remove it first (`lr-ray serve key rm {name}`), or choose another"
            )
        _write_keys(path, [*keys, key])
    return secret


def remove_key(path: Path, name: str) -> None:
    """Remove a key; a service that runs refuses it at once. The tasks stay.

    Raises:
        ConfigError: no such key; a damaged, absent or unwritable file.
    """
    read_keys(path)  # makes no folder for a file that is not there
    with _changing(path):
        keys = read_keys(path)
        if name not in (names := [key.name for key in keys]):
            raise ConfigError(f"key {name!r} is not in {path}; it holds {', '.join(names) or 'none'}")
        _write_keys(path, [key for key in keys if key.name != name])


def read_keys(path: Path) -> list[Key]:
    """What the file holds.

    Raises:
        ConfigError: absent, unreadable, or damaged.
    """
    try:
        keys = _KEYS.validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"keys {path}: {error.strerror}; `lr-ray serve key add NAME` makes one") from error
    except ValidationError as error:
        raise ConfigError(f"keys {path}: {_first(error)}; correct it, or delete it and make new keys") from error
    if len({key.name for key in keys}) < len(keys):
        raise ConfigError(f"keys {path}: two keys have the same name; remove one")
    return keys


def find_key(keys: Sequence[Key], secret: str) -> Key | None:
    """The key that was shown as `secret`; all are compared, each in constant time."""
    wanted = _hash(secret)
    matches = [key for key in keys if hmac.compare_digest(key.sha256, wanted)]
    return matches[0] if matches else None


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, without the value."""
    wrong = error.errors(include_input=False, include_url=False)[0]
    return f"{'.'.join(map(str, wrong['loc'])) or 'the file'}: {wrong['msg']}"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Alone: of two commands at once neither undoes what the other does."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f"{path.name}.lock"))
        lock.acquire()
    except OSError as error:
        raise ConfigError(f"keys {path}: {error.strerror}; choose another file with --keys") from error
    try:
        yield
    finally:
        lock.release()


def _write_keys(path: Path, keys: Sequence[Key]) -> None:
    """At once, readable by its owner alone."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w") as file:
            file.write(json.dumps([key.model_dump() for key in keys], indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"keys {path}: {error.strerror}; choose another file with --keys") from error
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(kw_only=True)
class Bucket:
    """Tokens that come back at an even rate, up to a minute's.

    Attributes:
        per_minute: tokens.
        level: tokens there at `time_s`.
    """

    per_minute: int
    level: float
    time_s: float

    def take(self, tokens: int, now_s: float) -> int | None:
        """Take them if they are there: None; else the whole seconds until they are, at least 1."""
        self.level = min(self.per_minute, self.level + (now_s - self.time_s) * self.per_minute / 60)
        self.time_s = now_s
        if tokens <= self.level:
            self.level -= tokens
            return None
        return max(1, -int(-(tokens - self.level) * 60 // self.per_minute))


@dataclass(kw_only=True)
class Keyring:
    """The keys of a file, read again when it changes, and what is left of their limits in this process.

    Attributes:
        path: of the file.
        clock: seconds that never go back.
    """

    path: Path
    clock: Callable[[], float] = time.monotonic
    _keys: list[Key] = field(default_factory=list)
    _stamp: tuple[int, int, int] | None = None
    _buckets: dict[tuple[str, str], Bucket] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def identify(self, secret: str | None) -> Key:
        """Whose request it is.

        Raises:
            ConfigError: the file is gone or damaged.
            RequestError: 401 no key, or none that is known.
        """
        with self._lock:
            self._reload()
            key = find_key(self._keys, secret) if secret else None
        if key is None:
            raise RequestError("no valid API key; send the header Authorization: Bearer KEY", 401)
        return key

    def charge(self, key: Key, *, requests: int = 0, num_bytes: int = 0) -> None:
        """Count a request, or bytes of one.

        Raises:
            RequestError: 413 more bytes than the key may ever send at once; 429 too many for now.
        """
        if num_bytes > key.bytes_per_minute:
            raise RequestError(f"{num_bytes} bytes; this key may send {key.bytes_per_minute} a minute", 413)
        with self._lock:
            for kind, tokens, rate in (
                ("requests", requests, key.requests_per_minute),
                ("bytes", num_bytes, key.bytes_per_minute),
            ):
                bucket = self._buckets.get((key.sha256, kind))
                if bucket is None or bucket.per_minute != rate:
                    bucket = Bucket(per_minute=rate, level=rate, time_s=self.clock())
                    self._buckets[key.sha256, kind] = bucket
                if tokens and (wait_s := bucket.take(tokens, self.clock())) is not None:
                    raise RequestError(f"this key may send {rate} {kind} a minute; come again in {wait_s} s", 429, wait_s)

    def _reload(self) -> None:
        try:
            info = self.path.stat()
        except OSError as error:
            raise ConfigError(f"keys {self.path}: {error.strerror}; put it back") from error
        stamp = (info.st_ino, info.st_mtime_ns, info.st_size)
        if stamp != self._stamp:
            self._keys, self._stamp = read_keys(self.path), stamp


def bounds_of(key: Key) -> Bounds:
    """How much its owner may keep."""
    return Bounds(tasks=key.tasks, bytes=key.task_bytes)
