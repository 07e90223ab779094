"""Files on S3, over a network that fails: the right content or one line that says what is wrong."""

import pickle
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import repeat
from typing import Any

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.retries.standard import ExponentialBackoff
from fsspec import get_filesystem_class

from lr_ray.errors import StorageError
from lr_ray.storage import filesystem
from lr_ray.storage.filesystem import (
    arrow_filesystem,
    create_bytes,
    delete,
    exists,
    file_size,
    list_files,
    list_marks,
    list_uris,
    read_bytes,
    read_if_there,
    write_bytes,
)
from tests.s3 import FAULTS, Fault, FaultyProxy

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts; their number stays."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.01)


@pytest.fixture
def unconnected() -> Iterator[None]:
    """No client that was made in another environment, before and after."""
    get_filesystem_class("s3").clear_instance_cache()
    yield
    get_filesystem_class("s3").clear_instance_cache()


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def actions(root: str) -> dict[str, Callable[[], Any]]:
    """Everything that can be done to one file, `root`/a/b.bin."""
    uri = f"{root}/a/b.bin"
    return {
        "read": lambda: read_bytes(uri),
        "write": lambda: write_bytes(uri, CONTENT),
        "look up": lambda: exists(uri),
        "list": lambda: list_files(root, suffix=".bin"),
        "delete": lambda: delete(uri),
    }


ACTIONS = tuple(actions("s3://bucket"))


def test_what_is_written_is_there(bucket: str) -> None:
    uri = f"{bucket}/deep/er/a.bin"
    assert not exists(uri)
    assert read_if_there(uri) is None
    write_bytes(uri, b"a long content")
    write_bytes(uri, b"one\0")
    assert exists(uri)
    assert read_bytes(uri) == read_if_there(uri) == b"one\0"
    assert not exists(f"{bucket}/deep")
    delete(uri)
    delete(uri)
    assert not exists(uri)


def test_what_another_process_writes_is_seen(bucket: str) -> None:
    assert list_files(bucket, suffix="") == []
    boto3.client("s3").put_object(Bucket=bucket[5:], Key="a.bin", Body=b"one")
    assert list_files(bucket, suffix="") == ["a.bin"]
    assert read_bytes(f"{bucket}/a.bin") == b"one"


def test_marks_come_by_the_page_and_differ_with_the_content(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = get_filesystem_class("s3")
    call = store.call_s3
    monkeypatch.setattr(store, "call_s3", lambda self, *words, **options: call(self, *words, **options, MaxKeys=2))
    for name in ("a/z.png", "a.png", "a/b/ü+ %.png", "a/folder/", "ab.png", "a/y.png"):
        boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key=f"q/{name}", Body=name.encode())

    marks = list_marks(f"{bucket}/q")

    assert [(name, size) for name, (size, _) in marks.items()] == [
        (name, len(name.encode())) for name in ("a.png", "a/b/ü+ %.png", "a/y.png", "a/z.png", "ab.png")
    ]
    assert list_marks(f"{bucket}/q/a/").keys() == {"b/ü+ %.png", "y.png", "z.png"}
    assert list_marks(bucket).keys() == {f"q/{name}" for name in marks}
    assert list_marks(f"{bucket}/absent") == {}
    write_bytes(f"{bucket}/q/ab.png", b"AB.png")
    changed = list_marks(f"{bucket}/q")
    assert {name for name in marks if marks[name] != changed[name]} == {"ab.png"}
    with pytest.raises(StorageError, match="cannot list s3://absent-bucket: there is no bucket 'absent-bucket'"):
        list_marks("s3://absent-bucket")


def test_names_are_no_urls_of_urls(bucket: str) -> None:
    for name in ("a::b.png", "file::x://y"):
        write_bytes(f"{bucket}/q/{name}", name.encode())
        assert read_bytes(f"{bucket}/q/{name}") == name.encode()
    assert list_marks(f"{bucket}/q").keys() == {"a::b.png", "file::x://y"}


def test_list_files_is_recursive_sorted_and_relative(bucket: str) -> None:
    for name in ("b.json", "a/z.json", "a/b/c.json", "a/x.txt", "json", "folder/", "ab/c.json"):
        boto3.client("s3").put_object(Bucket=bucket[5:], Key=f"run/{name}", Body=b"")
    assert list_files(f"{bucket}/run", suffix=".json") == ["a/b/c.json", "a/z.json", "ab/c.json", "b.json"]
    assert list_files(f"{bucket}/run/", suffix=".txt") == ["a/x.txt"]
    assert list_files(f"{bucket}/run/a", suffix="") == ["b/c.json", "x.txt", "z.json"]
    assert list_files(f"{bucket}/run/b.json", suffix="") == list_files(f"{bucket}/absent", suffix="") == []
    assert list_uris(f"{bucket}/run/a/", suffix=".txt") == {f"{bucket}/run/a/x.txt"}


def test_a_long_listing_is_whole(bucket: str, s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes in pages, on S3 of 1,000 names."""
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "10")
    for index in range(12):
        write_bytes(f"{bucket}/{index:02d}", b"")
    s3.set_faults([None, "slow down"])
    assert list_files(bucket, suffix="") == [f"{index:02d}" for index in range(12)]
    assert len(s3.requests) == 3


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("action", ACTIONS)
def test_a_fault_that_passes_changes_nothing(bucket: str, s3: FaultyProxy, action: str, fault: Fault) -> None:
    if action != "write":
        write_bytes(f"{bucket}/a/b.bin", CONTENT)
    s3.set_faults([fault, fault])
    result = actions(bucket)[action]()
    s3.set_faults(())
    expected = {"read": CONTENT, "write": None, "look up": True, "list": ["a/b.bin"], "delete": None}
    assert result == expected[action]
    assert read_if_there(f"{bucket}/a/b.bin") == (None if action == "delete" else CONTENT)


@pytest.mark.parametrize("fault", ["slow down", "reset", "truncated"])
def test_requests_are_needed_once(bucket: str, s3: FaultyProxy, fault: Fault) -> None:
    """No layer repeats what another repeats: two faults are two requests more."""
    write_bytes(f"{bucket}/a/b.bin", CONTENT)
    s3.set_faults([fault, fault])
    read_bytes(f"{bucket}/a/b.bin")
    assert len(s3.requests) == 3


@pytest.mark.parametrize(
    ("action", "fault"),
    [(action, fault) for action in ("read", "write") for fault in ("slow down", "server error", "reset")]
    + [("read", "truncated"), ("read", "damaged")],
)
def test_a_fault_that_stays_is_an_error(bucket: str, s3: FaultyProxy, action: str, fault: Fault) -> None:
    uri = f"{bucket}/a/b.bin"
    write_bytes(uri, b"old")
    s3.set_faults(repeat(fault))
    with pytest.raises(StorageError, match=f"^cannot {action} {uri}: .+; "):
        actions(bucket)[action]()
    assert len(s3.requests) == 5 or (fault == "reset" and len(s3.requests) <= 10)  # aiohttp tries a reset one again itself
    s3.set_faults(())
    assert read_bytes(uri) == b"old"
    assert list_files(bucket, suffix="") == ["a/b.bin"]


@pytest.mark.parametrize("action", ACTIONS)
def test_a_server_that_never_answers(bucket: str, s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    monkeypatch.setattr(filesystem, "_READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(filesystem, "_PATIENCE_S", 0.0)
    s3.set_faults(repeat("stall"))
    with pytest.raises(StorageError, match=rf"cannot {action} .*Read timeout.*check AWS_ENDPOINT_URL and the network"):
        actions(bucket)[action]()
    assert len(s3.requests) == 5


def test_the_number_of_attempts_is_of_the_environment(bucket: str, s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    s3.set_faults(repeat("server error"))
    with pytest.raises(StorageError):
        write_bytes(f"{bucket}/a", b"")
    assert len(s3.requests) == 2


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "damaged"])
def test_pyarrow_reads_and_writes_by_the_same_way(bucket: str, s3: FaultyProxy, fault: Fault) -> None:
    """Without checksums of parts of a file: a body that was changed on the way is not noticed there."""
    store, path = arrow_filesystem(f"{bucket}/checkpoint")
    s3.set_faults([fault, None, fault])
    with store.open_output_stream(f"{path}/state.bin") as stream:
        stream.write(CONTENT)
    s3.set_faults([None, fault, fault])
    with store.open_input_stream(f"{path}/state.bin") as stream:
        assert stream.read() == CONTENT


def test_pyarrow_needs_no_rights_on_the_bucket(bucket: str, s3: FaultyProxy) -> None:
    """s3fs would look for the bucket to make a folder, and make it if it may not look; and delete by a request of many."""
    store, path = arrow_filesystem(f"{bucket}/checkpoint")
    s3.set_faults(())
    store.create_dir(f"{path}/a/b", recursive=True)
    assert s3.requests == []
    for name in ("a/1", "a/b/2", "ab"):
        write_bytes(f"{bucket}/checkpoint/{name}", b"x")
    s3.set_faults(())
    pickle.loads(pickle.dumps(store)).delete_dir(f"{path}/a")
    assert [request.partition(" ")[0] for request in s3.requests if not request.startswith("GET")] == ["DELETE", "DELETE"]
    assert list_files(f"{bucket}/checkpoint", suffix="") == ["ab"]


def test_a_row_group_is_all_that_is_read_of_a_file(bucket: str, s3: FaultyProxy) -> None:
    table = pa.table({"x": np.random.default_rng(0).random(400_000)})
    store, path = arrow_filesystem(f"{bucket}/a.parquet")
    pq.write_table(table, path, filesystem=store, row_group_size=100_000, compression="none", use_dictionary=False)
    size = file_size(f"{bucket}/a.parquet")
    assert size is not None
    s3.set_faults(())
    with pq.ParquetFile(path, filesystem=store) as file:
        assert file.read_row_group(2).num_rows == 100_000
    assert s3.sent < 0.4 * size


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize("action", ACTIONS)
def test_a_missing_token_file_is_no_missing_object(bucket: str, monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/nonexistent/token")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/x")
    with pytest.raises(StorageError, match=r"No such file or directory: /nonexistent/token; correct the AWS variables"):
        actions(bucket)[action]()


@pytest.mark.usefixtures("unconnected")
def test_credentials_that_were_not_to_be_had_are_asked_for_again(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            without.delenv(name)
        without.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
        with pytest.raises(StorageError, match="Unable to locate credentials"):
            write_bytes(f"{bucket}/a", b"x")
    write_bytes(f"{bucket}/a", b"x")
    assert read_bytes(f"{bucket}/a") == b"x"


@pytest.mark.usefixtures("unconnected")
def test_the_region_by_either_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "cn-north-1")
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    store, _ = filesystem._open_store("s3://bucket/a")
    store.connect()
    assert store.s3.meta.region_name == "cn-north-1"


@pytest.mark.parametrize("action", ACTIONS)
def test_a_bucket_that_does_not_exist(bucket: str, action: str) -> None:
    with pytest.raises(StorageError, match=f"cannot {action} {bucket}x.*: there is no bucket '{bucket[5:]}x'; create it"):
        actions(f"{bucket}x")[action]()


@pytest.mark.parametrize("action", ACTIONS)
def test_a_bucket_without_rights(bucket: str, s3: FaultyProxy, action: str) -> None:
    s3.set_faults(repeat("forbidden"))
    with pytest.raises(StorageError, match=rf"cannot {action} .*: (Access Denied|Forbidden); check the rights .*AWS_PROFILE"):
        actions(bucket)[action]()
    assert len(s3.requests) == 1


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "Unable to locate credentials; set AWS_PROFILE, or"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "Partial credentials found .*; set AWS_PROFILE, or"),
        ({"AWS_PROFILE": "absent"}, r"The config profile \(absent\) could not be found; set AWS_PROFILE, or"),
        ({"AWS_ENDPOINT_URL": "nonsense"}, "Invalid endpoint: nonsense; correct .* AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:{}"}, "Could not connect to the endpoint URL: .*; check AWS_ENDPOINT_URL"),
        ({"AWS_ENDPOINT_URL": "http://name.invalid"}, "Could not connect to the endpoint URL: .*; check AWS_ENDPOINT_URL"),
    ],
)
@pytest.mark.parametrize("action", ["list", "write"])
def test_an_environment_that_is_not_right(
    s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch, action: str, variables: dict[str, str | None], message: str
) -> None:
    for name, value in ({"AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_CONFIG_FILE": "/dev/null"} | variables).items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value.format(free_port()))
    with pytest.raises(StorageError, match=f"^cannot {action} s3://some-bucket.*: {message}") as caught:
        actions("s3://some-bucket")[action]()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("s3://", "s3:// needs the name of a bucket"),
        ("s3:///prefix", "s3:// needs the name of a bucket"),
        ("s3://Not A Bucket!/prefix", "Invalid bucket name"),
        ("gs://bucket", "`pip install gcsfs`"),
        ("gopher://host", "unknown scheme gopher:// .*; correct the URI"),
        ("file://relative", "file:// needs an absolute path"),
    ],
)
@pytest.mark.parametrize("action", ["read", "write", "look up", "delete"])
@pytest.mark.usefixtures("s3")
def test_a_uri_that_is_not_right(root: str, message: str, action: str) -> None:
    uri = root if root == "s3://" else f"{root}/a"
    calls = {"read": read_bytes, "write": lambda uri: write_bytes(uri, b""), "look up": exists, "delete": delete}
    with pytest.raises(StorageError, match=message):
        calls[action](uri)


def test_of_many_writers_of_a_free_name_one_succeeds(bucket: str):
    uri = f"{bucket}/a/b.bin"
    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(lambda i: create_bytes(uri, bytes([i])), range(8)))
    assert won.count(True) == 1
    assert read_bytes(uri) == bytes([won.index(True)])


def test_a_conflict_over_a_name_that_stays_free_is_no_loss(s3: FaultyProxy, bucket: str):
    """409: another was about to write it, or to delete it, and the name is free."""
    s3.set_faults(["conflict", None])
    assert create_bytes(f"{bucket}/a.bin", CONTENT)
    s3.set_faults(["conflict"])
    assert not create_bytes(f"{bucket}/a.bin", b"another")
    s3.set_faults(["conflict", None] * 5)
    with pytest.raises(StorageError, match="A conflicting operation"):
        create_bytes(f"{bucket}/b.bin", CONTENT)
    assert not exists(f"{bucket}/b.bin")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_name_is_created_over_a_network_that_fails(s3: FaultyProxy, bucket: str, fault: Fault):
    """Also where the answer to the first attempt is lost: the second finds its own content."""
    s3.set_faults([fault])
    assert create_bytes(f"{bucket}/a.bin", CONTENT)
    s3.set_faults(())
    assert not create_bytes(f"{bucket}/a.bin", CONTENT[1:])
    assert read_bytes(f"{bucket}/a.bin") == CONTENT
