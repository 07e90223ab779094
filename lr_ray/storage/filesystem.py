"""Files under a local path or a URI, committed atomically: a name is either absent or holds the whole content.

`s3://bucket/prefix` and what else fsspec knows (`gs://`, …) by fsspec, local paths and `file://` by the operating system.
Endpoint, region and credentials of S3 are those of the AWS environment and profile. botocore tries a request that is
throttled, refused, cut off or answered by a 5xx again, with backoff, AWS_MAX_ATTEMPTS (5) times in all; a body that does
not arrive whole is asked for again here.
"""

import errno
import io
import os
import random
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, TypeVar

import pyarrow as pa
from aiohttp import ClientError, ClientPayloadError
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec import AbstractFileSystem
from fsspec.registry import get_filesystem_class, known_implementations
from pyarrow import fs

from lr_ray.errors import StorageError

_ATTEMPTS = 5
_PATIENCE_S = 30.0
"""After this long no body is asked for again."""
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 5.0, 15.0
_READERS = 8
_S3 = ("s3://", "s3a://")
_SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "http", "https", "memory")
_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/")
"""How a URI begins, also one that lacks its second slash."""

_TORN = (
    ClientPayloadError,
    ResponseParserError,
    boto.FlexibleChecksumError,
    boto.IncompleteReadError,
    boto.ReadTimeoutError,
    boto.ResponseStreamingError,
)
"""A response that broke off or arrived damaged, once botocore has handed over its body."""
_FAILURES = (
    OSError,
    ValueError,
    NotImplementedError,
    boto.BotoCoreError,
    boto.ClientError,
    ClientError,
    ResponseParserError,
    pa.ArrowException,
)
_CONFLICT = "ConditionalRequestConflict"
"""S3's code for a name that another is writing or deleting at this moment."""
_TAKEN = ("PreconditionFailed", _CONFLICT)
"""S3's codes for a name that may be written only while it is free, and is not."""
_CREDENTIALS = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_REMEDIES: dict[type[Exception] | tuple[type[Exception], ...], str] = {
    PermissionError: f"check the rights on it and, for S3, the credentials ({_CREDENTIALS})",
    (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError, boto.ProfileNotFound): _CREDENTIALS,
    boto.NoRegionError: "set AWS_REGION",
    (boto.ConnectionError, boto.HTTPClientError): "check AWS_ENDPOINT_URL and the network, and run again",
    (ValueError, boto.ParamValidationError, NotImplementedError): "correct the URI (s3://bucket/prefix) or AWS_ENDPOINT_URL",
}

Item = TypeVar("Item")
Result = TypeVar("Result")


def absolute_path(path: str) -> str:
    """A local path made absolute; a URI, and an empty path, as it is."""
    return path if not path or _URI.match(path) else os.path.abspath(os.path.expanduser(path))


def join(root: str, *parts: str) -> str:
    """`root/part/…`, for a path as for a URI.

    Raises:
        StorageError: the root is empty, which would mean the root of all files.
    """
    if not root:
        raise StorageError("the path is empty; give a folder (. is the working directory) or a URI such as s3://bucket/prefix")
    return "/".join([root.rstrip("/"), *parts])


def read_bytes(uri: str) -> bytes:
    """The whole content.

    Raises:
        StorageError: absent or unreadable.
    """

    def read(store: AbstractFileSystem, path: str) -> bytes:
        content: bytes = store.cat_file(path)
        return content

    return _run("read", uri, read, lambda path: Path(path).read_bytes())


def read_if_there(uri: str) -> bytes | None:
    """The whole content, or None if the name is absent; one request where `exists` and `read_bytes` are two.

    Raises:
        StorageError: unreadable.
    """

    def read(store: AbstractFileSystem, path: str) -> bytes | None:
        with _absent_is_fine():
            content: bytes = store.cat_file(path)
            return content
        return None

    def read_local(path: str) -> bytes | None:
        try:
            return Path(path).read_bytes() if _local_size(path) is not None else None
        except FileNotFoundError:  # removed meanwhile
            return None

    return _run("read", uri, read, read_local)


def write_bytes(uri: str, content: bytes) -> None:
    """Commit the content under the name at once, replacing what was there.

    Raises:
        StorageError: not writable, or no space left; the name keeps what it had.
    """

    def write(store: AbstractFileSystem, path: str) -> None:
        store.pipe_file(path, content)  # one put, or an upload in parts that shows once it is complete

    _run("write", uri, write, lambda path: _write_local(path, content))


def _write_local(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = _beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _beside(path: str) -> str:
    """A free name in the same folder, hidden: what a killed writer leaves is no file of a Parquet data set."""
    folder, name = os.path.split(path)
    return f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"


def create_bytes(uri: str, content: bytes) -> bool:
    """Commit the content under the name at once if the name is free; of several writers, here or elsewhere, one succeeds.

    Returns:
        Whether the name holds that content now: False if it holds another's. A write that was answered by a torn response
        is asked for again and finds its own content, so that no two writers should write the same.

    Raises:
        StorageError: not writable, or no space left.
    """

    def create(store: AbstractFileSystem, path: str) -> bool:
        try:
            store.pipe_file(path, content, mode="create")
        except OSError as error:
            if not (isinstance(error, FileExistsError) or _code_of(error) in _TAKEN):
                raise
            with _absent_is_fine():
                return bool(store.cat_file(path) == content)
            if _code_of(error) == _CONFLICT:  # nobody has it: to be asked for again
                raise
            return False
        return True

    return _run("write", uri, create, lambda path: _create_local(path, content))


def _create_local(path: str, content: bytes) -> bool:
    temporary = _beside(path)
    try:
        _write_local(temporary, content)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        Path(temporary).unlink(missing_ok=True)
    return True


def check_exclusive(root: str) -> None:
    """Raise unless of two writers of a name there one is refused, without which changes would be lost unseen.

    Raises:
        StorageError: not so, as with S3 servers that pass over `If-None-Match`; or it cannot be written.
    """
    probe = join(root, f".probe-{uuid.uuid4().hex}")
    try:
        if not create_bytes(probe, b"1") or create_bytes(probe, b"2"):
            raise StorageError(
                f"{root}: its server does not keep a name to its first writer (If-None-Match), so that what another wrote "
                "would be lost; give another place"
            )
    finally:
        delete(probe)


def delete(uri: str) -> None:
    """Remove a file; one that is absent is no error.

    Raises:
        StorageError: it cannot be removed.
    """

    def remove(store: AbstractFileSystem, path: str) -> None:
        with _absent_is_fine():
            store.rm_file(path)

    _run("delete", uri, remove, lambda path: Path(path).unlink(missing_ok=True))


def delete_empty_folder(uri: str) -> None:
    """Remove a local folder that holds nothing; an object store has none.

    Raises:
        StorageError: it cannot be removed.
    """

    def remove(path: str) -> None:
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise

    _run("delete", uri, lambda _store, _path: None, remove)


def exists(uri: str) -> bool:
    """Whether a file of that name has been committed. To look up many, `list_uris` once."""
    return file_size(uri) is not None


def file_size(uri: str) -> int | None:
    """In bytes, or None if no file has that name; a folder, a pipe and a device are no files.

    Raises:
        StorageError: it cannot be looked up.
    """

    def size(store: AbstractFileSystem, path: str) -> int | None:
        with _absent_is_fine():
            info = store.info(path)
            return _known_size(info) if info["type"] == "file" else None
        return None

    return _run("look up", uri, size, _local_size)


def _known_size(info: dict[str, Any]) -> int:
    if info["size"] is None:
        raise OSError(f"its server does not say how large {info['name']} is; download it and give the local path")
    return int(info["size"])


def open_file(uri: str) -> BinaryIO:
    """The content, to be read at any place: a local file itself, others in memory; to be closed.

    Raises:
        StorageError: absent or unreadable.
    """
    with storage_errors("read", uri):
        path = _local_path(uri)
        return io.BytesIO(read_bytes(uri)) if path is None else open(path, "rb")


def list_files(uri: str, *, suffix: str) -> list[str]:
    """Names, relative to the folder and sorted, of all files below it that end in `suffix`; none if it is absent."""
    return [name for name in list_sizes(uri) if name.endswith(suffix)]


def list_sizes(uri: str) -> dict[str, int]:
    """Bytes of each file below the folder, by its name relative to it, in the order of names; none if it is absent.

    A folder that links lead to, too, is listed once: by its own name if it is below this one.

    Raises:
        StorageError: it, or a folder below it, cannot be listed.
    """

    def sizes(store: AbstractFileSystem, path: str) -> dict[str, int]:
        root = path.rstrip("/") + "/"
        found: dict[str, dict[str, Any]] = {}
        with _absent_is_fine() if not uri.startswith(_S3) else nullcontext():  # S3 lists what is absent as empty
            found = store.find(root, detail=True)
        files = sorted(file for file in found if file.startswith(root) and not file.endswith("/"))
        return {file.removeprefix(root): _known_size(found[file]) for file in files}

    return _run("list", uri, sizes, _local_sizes)


def list_marks(uri: str) -> dict[str, tuple[int, str]]:
    """As `list_sizes`, for millions of files; beside the bytes S3's ETag, elsewhere an empty string.

    S3 is listed by the page: `find` holds 1 to 10 kB of each file until all are there, this 260 bytes.
    """
    if not uri.startswith(_S3):
        return {name: (size, "") for name, size in list_sizes(uri).items()}
    marks: dict[str, tuple[int, str]] = {}
    after: dict[str, str] | None = {}
    with storage_errors("list", uri):
        while after is not None:
            found, after = _run_remote(uri, partial(_s3_page, after=after))
            marks |= found
    return dict(sorted(marks.items()))  # S3 Express has an order of its own


def _s3_page(
    store: AbstractFileSystem, path: str, *, after: dict[str, str]
) -> tuple[dict[str, tuple[int, str]], dict[str, str] | None]:
    """Some of the marks, and how to ask for the next; None after the last."""
    bucket, key, _ = store.split_path(path)
    prefix = key.rstrip("/") + "/" if key else ""
    page = store.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **after)
    files = (found for found in page.get("Contents", ()) if not found["Key"].endswith("/"))
    marks = {found["Key"].removeprefix(prefix): (found["Size"], found["ETag"]) for found in files}
    return marks, {"ContinuationToken": page["NextContinuationToken"]} if page["IsTruncated"] else None


def _local_sizes(root: str) -> dict[str, int]:
    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # removed meanwhile
            raise error

    sizes: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    start, own = root.rstrip("/") + "/", os.path.realpath(root)

    def leads_back(path: str) -> bool:
        return os.path.islink(path) and f"{os.path.realpath(path)}/".startswith(f"{own}/")

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse) if os.path.lexists(root) else ():
        if (identity := _identity(folder)) in seen or identity is None:
            folders.clear()
            continue
        seen.add(identity)
        below = folder.rstrip("/") + "/"
        folders[:] = sorted(name for name in folders if not leads_back(below + name))
        for name in names:
            if (size := _local_size(below + name)) is not None:
                sizes[(below + name).removeprefix(start)] = size
    return dict(sorted(sizes.items()))


def _identity(folder: str) -> tuple[int, int] | None:
    """The same for every link to a folder; None if it is gone."""
    try:
        info = os.stat(folder)
    except FileNotFoundError:
        return None
    return info.st_dev, info.st_ino


def _local_size(path: str) -> int | None:
    """Asked for once, since what a writer renames is gone between two questions."""
    try:
        info = os.stat(path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
    return info.st_size if stat.S_ISREG(info.st_mode) else None


def list_uris(root: str, *, suffix: str) -> set[str]:
    """The URIs of all files below `root` that end in `suffix`."""
    return {join(root, name) for name in list_files(root, suffix=suffix)}


def read_many(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """What a function that reads makes of each item; several at once, since an object store lets each of them wait."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(function, items))


def arrow_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem and the path in it, for libraries that read and write by pyarrow.

    Raises:
        StorageError: no such scheme.
    """
    with storage_errors("use", uri):
        if (path := _local_path(uri)) is not None:
            return fs.LocalFileSystem(), path
        # each read asks for what it wants; s3fs would fetch 50 MB ahead, and row groups are read in a random order
        store, path = _open_store(uri, default_cache_type="none")
        return fs.PyFileSystem(_ObjectStore(store) if uri.startswith(_S3) else fs.FSSpecHandler(store)), path


class _ObjectStore(fs.FSSpecHandler):  # type: ignore[misc]
    """S3 for libraries that make and remove folders, by no rights beyond those on the objects below a prefix."""

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing, for there are no folders; s3fs would make the bucket if it may not look whether it is there."""

    def delete_dir(self, path: str) -> None:
        """One by one, which every S3 server takes, and fails where one is not deleted."""
        for file in self.fs.find(path):
            self.fs.rm_file(file)


@contextmanager
def storage_errors(verb: str, uri: str) -> Iterator[None]:
    """What goes wrong inside becomes a StorageError that names the URI and what to do."""
    try:
        yield
    except _FAILURES as error:
        raise StorageError(f"cannot {verb} {uri or repr(uri)}: {_explain(error, uri)}") from error


def _explain(error: Exception, uri: str) -> str:
    """What went wrong, and the remedy."""
    if _no_bucket(error):
        return f"there is no bucket {uri.split('/')[2]!r}; create it or correct the URI"
    if _names_credentials(error) and uri.startswith(_S3):
        return f"{error.strerror}: {error.filename}; correct the AWS variables, one of which names that file"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    remedies = [remedy for kinds, remedy in _REMEDIES.items() if isinstance(error, kinds)]
    return f"{reason.rstrip('.')}; {(remedies or ['nothing was changed: mend that and run again'])[0]}"


def _no_bucket(error: Exception) -> bool:
    return _code_of(error) == "NoSuchBucket"


def _code_of(error: Exception) -> str:
    """As S3 calls what went wrong; empty where it was not S3 that answered."""
    response: dict[str, Any] = getattr(error.__cause__, "response", {})
    return str(response.get("Error", {}).get("Code", ""))


def _names_credentials(error: Exception) -> TypeGuard[FileNotFoundError]:
    """Whether it is a local file that is absent, such as one of a token, where an object was asked for."""
    return isinstance(error, FileNotFoundError) and error.filename is not None


@contextmanager
def _absent_is_fine() -> Iterator[None]:
    """Leave the context where an object is absent; that its bucket is, or a file of credentials, stays an error."""
    try:
        yield
    except FileNotFoundError as error:
        if _no_bucket(error) or _names_credentials(error):
            raise


def _run(verb: str, uri: str, remote: Callable[[AbstractFileSystem, str], Result], local: Callable[[str], Result]) -> Result:
    """The one or the other action on the URI's path."""
    with storage_errors(verb, uri):
        return _run_remote(uri, remote) if (path := _local_path(uri)) is None else local(path)


def _run_remote(uri: str, action: Callable[[AbstractFileSystem, str], Result]) -> Result:
    """The action; asked for again after a response that broke off or a conflict, once after a want of credentials.

    Raises:
        OSError: an error of gcsfs or another library than s3fs, which have no base in common.
    """
    store, path = _open_store(uri, max_concurrency=1)
    store.retries = 1  # of s3fs: they would multiply botocore's
    start = time.monotonic()
    for attempt in range(_ATTEMPTS):
        try:
            return action(store, path)
        except boto.NoCredentialsError:  # a machine's role is asked for by a request that may time out, and s3fs keeps "none"
            if attempt:
                raise
            store.connect(refresh=True)
        except (*_FAILURES, StorageError) as error:
            passes = isinstance(error, _TORN) or _code_of(error) == _CONFLICT
            if not passes or attempt == _ATTEMPTS - 1 or time.monotonic() - start > _PATIENCE_S:
                raise
            time.sleep(random.uniform(0, 0.2 * 2**attempt))
        except Exception as error:
            if uri.startswith(_S3):
                raise
            raise OSError(f"{type(error).__name__}: {error}") from error
    raise AssertionError("the last attempt returns or raises")


def _local_path(uri: str) -> str | None:
    """The absolute path that a path or `file://` URI means; None for other URIs."""
    scheme, separator, path = uri.partition("://")
    if not separator:
        if not uri:
            raise ValueError("the path is empty")
        if found := _URI.match(uri):
            raise ValueError(f"a URI has two slashes, {found['scheme']}://")
        return os.path.abspath(os.path.expanduser(uri))
    if scheme != "file":
        return None
    if not path.startswith("/"):
        raise ValueError(f"file:// needs an absolute path, such as file:///data, not {path!r}")
    return os.path.abspath(path)


def _open_store(uri: str, **s3_options: Any) -> tuple[AbstractFileSystem, str]:
    """fsspec's filesystem, which it keeps for later calls with the same options, and the path in it.

    Not by `url_to_fs`, to which `::` in a name chains two URLs.
    """
    scheme, _, path = uri.partition("://")
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in ("file", *_SCHEMES))
        raise ValueError(f"unknown scheme {scheme}:// (known: {known})")
    if not path.strip("/") or path.startswith("/"):
        raise ValueError(f"{scheme}:// needs the name of a bucket")
    if uri.startswith(_S3):
        retries = {"mode": "standard", "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", _ATTEMPTS))}
        timeouts = {"connect_timeout": _CONNECT_TIMEOUT_S, "read_timeout": _READ_TIMEOUT_S}
        s3_options["config_kwargs"] = {"retries": retries, **timeouts}
        if region := os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION"):  # botocore knows the first alone
            s3_options["client_kwargs"] = {"region_name": region}
    else:
        s3_options = {}
    try:
        kind = get_filesystem_class(scheme)
        store = kind(**kind._get_kwargs_from_urls(uri), use_listings_cache=False, **s3_options)
    except ImportError as error:
        package = known_implementations[scheme]["class"].partition(".")[0]
        raise StorageError(
            f"cannot use {uri}: {scheme}:// needs a package that is not installed ({error}); `pip install {package}`"
        ) from error
    return store, str(kind._strip_protocol(uri))
