"""Keys: shown once, hashed at rest, refused at once when removed; and what each may ask for."""

import json
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from lr_ray.errors import ConfigError, RequestError
from lr_ray.serving import keys as keys_module
from lr_ray.serving.keys import Bucket, Key, Keyring, add_key, bounds_of, find_key, read_keys, remove_key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "below" / "keys.json"


def test_the_file_holds_the_hash_and_not_the_key(path: Path):
    secret = add_key(path, "ann", tasks=3)
    content = path.read_text()
    assert secret not in content
    assert secret.removeprefix("lrray_") not in content
    (found,) = read_keys(path)
    assert (found.name, found.tasks, found.requests_per_minute) == ("ann", 3, 600)
    assert find_key([found], secret) == found
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {file.name for file in path.parent.iterdir()} == {"keys.json", "keys.json.lock"}


def test_keys_differ_and_are_long(path: Path):
    secrets = [add_key(path, name) for name in ("a", "b", "c")]
    assert len(set(secrets)) == 3
    assert all(len(secret) == len("lrray_") + 43 for secret in secrets)
    keys = read_keys(path)
    assert [found.name for secret in secrets if (found := find_key(keys, secret))] == ["a", "b", "c"]


def test_of_two_commands_at_once_neither_undoes_the_other(path: Path, monkeypatch: pytest.MonkeyPatch):
    """The removal of a key that leaked waits for the one that adds another."""
    add_key(path, "leaked")
    real, removing = keys_module._write_keys, threading.Thread(target=remove_key, args=(path, "leaked"))

    def remove_meanwhile(*arguments: Any) -> None:
        if not removing.is_alive():
            removing.start()
            removing.join(0.2)  # without a lock it is done by now, and undone below
            monkeypatch.setattr(keys_module, "_write_keys", real)
        real(*arguments)

    monkeypatch.setattr(keys_module, "_write_keys", remove_meanwhile)
    add_key(path, "new")
    removing.join()
    assert [key.name for key in read_keys(path)] == ["new"]


@pytest.mark.parametrize("wrong", ["", "x", "lrray_", "Ü", "\ud800", "a" * 10_000])
def test_what_is_no_key_opens_nothing(path: Path, wrong: str):
    secret = add_key(path, "ann")
    keys = read_keys(path)
    assert find_key(keys, wrong) is None
    assert find_key(keys, secret[:-1]) is None
    assert find_key(keys, keys[0].sha256) is None


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "A", "-a", "a" * 64, "a b", "ä", "a\n"])
def test_names_that_cannot_be(path: Path, name: str):
    with pytest.raises(ConfigError, match="key name"):
        add_key(path, name)
    assert not path.exists()


def test_a_taken_name_a_limit_that_cannot_be_and_an_unknown_one(path: Path):
    add_key(path, "ann")
    with pytest.raises(ConfigError, match="already; remove it first"):
        add_key(path, "ann")
    with pytest.raises(ConfigError, match="requests_per_minute: Input should be greater than 0"):
        add_key(path, "bob", requests_per_minute=0)
    with pytest.raises(ConfigError, match="'bob' is not in .*; it holds ann"):
        remove_key(path, "bob")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"name": "a"}]', '[{"name": "../a", "sha256": "%s"}]' % ("0" * 64)])
def test_a_damaged_file_is_one_line_without_its_content(path: Path, content: str):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ConfigError, match="correct it, or delete it") as caught:
        read_keys(path)
    assert "0" * 64 not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_keys(path.with_name("missing"))


def test_a_name_twice(path: Path):
    add_key(path, "ann")
    path.write_text(json.dumps(json.loads(path.read_text()) * 2))
    with pytest.raises(ConfigError, match="two keys have the same name"):
        read_keys(path)


def test_a_running_service_sees_keys_come_and_go(path: Path):
    ring, first = Keyring(path=path), add_key(path, "ann")
    assert ring.identify(first).name == "ann"
    second = add_key(path, "bob")
    assert ring.identify(second).name == "bob"
    remove_key(path, "ann")
    for secret in (first, None, ""):
        with pytest.raises(RequestError) as caught:
            ring.identify(secret)
        assert caught.value.status == 401
    path.unlink()
    with pytest.raises(ConfigError, match="put it back"):
        ring.identify(second)


def test_a_bucket_by_hand():
    """60 a minute: one a second, at most 60."""
    bucket = Bucket(per_minute=60, level=60, time_s=0)
    assert bucket.take(58, 0) is None
    assert bucket.take(3, 0) == 1
    assert bucket.take(10, 0) == 8
    assert bucket.take(3, 1) is None
    assert bucket.take(61, 1000) == 1
    assert bucket.take(60, 1000) is None
    assert bucket.take(1, 1000.5) == 1


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def key(**limits: int) -> Key:
    return Key.model_validate({"name": "a", "sha256": "0" * 64, **limits})


def test_limits_of_a_key(tmp_path: Path):
    clock = Clock()
    ring = Keyring(path=tmp_path / "keys", clock=clock)
    mine = key(requests_per_minute=2, bytes_per_minute=100)
    other = mine.model_copy(update={"sha256": "1" * 64})
    for _ in range(2):
        ring.charge(mine, requests=1)
    with pytest.raises(RequestError) as caught:
        ring.charge(mine, requests=1)
    assert (caught.value.status, caught.value.retry_after_s) == (429, 30)
    ring.charge(other, requests=1)
    clock.now = 30
    ring.charge(mine, requests=1)
    ring.charge(mine, num_bytes=90)
    with pytest.raises(RequestError) as caught:
        ring.charge(mine, num_bytes=20)
    assert (caught.value.status, caught.value.retry_after_s) == (429, 6)
    with pytest.raises(RequestError) as caught:
        ring.charge(mine, num_bytes=101)
    assert caught.value.status == 413


def test_bounds_of_a_key():
    bounds = bounds_of(key(tasks=7, task_bytes=9))
    assert (bounds.tasks, bounds.bytes) == (7, 9)
