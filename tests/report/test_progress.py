import itertools
import sys
import threading

import pytest

from lr_ray.report import progress
from lr_ray.report.progress import Reporter, UnderWay


def under_way() -> list[UnderWay]:
    return [UnderWay(name="a", share=0.4, note="step 4"), UnderWay(name="b", share=0.9, note="step 9")]


def test_lines_at_the_first_and_the_last(capsys: pytest.CaptureFixture[str]):
    with Reporter().track("invert", 3) as advance:
        for note in ("one", "two", "three"):
            advance(note)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("invert: 1/3, 0 s, eta 0 s: one")
    assert last.startswith("invert: 3/3, 0 s, eta 0 s: three")


def test_what_an_earlier_run_has_done_says_nothing_of_the_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 60.0)
    with Reporter().track("train", 1000, done=900) as advance:
        advance("one")
    assert capsys.readouterr().err == "train: 901/1000, 10 s, eta 990 s: one\n"


def test_a_line_says_what_is_under_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 0.001)
    said: list[str] = []
    twice = threading.Event()
    reporter = Reporter()

    def say(message: str) -> None:
        said.append(message)
        if len(said) == 2:
            twice.set()

    monkeypatch.setattr(reporter, "say", say)
    with reporter.track("invert", 3, under_way):
        assert twice.wait(10)
    assert said[0] == "invert: 0/3, 0 s, eta unknown: a 40%, step 4; b 90%, step 9"


def test_a_terminal_has_a_bar_for_each_piece_under_way(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LOOKS", 0.001)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    drawn = threading.Event()
    first, second = under_way()
    looks = iter([[first], [first, second], [second]])

    def ask() -> list[UnderWay]:
        found = next(looks, None)
        if found is None:
            drawn.set()
        return [second] if found is None else found

    with Reporter().track("invert", 2, ask) as advance:
        advance("one")
        assert drawn.wait(10)
    last = capsys.readouterr().err.rpartition("invert")[2]
    assert "1/2" in last
    assert "step 9" in last
    assert "90/100" in last
    assert "step 4" not in last


def test_a_terminal_has_one_bar_for_work_side_by_side(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    reporter = Reporter()
    with reporter.track("train oracle", 2) as first:
        with reporter.track("train meta_lora", 3) as second:
            first("one")
            second("two")
        first("three")
    with reporter.track("eval", 1) as third:
        third("four")
    _, _, after = capsys.readouterr().err.rpartition("train oracle")
    assert "2/2" in after
    assert "1/3" in after.partition("train meta_lora")[2]
    assert "four" in after.partition("eval")[2]


def test_quiet_says_and_asks_nothing(capsys: pytest.CaptureFixture[str]):
    def never() -> list[UnderWay]:
        raise AssertionError

    with Reporter(quiet=True).track("invert", 1, never) as advance:
        advance("one")
    assert capsys.readouterr().err == ""
