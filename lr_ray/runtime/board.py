"""Where workers write how far they are, and the driver reads it."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lr_ray.report.progress import UnderWay
from lr_ray.runtime.session import this_node

if TYPE_CHECKING:
    from lr_ray.inversion.invert import InversionStep  # imports torch, which a board has no need of

_FORGOTTEN_AFTER_S = 60.0


class Board:
    """A Ray actor that holds a line a piece of work; one whose worker went silent is forgotten."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[float, UnderWay]] = {}
        self._attempts: Counter[tuple[str, str]] = Counter()

    def begin(self, name: str, mark: str) -> int:
        """The how-manieth attempt this is at that piece of work from the point that the mark stands for."""
        self._attempts[name, mark] += 1
        return self._attempts[name, mark]

    def write(self, line: UnderWay) -> None:
        """In the place of what that piece of work wrote before."""
        self._lines[line.name] = (time.monotonic(), line)

    def erase(self, name: str) -> None:
        """When the piece of work is finished."""
        self._lines.pop(name, None)

    def read(self) -> list[UnderWay]:
        """What is under way, by name."""
        oldest = time.monotonic() - _FORGOTTEN_AFTER_S
        self._lines = {name: entry for name, entry in self._lines.items() if entry[0] >= oldest}
        return [line for _, (_, line) in sorted(self._lines.items())]


def start_board() -> Any:
    """A handle to a board beside this driver, which is lost only with it."""
    import ray

    return ray.remote(num_cpus=0, scheduling_strategy=this_node())(Board).remote()


def read_board(board: Any) -> Sequence[UnderWay]:
    """What is under way; nothing if the board does not answer soon, since this is for the eye alone."""
    import ray

    try:
        lines: list[UnderWay] = ray.get(board.read.remote(), timeout=5)
    except ray.exceptions.RayError:
        return ()
    return lines


class StepWriter:
    """Writes the steps of one inversion on a board, every second and not every step, and in Ray's metrics."""

    def __init__(self, board: Any, name: str, cross_entropy: Any) -> None:
        self._board, self._name, self._cross_entropy = board, name, cross_entropy
        self._written = 0.0

    def __call__(self, step: "InversionStep") -> None:
        if (now := time.monotonic()) - self._written < 1:
            return
        self._written = now
        ce = float(step.loss_ce.mean())
        self._cross_entropy.set(ce, tags={"item": self._name})
        line = UnderWay(name=self._name, share=step.done / step.total, note=f"step {step.done}, cross-entropy {ce:.3f}")
        self._board.write.remote(line)

    def finish(self) -> None:
        """Take the line away."""
        self._board.erase.remote(self._name)
