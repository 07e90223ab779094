"""What TensorBoard is given, read record by record."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lr_ray.report.curves import Curves


def events_in(path: Path) -> Iterator[Any]:
    """A record is its length in 8 bytes, 4 of checksum, the event, 4 of checksum."""
    content, start = path.read_bytes(), 0
    while start < len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        yield Event.FromString(content[start + 12 : start + 12 + length])
        start += length + 16


def points_in(path: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, pytest.approx(value.simple_value, rel=1e-6))
        for event in events_in(path)
        for value in event.summary.value
    ]


def test_every_metric_is_a_curve(tmp_path: Path) -> None:
    with Curves(str(tmp_path)) as curves:
        curves.add({"step": 1, "loss": 2.0})
        curves.add({"step": 2, "loss": 1.5, "validation_accuracy": 0.25})
        curves.commit()

    (path,) = (tmp_path / "tensorboard").iterdir()
    assert points_in(path) == [(1, "loss", 2.0), (2, "loss", 1.5), (2, "validation_accuracy", 0.25)]


def test_what_is_committed_can_be_seen_while_the_training_goes_on(tmp_path: Path) -> None:
    with Curves(str(tmp_path)) as curves:
        curves.add({"step": 1, "loss": 2.0})
        curves.commit()
        curves.add({"step": 2, "loss": 1.0})

        (path,) = (tmp_path / "tensorboard").iterdir()
        assert points_in(path) == [(1, "loss", 2.0)]
        curves.commit()

    assert points_in(path) == [(1, "loss", 2.0), (2, "loss", 1.0)]


def test_a_run_that_goes_on_takes_the_place_of_the_steps_that_it_does_again(tmp_path: Path) -> None:
    with Curves(str(tmp_path)) as curves:
        curves.add({"step": 31, "loss": 1.0})
        curves.commit()

    (path,) = (tmp_path / "tensorboard").iterdir()
    starts = [event.step for event in events_in(path) if event.session_log.status == SessionLog.START]
    assert starts == [31]


def test_nothing_done_is_nothing_written(tmp_path: Path) -> None:
    with Curves(str(tmp_path)) as curves:
        curves.commit()

    assert not list(tmp_path.iterdir())
