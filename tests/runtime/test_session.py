"""Which Ray errors a user can act on."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from lr_ray.config import RayConfig
from lr_ray.errors import AdapterError, ClusterError, StorageError
from lr_ray.runtime.session import check_shared, ray_session, user_error, work_through
from lr_ray.runtime.train_entry import _unmendable
from tests.jobs import QUIET


def test_the_error_of_ours_inside_rays_is_found() -> None:
    ours = AdapterError("adapter a: damaged")
    assert user_error(RayTaskError("f", "traceback", ours)) is ours
    raised = RayTaskError("f", "traceback", ours).as_instanceof_cause()  # as `ray.get` does
    assert isinstance(raised, AdapterError)
    assert user_error(raised) is ours
    outer = RuntimeError("outer")
    outer.__cause__ = ours
    assert user_error(outer) is ours


@pytest.mark.parametrize("lost", [WorkerCrashedError(), ActorDiedError()])
def test_a_lost_process_is_no_fault_of_ours(lost: Exception) -> None:
    error = user_error(lost)
    assert isinstance(error, ClusterError)
    assert "run the same command again" in str(error)


@pytest.mark.parametrize(
    "message", ["CUDA out of memory. Tried to allocate 2 GiB.\nSee", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"]
)
def test_a_full_gpu_is_one_line(message: str) -> None:
    found = user_error(RayTaskError("f", "a traceback", RuntimeError(message)))
    assert isinstance(found, ClusterError)
    assert str(found).startswith(f"a GPU ran out of memory: {message.partition(chr(10))[0]}; lower the batch_size")
    assert "set training.recompute=true" in str(_unmendable(RuntimeError(message))), "in training, too, it would come again"
    assert _unmendable(RuntimeError("another")) is None


def test_a_machine_without_memory_is_told_in_one_line() -> None:
    error = user_error(OutOfMemoryError("1 worker(s) were killed\nprovision more, tune less,\nor …"))
    assert isinstance(error, ClusterError)
    assert str(error).startswith("a machine ran out of memory: 1 worker(s) were killed; run fewer processes")


_GREEDY = """
import os
os.environ["RAY_memory_usage_threshold"] = "0.001"  # whatever runs is too much
from dataclasses import dataclass
from lr_ray.config import RayConfig
from lr_ray.runtime.session import map_tasks, ray_session

@dataclass
class Item:
    uri: str = ""

def work(item):
    import time
    with open({log!r}, "a") as file:
        file.write("x")
    time.sleep(120)

with ray_session(config := RayConfig(num_cpus=1, max_failures=1, dashboard=False)):
    print(*[type(found).__name__ for _, found in map_tasks(work, [Item()], config)])
"""


@pytest.mark.slow
def test_a_task_that_is_too_large_for_the_machine_is_given_up(tmp_path: Path) -> None:
    log = tmp_path / "begun"
    plain = {name: value for name, value in os.environ.items() if name != "RAY_task_oom_retries"}  # an earlier session's
    command = [sys.executable, "-c", _GREEDY.format(log=str(log))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=plain)
    assert done.stdout.splitlines()[-1:] == ["ClusterError"], done.stderr
    assert not log.exists() or len(log.read_text()) <= 2  # an attempt may be killed before it writes


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    fault = RayTaskError("f", "traceback", ZeroDivisionError("division by zero"))
    with pytest.raises(RayTaskError) as raised:
        user_error(fault)
    assert raised.value is fault


@pytest.mark.parametrize(
    ("address", "submitted", "passed"), [("local", False, False), ("10.0.0.1:6379", False, True), ("auto", True, False)]
)
def test_a_cluster_that_is_joined_is_told_where_and_as_whom_to_store(
    monkeypatch: pytest.MonkeyPatch, address: str, submitted: bool, passed: bool
) -> None:
    """A submitted job has it already, and Ray refuses to be told twice."""
    options: dict[str, Any] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", lambda _address, **given: options.update(given) or SimpleNamespace(dashboard_url=""))
    given = {"AWS_PROFILE": "lab", "AWS_REGION": "eu-central-1", "HOME": "/home/ada"}
    of_this_pod = {
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/token",
        "AWS_ROLE_ARN": "arn",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": "http",
    }
    for name, value in (given | of_this_pod).items():
        monkeypatch.setenv(name, value)
    if submitted:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")

    with ray_session(RayConfig(address=address)):
        pass

    variables = options.get("runtime_env", {}).get("env_vars", {})
    assert bool(variables) == passed
    if passed:
        assert (variables["AWS_PROFILE"], variables["AWS_REGION"]) == ("lab", "eu-central-1")
        assert all(name.startswith("AWS_") for name in variables)
        assert not of_this_pod.keys() & variables.keys()


def test_files_that_other_nodes_keep_to_themselves_are_missed() -> None:
    check_shared(["/out/a"], {"/out/a", "/out/b"}, output="/out")
    with pytest.raises(StorageError, match="2 files, such as /out/a, were written on nodes that do not share /out; give an"):
        check_shared(["/out/c", "/out/a"], {"/out/b"}, output="/out")


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("shared", [True, False])
def test_work_on_a_cluster_whose_files_are_not_seen_from_here(tmp_path: Path, shared: bool) -> None:
    items = [SimpleNamespace(uri=str(tmp_path / name)) for name in ("a", "b")]

    def commit(item: SimpleNamespace) -> None:
        if shared or item.uri.endswith("a"):
            Path(item.uri).touch()

    with nullcontext() if shared else pytest.raises(StorageError, match=f"1 files, such as {tmp_path}/b, were written on"):
        work_through("touch", commit, items, RayConfig(address="auto"), QUIET, lambda item, _: item.uri)


@pytest.mark.parametrize(("num_cpus", "kept"), [(2, True), (4, True), (5, False)])
def test_idle_workers_are_kept_for_the_next_step_where_they_are_few(
    monkeypatch: pytest.MonkeyPatch, num_cpus: int, kept: bool
) -> None:
    name = "RAY_idle_worker_killing_time_threshold_ms"
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if not key.startswith("RAY_")})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", lambda _address, **_given: SimpleNamespace(dashboard_url=""))

    with ray_session(RayConfig(num_cpus=num_cpus)):
        assert (name in os.environ) == kept
