"""The command and Ray's processes, from outside: how benches and tests start, find and await them."""

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


def lr_ray(*arguments: str) -> list[str]:
    """The command as it is here."""
    return [sys.executable, "-m", "lr_ray.cli", *arguments]


def wait_until(met: Callable[[], bool], what: str, *, timeout_s: float = 120) -> None:
    """Return once the condition is met; fail after the time."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not met():
        assert time.monotonic() < deadline, f"in {timeout_s:.0f} s this did not come: {what}"
        pause.wait(0.05)


def children_of(pid: int, title: str) -> "list[psutil.Process]":
    """The processes below one, all the way down, whose title has that in it; none if it has ended."""
    import psutil

    try:
        below = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [child for child in below if title in _title(child)]


def _title(process: "psutil.Process") -> str:
    """As Ray sets it; empty once the process has ended."""
    import psutil

    try:
        return "".join(process.cmdline()[:1])
    except psutil.Error:
        return ""
