"""A job's log on a terminal and elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lr_ray.report.progress import Advance, Reporter
from lr_ray.report.relay import Relay

LINES = [
    "invert: 5 adapters into s3://b/run, 0 done already",
    "invert: 0/5, 15 s, eta unknown: a 20%, step 30, cross-entropy 1.1",
    "invert: 1/5, 20 s, eta 80 s: a: 12 images, cross-entropy 1.000",
    "a line between",
    "invert: 3/5, 40 s, eta 27 s: c: 12 images: more",
    "invert: 5/5, 60 s, eta 0 s: e",
    "invert: 1/5, 1 s, eta 4 s: again",
]


class Noted(Reporter):
    """Notes the bars in the place of drawing them."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.bars: list[tuple[str, int, list[str]]] = []

    @contextmanager
    def track(self, title: str, total: int, *_more: object, done: int = 0) -> Iterator[Advance]:
        notes = done * ["before"]
        self.bars.append((title, total, notes))
        yield notes.append


def test_lines_are_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for line in LINES:
        Relay(Reporter()).show(line)
    assert capsys.readouterr().out.splitlines() == LINES


def test_progress_moves_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    reporter = Noted()
    relay = Relay(reporter)
    for line in LINES:
        relay.show(line)
    relay.close()
    notes = ["a: 12 images, cross-entropy 1.000", *2 * ["c: 12 images: more"], *2 * ["e"]]
    assert reporter.bars == [("invert", 5, notes), ("invert", 5, ["again"])]
    assert capsys.readouterr().out.splitlines() == [LINES[0], LINES[3]]


def test_a_log_that_is_joined_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    reporter = Noted()
    Relay(reporter).show(LINES[4])
    assert reporter.bars == [("invert", 5, ["before", "before", "c: 12 images: more"])]
