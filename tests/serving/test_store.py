"""Tasks that stay: owners, bounds, restarts, and races of which one writer wins."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lr_ray.errors import RequestError, StorageError
from lr_ray.serving import store as store_module
from lr_ray.serving.limits import Bounds
from lr_ray.serving.store import TaskStore
from lr_ray.serving.tasks import Support
from lr_ray.storage.filesystem import list_files, list_sizes

BOUNDS = Bounds()


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def support(*names: str, seed: int = 0) -> Support:
    generator = torch.Generator().manual_seed(seed)
    return Support.of(torch.randn(len(names), 4, generator=generator), names)


@pytest.fixture
def store(tmp_path: Path) -> TaskStore:
    return TaskStore(root=str(tmp_path / "tasks"), models=["m"], clock=Clock())


def again(store: TaskStore, **changes: object) -> TaskStore:
    """Another process over the same root."""
    return TaskStore(**{"root": store.root, "models": store.models, "clock": store.clock} | changes)  # type: ignore[arg-type]


def status_of(call: Callable[[], object]) -> int:
    with pytest.raises(RequestError) as caught:
        call()
    return caught.value.status


def test_a_task_survives_a_restart(store: TaskStore):
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    back = again(store).read("ann", task.task_id, BOUNDS)
    assert torch.equal(back.support.sums, task.support.sums)
    assert (back.version, back.support.class_names) == (1, ("a", "b"))
    assert [found.task_id for found in again(store).list("ann", BOUNDS)] == [task.task_id]


def test_ids_are_random_and_path_safe(store: TaskStore):
    ids = [store.create("ann", support("a", "b"), BOUNDS, model="m").task_id for _ in range(20)]
    assert len(set(ids)) == 20
    assert all(re.fullmatch(r"[0-9a-f]{8}[A-Za-z0-9_-]{22}", task_id) for task_id in ids)


def test_owners_do_not_see_each_other(store: TaskStore):
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    assert store.list("bob", BOUNDS) == []
    for call in (
        lambda: store.read("bob", task.task_id, BOUNDS),
        lambda: store.delete("bob", task.task_id, BOUNDS),
        lambda: store.update("bob", task.task_id, lambda s: s, BOUNDS),
    ):
        assert status_of(call) == 404
    assert store.read("ann", task.task_id, BOUNDS).version == 1


@pytest.mark.parametrize(
    "task_id",
    ["", ".", "..", "../ann", "a/b", "/etc/passwd", "0" * 29, "0" * 31, "0" * 29 + "/", "0" * 29 + "\n", "ü" * 30, "\0"],
)
def test_what_is_no_id_is_404_and_touches_nothing(store: TaskStore, task_id: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lr_ray.serving.store.list_sizes", lambda _uri: pytest.fail("the storage was asked"))
    assert status_of(lambda: store.read("ann", task_id, BOUNDS)) == 404
    assert status_of(lambda: store.delete("ann", task_id, BOUNDS)) == 404


def test_updates_are_versions_and_leave_little(store: TaskStore):
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    changed = store.update("ann", task.task_id, lambda s: s.add(support("c")), BOUNDS, version=1)
    assert (changed.version, changed.support.class_names) == (2, ("a", "b", "c"))
    assert again(store).read("ann", task.task_id, BOUNDS).version == 2
    assert list_sizes(f"{store.root}/ann/{task.task_id}")["00000001.safetensors"] == 1
    for _ in range(30):
        store.update("ann", task.task_id, lambda s: s, BOUNDS)
    sizes = list_sizes(f"{store.root}/ann/{task.task_id}")
    assert list(sizes) == [f"{version:08d}.safetensors" for version in range(16, 33)]
    assert set(list(sizes.values())[:-1]) == {1}


def test_a_writer_that_comes_far_too_late_has_lost(store: TaskStore):
    """So late that the name of its version is free again."""
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    other = again(store)

    def change(before: Support) -> Support:
        if "late" not in before.class_names and len(before.class_names) == 2:
            for index in range(40):
                other.update("ann", task.task_id, lambda s, name=f"c{index}": s.add(support(name)), BOUNDS)  # type: ignore[misc]
        return before.add(support("late"))

    changed = store.update("ann", task.task_id, change, BOUNDS)
    assert (changed.version, len(changed.support.class_names)) == (42, 43)
    assert other.read("ann", task.task_id, BOUNDS).version == 42
    assert "00000002.safetensors" not in list_sizes(f"{store.root}/ann/{task.task_id}")


def test_a_version_replaced_while_it_is_read(store: TaskStore, monkeypatch: pytest.MonkeyPatch):
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    read, replaced = store_module.read_if_there, []

    def read_late(uri: str) -> bytes | None:
        if not replaced:
            replaced.append(uri)
            again(store).update("ann", task.task_id, lambda s: s.add(support("c")), BOUNDS)
        return read(uri)

    monkeypatch.setattr(store_module, "read_if_there", read_late)
    assert again(store).read("ann", task.task_id, BOUNDS).version == 2


def test_an_update_of_an_older_version_is_409(store: TaskStore):
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    store.update("ann", task.task_id, lambda s: s.add(support("c")), BOUNDS, version=1)
    assert status_of(lambda: store.update("ann", task.task_id, lambda s: s, BOUNDS, version=1)) == 409


def test_of_two_that_change_the_same_version_one_wins(store: TaskStore):
    """Both have read version 1 before either writes; each is a process of its own."""
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    both = threading.Barrier(2)

    def change(name: str) -> int:
        def add(before: Support) -> Support:
            both.wait(10)
            return before.add(support(name))

        try:
            return again(store).update("ann", task.task_id, add, BOUNDS, version=1).version
        except RequestError as error:
            return error.status

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(change, "cd")) == [2, 409]
    assert len(store.read("ann", task.task_id, BOUNDS).support.class_names) == 3


def test_changes_without_a_version_are_made_again_on_the_newer_one(store: TaskStore):
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    calls = []

    def add(before: Support) -> Support:
        if not calls:
            again(store).update("ann", task.task_id, lambda s: s.add(support("x")), BOUNDS)
        calls.append(before.class_names)
        return before.add(support("c"))

    changed = store.update("ann", task.task_id, add, BOUNDS)
    assert calls == [("a", "b"), ("a", "b", "x")]
    assert (changed.version, changed.support.class_names) == (3, ("a", "b", "c", "x"))


def test_many_writers_lose_nothing(store: TaskStore):
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")

    def add(index: int) -> None:
        mine = again(store)
        while not added(mine, support("a", seed=index)):
            pass

    def added(mine: TaskStore, more: Support) -> bool:
        try:
            return mine.update("ann", task.task_id, lambda s: s.add(more), BOUNDS).version > 1
        except RequestError as error:
            if error.status != 409:
                raise
            return False

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(1, 13)))
    found = store.read("ann", task.task_id, BOUNDS)
    expected = sum(support("a", seed=i).sums[0] for i in range(1, 13)) + task.support.sums[0]
    assert (found.version, found.support.counts.tolist()) == (13, [13, 1])
    torch.testing.assert_close(found.support.sums[0], expected)


def test_a_deleted_task_is_gone_and_stays_gone(store: TaskStore):
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    late = again(store)

    def change(before: Support) -> Support:
        store.delete("ann", task.task_id, BOUNDS)
        return before

    assert status_of(lambda: late.update("ann", task.task_id, change, BOUNDS)) == 404
    assert status_of(lambda: store.read("ann", task.task_id, BOUNDS)) == 404
    assert status_of(lambda: store.delete("ann", task.task_id, BOUNDS)) == 404
    assert store.list("ann", BOUNDS) == []


def test_few_traces_of_deleted_tasks_stay(store: TaskStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lr_ray.serving.store._KEPT_DELETED", 3)
    for _ in range(8):
        store.delete("ann", store.create("ann", support("a", "b"), BOUNDS, model="m").task_id, BOUNDS)
    assert store.list("ann", BOUNDS) == []
    assert len(list_files(store.root, suffix="")) == 3


def test_as_many_tasks_as_are_allowed(store: TaskStore):
    bounds = Bounds(tasks=2)
    first, _ = (store.create("ann", support("a", "b"), bounds, model="m") for _ in range(2))
    assert status_of(lambda: store.create("ann", support("a", "b"), bounds, model="m")) == 413
    assert store.create("bob", support("a", "b"), bounds, model="m").version == 1
    store.delete("ann", first.task_id, bounds)
    assert store.create("ann", support("a", "b"), bounds, model="m").version == 1


def test_as_many_bytes_as_are_allowed(store: TaskStore):
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    size = (Path(store.root) / "ann" / task.task_id / "00000001.safetensors").stat().st_size
    assert status_of(lambda: store.create("ann", support("a", "b"), Bounds(bytes=2 * size - 1), model="m")) == 413
    many = support(*map(str, range(99)))
    assert status_of(lambda: store.update("ann", task.task_id, lambda s: s.add(many), Bounds(bytes=2 * size))) == 413
    assert store.create("ann", support("a", "b"), Bounds(bytes=2 * size + 8), model="m").version == 1


def test_tasks_expire_and_their_files_go(store: TaskStore):
    assert isinstance(store.clock, Clock)
    bounds = Bounds(tasks=1, age_s=100)
    task = store.create("ann", support("a", "b"), bounds, model="m")
    store.clock.now += 99
    assert store.read("ann", task.task_id, bounds).version == 1
    store.clock.now += 1
    assert status_of(lambda: store.read("ann", task.task_id, bounds)) == 404
    newer = store.create("ann", support("a", "b"), bounds, model="m")
    assert list_files(store.root, suffix="") == [f"ann/{newer.task_id}/00000001.safetensors"]
    assert [folder.name for folder in Path(store.root, "ann").iterdir()] == [newer.task_id]


def test_a_task_of_another_model_is_409_and_not_listed(store: TaskStore):
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    other = again(store, models=["another"])
    assert status_of(lambda: other.read("ann", task.task_id, BOUNDS)) == 409
    assert other.list("ann", BOUNDS) == []


@pytest.mark.parametrize("step", ["create_bytes", "list_sizes"])
def test_a_change_that_may_have_been_made_is_not_to_be_asked_again(
    store: TaskStore, monkeypatch: pytest.MonkeyPatch, step: str
):
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    real = getattr(store_module, step)

    def fails_when_written(*arguments: object) -> object:
        done = real(*arguments)
        if step == "create_bytes" or list_files(f"{store.root}/ann/{task.task_id}", suffix="2.safetensors"):
            raise StorageError("the storage went away")
        return done

    monkeypatch.setattr(store_module, step, fails_when_written)
    assert status_of(lambda: store.update("ann", task.task_id, lambda found: found.add(support("a")), BOUNDS)) == 500
    monkeypatch.undo()
    assert store.read("ann", task.task_id, BOUNDS).version == 2


def test_a_task_that_may_have_been_made_is_not_to_be_asked_for_again(store: TaskStore, monkeypatch: pytest.MonkeyPatch):
    real = store_module.create_bytes

    def made_but_not_answered(uri: str, content: bytes) -> bool:
        real(uri, content)
        raise StorageError("the storage went away")

    monkeypatch.setattr(store_module, "create_bytes", made_but_not_answered)
    assert status_of(lambda: store.create("ann", support("a", "b"), BOUNDS, model="m")) == 500
    monkeypatch.setattr(store_module, "create_bytes", lambda _uri, _content: False)
    assert status_of(lambda: store.create("ann", support("a", "b"), BOUNDS, model="m")) == 503
    assert len(store.list("ann", BOUNDS)) == 1


def test_a_task_under_a_foreign_name_is_refused(store: TaskStore):
    """Such as one that was copied into another owner's folder."""
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    (Path(store.root) / "ann").rename(Path(store.root) / "bob")
    with pytest.raises(StorageError, match="not the one that its name says"):
        again(store).read("bob", task.task_id, BOUNDS)


def test_a_known_version_is_not_read_again(store: TaskStore, monkeypatch: pytest.MonkeyPatch):
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    store.read("ann", task.task_id, BOUNDS)
    monkeypatch.setattr("lr_ray.serving.store.read_if_there", lambda _uri: pytest.fail("read again"))
    assert store.read("ann", task.task_id, BOUNDS).version == 1


def test_the_cache_is_bounded(store: TaskStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lr_ray.serving.store._CACHE_BYTES", 3000)
    for task in [store.create("ann", support("a", "b"), BOUNDS, model="m") for _ in range(20)]:
        store.read("ann", task.task_id, BOUNDS)
    assert sum(store._cached_bytes.values()) <= 3000
    assert store._cache.keys() == store._cached_bytes.keys()


def test_on_s3(bucket: str):
    store = TaskStore(root=f"{bucket}/tasks", models=["m"])
    task = store.create("ann", support("a", "b"), BOUNDS, model="m")
    other = again(store)

    def add(before: Support) -> Support:
        if before.class_names == ("a", "b"):
            other.update("ann", task.task_id, lambda s: s.add(support("x")), BOUNDS)
        return before.add(support("c"))

    assert store.update("ann", task.task_id, add, BOUNDS).support.class_names == ("a", "b", "c", "x")
    assert again(store).read("ann", task.task_id, BOUNDS).version == 3
    store.delete("ann", task.task_id, BOUNDS)
    assert other.list("ann", BOUNDS) == []
