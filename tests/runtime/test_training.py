"""Trainings side by side."""

import threading

import pytest

from lr_ray.errors import EpisodeError
from lr_ray.runtime.training import side_by_side


def test_tasks_run_side_by_side_and_give_their_results_in_order() -> None:
    both = threading.Barrier(2, timeout=60)

    def wait_for_the_other(result: str) -> str:
        both.wait()
        return result

    assert side_by_side([lambda: wait_for_the_other("a"), lambda: wait_for_the_other("b")]) == ["a", "b"]


def test_the_first_error_does_not_wait_for_the_others() -> None:
    over = threading.Event()

    def fail() -> bool:
        raise EpisodeError("too few classes")

    with pytest.raises(EpisodeError, match="too few classes"):
        side_by_side([lambda: over.wait(60), fail])
    over.set()
