"""Progress that a person sees: a bar with an ETA on a terminal, plain lines elsewhere, nothing when asked to be quiet."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[str], None]
"""Called with a few words on what was just finished."""

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_LOOKS = 1.0
_LINES_UNDER_WAY = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class UnderWay:
    """A piece of work that is not finished.

    Attributes:
        share: done, 0 to 1.
        note: a few words.
    """

    name: str
    share: float
    note: str


def _nothing() -> Sequence[UnderWay]:
    return ()


class Reporter:
    """Says on stderr how far the work is."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._lock = threading.Lock()
        self._bar, self._tracks = Progress(), 0

    def say(self, message: str) -> None:
        """One line."""
        if not self._quiet:
            self._console.print(message, soft_wrap=True, markup=False)

    @contextmanager
    def track(
        self, title: str, total: int, under_way: Callable[[], Sequence[UnderWay]] = _nothing, *, done: int = 0
    ) -> Iterator[Advance]:
        """A bar of `total` pieces; yields what to call after each.

        Args:
            done: pieces that an earlier run has finished, which tell nothing of this one's speed.
            under_way: asked again and again, in another thread, for the pieces that are not finished yet.
        """
        if self._quiet:
            yield lambda _note: None
            return
        show = self._bars if sys.stderr.isatty() else self._lines
        with show(title, total, under_way, done) as advance:
            yield advance

    @contextmanager
    def _bars(self, title: str, total: int, under_way: Callable[[], Sequence[UnderWay]], done: int) -> Iterator[Advance]:
        with self._shared_bar() as bar:
            task = bar.add_task(title, total=total, completed=done, note="")
            shown: dict[str, TaskID] = {}

            def look() -> None:
                pieces = {piece.name: piece for piece in under_way()[:_LINES_UNDER_WAY]}
                for name in shown.keys() - pieces.keys():
                    bar.remove_task(shown.pop(name))
                for name, piece in pieces.items():
                    if name not in shown:
                        shown[name] = bar.add_task(f"  {name}", total=100, note="")
                    bar.update(shown[name], completed=round(100 * piece.share), note=piece.note)

            with _again_and_again(look):
                yield lambda note: bar.update(task, advance=1, note=note)

    @contextmanager
    def _shared_bar(self) -> Iterator[Progress]:
        """One for all tracks that are open at once: a terminal has room for one."""
        with self._lock:
            if not self._tracks:
                self._bar = Progress(*_columns(), console=self._console)
                self._bar.start()
            self._tracks += 1
        try:
            yield self._bar
        finally:
            with self._lock:
                self._tracks -= 1
                if not self._tracks:
                    self._bar.stop()

    @contextmanager
    def _lines(self, title: str, total: int, under_way: Callable[[], Sequence[UnderWay]], done: int) -> Iterator[Advance]:
        """A line at the first, the last and every few seconds between."""
        start = last = time.monotonic()
        before = done

        def say(note: str) -> None:
            nonlocal last
            last = time.monotonic()
            eta = f"{(last - start) / (done - before) * (total - done):.0f} s" if done > before else "unknown"
            self.say(f"{title}: {done}/{total}, {last - start:.0f} s, eta {eta}: {note}")

        def advance(note: str) -> None:
            nonlocal done
            done += 1
            if done in (before + 1, total) or time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                say(note)

        def look() -> None:
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES and (pieces := under_way()):
                say("; ".join(f"{piece.name} {piece.share:.0%}, {piece.note}" for piece in pieces[:_LINES_UNDER_WAY]))

        with _again_and_again(look):
            yield advance


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )


@contextmanager
def _again_and_again(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` every second, in another thread, as long as the context lasts."""
    over = threading.Event()

    def keep_looking() -> None:
        while not over.wait(_SECONDS_BETWEEN_LOOKS):
            look()

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
