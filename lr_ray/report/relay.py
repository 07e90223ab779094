"""The log of a job elsewhere: its lines as they come, and on a terminal a bar in place of those that say how far it is."""

import re
import sys
from contextlib import ExitStack

from lr_ray.report.progress import Advance, Reporter

_PROGRESS = re.compile(r"(?P<title>[\w -]+): (?P<done>\d+)/(?P<total>\d+), \d+ s, eta [^:]+: (?P<note>.*)")
"""As `Reporter` writes it where there is no terminal."""


class Relay:
    """Prints lines on stdout; `Reporter`'s lines of progress move a bar, if stderr is a terminal."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._bar = ExitStack()
        self._title = ""
        self._done = 0
        self._advance: Advance = lambda _note: None

    def show(self, line: str) -> None:
        """One line of the log."""
        progress = _PROGRESS.fullmatch(line) if sys.stderr.isatty() else None
        if progress is None:
            print(line, flush=True)
            return
        done, total = int(progress["done"]), int(progress["total"])
        if progress["title"] != self._title or done < self._done:
            self._bar.close()
            self._title, self._done = progress["title"], max(0, done - 1)
            self._advance = self._bar.enter_context(self._reporter.track(self._title, total, done=self._done))
        for _ in range(done - self._done):
            self._advance(progress["note"])
        self._done = done
        if done == total:
            self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
        self._title = ""
