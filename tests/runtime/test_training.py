"""Trainings side by side."""

import os
import signal
import threading

import pytest

from lr_ray.errors import EpisodeError
from lr_ray.report.progress import Reporter
from lr_ray.runtime.training import side_by_side
from tests.jobs import QUIET


def test_they_run_at_once_and_give_their_results_in_order() -> None:
    both = threading.Barrier(2, timeout=60)

    def wait_for_the_other(result: str) -> str:
        both.wait()
        return result

    trainings = {name: lambda name=name: wait_for_the_other(name) for name in ("a", "b")}
    assert side_by_side(trainings, threading.Event(), QUIET) == ["a", "b"]


def test_what_fails_is_said_and_does_not_keep_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    failed, done = threading.Event(), threading.Event()

    class Heard(Reporter):
        def say(self, message: str) -> None:
            super().say(message)
            failed.set()

    def fail() -> None:
        raise EpisodeError("too few classes")

    def go_on() -> None:
        assert failed.wait(60)
        done.set()

    with pytest.raises(EpisodeError, match="too few classes"):
        side_by_side({"oracle": fail, "meta_lora": go_on}, threading.Event(), Heard())
    assert done.is_set()
    assert capsys.readouterr().err == "train oracle: failed: too few classes\n"


def test_an_interrupt_goes_on_when_they_have_ended_what_they_had_open() -> None:
    stop, both, closed = threading.Event(), threading.Barrier(2, timeout=60), []

    def train(name: str) -> None:
        if both.wait() == 0:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(60)
        closed.append(name)

    with pytest.raises(KeyboardInterrupt):
        side_by_side({name: lambda name=name: train(name) for name in ("a", "b")}, stop, QUIET)
    assert sorted(closed) == ["a", "b"]
