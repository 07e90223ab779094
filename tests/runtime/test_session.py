"""Which Ray errors a user can act on."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, RayTaskError, WorkerCrashedError

from lr_ray.config import RayConfig
from lr_ray.errors import AdapterError, ClusterError
from lr_ray.runtime.session import ray_session, user_error


def test_the_error_of_ours_inside_rays_is_found() -> None:
    ours = AdapterError("adapter a: damaged")
    assert user_error(RayTaskError("f", "traceback", ours)) is ours
    outer = RuntimeError("outer")
    outer.__cause__ = ours
    assert user_error(outer) is ours


@pytest.mark.parametrize("lost", [WorkerCrashedError(), ActorDiedError()])
def test_a_lost_process_is_no_fault_of_ours(lost: Exception) -> None:
    error = user_error(lost)
    assert isinstance(error, ClusterError)
    assert "run the same command again" in str(error)


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
    for name, value in {"AWS_PROFILE": "lab", "AWS_REGION": "eu-central-1", "HOME": "/home/ada"}.items():
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


@pytest.mark.parametrize(("num_cpus", "kept"), [(2, True), (4, True), (5, False)])
def test_idle_workers_are_kept_for_the_next_step_where_they_are_few(
    monkeypatch: pytest.MonkeyPatch, num_cpus: int, kept: bool
) -> None:
    name = "RAY_idle_worker_killing_time_threshold_ms"
    monkeypatch.setattr(os, "environ", {key: value for key, value in os.environ.items() if key != name})
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", lambda _address, **_given: SimpleNamespace(dashboard_url=""))

    with ray_session(RayConfig(num_cpus=num_cpus)):
        assert (name in os.environ) == kept
