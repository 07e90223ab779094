"""Progress that a person sees: a bar with an ETA on a terminal, plain lines elsewhere, nothing when asked to be quiet."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[str], None]
"""Called with a few words on what was just finished."""

_SECONDS_BETWEEN_LINES = 15.0


class Reporter:
    """Says on stderr how far the work is."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet

    def say(self, message: str) -> None:
        """One line."""
        if not self._quiet:
            self._console.print(message, soft_wrap=True, markup=False)

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Advance]:
        """A bar of `total` pieces; yields what to call after each."""
        if self._quiet:
            yield lambda _note: None
        elif sys.stderr.isatty():
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", style="dim", markup=False),
            )
            with Progress(*columns, console=self._console) as bar:
                task = bar.add_task(title, total=total, note="")
                yield lambda note: bar.update(task, advance=1, note=note)
        else:
            yield self._lines(title, total)

    def _lines(self, title: str, total: int) -> Advance:
        """A line at the first, the last and every few seconds between."""
        start = last = time.monotonic()
        done = 0

        def advance(note: str) -> None:
            nonlocal done, last
            done, now = done + 1, time.monotonic()
            if done in (1, total) or now - last >= _SECONDS_BETWEEN_LINES:
                last = now
                eta_s = (now - start) / done * (total - done)
                self.say(f"{title}: {done}/{total}, {now - start:.0f} s, eta {eta_s:.0f} s: {note}")

        return advance
