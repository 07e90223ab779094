"""Which Ray errors a user can act on."""

import pytest
from ray.exceptions import ActorDiedError, RayTaskError, WorkerCrashedError

from lr_ray.errors import AdapterError, ClusterError
from lr_ray.runtime.session import user_error


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
