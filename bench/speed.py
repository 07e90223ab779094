"""What the speed benches share: variants of a step that take turns, the machine's own peak, a table and a file."""

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lr_ray.errors import ClusterError
from lr_ray.report.progress import Reporter
from lr_ray.runtime.cost import begin_peak_memory, count_flops, peak_memory_mib
from lr_ray.storage.manifest import versions
from lr_ray.vit.backbone import Precision, autocast

RESULTS = Path("bench", "results")
"""Below the working directory."""
_PEAK_SIZES, _PRODUCTS = (1024, 2048), 10

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to do a step.

    Attributes:
        make: builds what it needs and gives the step; a module's own function or a partial of one, for other processes.
        precision: of its matrix products.
        images: that a step goes through.
        steps: that one call does.
    """

    name: str
    make: Callable[[], Step]
    precision: Precision
    images: int
    steps: int = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one variant; `ratio` is its speed against that of the first."""

    name: str
    steps_per_s: float
    images_per_s: float
    ratio: float
    gflops: float
    peak_gflops: float
    share_of_peak: float
    peak_mib: int


def native(precision: Precision) -> Precision:
    """What `auto` means on this machine."""
    with autocast(torch.device("cpu"), precision):
        return "bf16" if torch.is_autocast_enabled("cpu") else "fp32"


def matmul_peak(precision: Precision) -> float:
    """GFLOP/s of the best of some square products: what this machine can do at that precision, as torch calls it."""
    dtype = torch.bfloat16 if native(precision) == "bf16" else torch.float32
    best = 0.0
    for size in _PEAK_SIZES:
        left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
        for _ in range(_PRODUCTS):
            start = time.perf_counter()
            torch.mm(left, right)
            best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e9)
    return best


def take_turns(steps: Sequence[Step], rounds: int, advance: Callable[[str], None]) -> list[float]:
    """Median seconds of each, which have been done before; they take turns, so that a noisy machine is noisy for all."""
    times: list[list[float]] = [[] for _ in steps]
    for round_index in range(rounds):
        for found, step in zip(times, steps, strict=True):
            start = time.perf_counter()
            step()
            found.append(time.perf_counter() - start)
        advance(f"round {round_index + 1} of {rounds}")
    return [statistics.median(found) for found in times]


def measure(variants: Sequence[Variant], *, threads: int, rounds: int, reporter: Reporter) -> list[Measured]:
    """All variants in one run."""
    torch.set_num_threads(threads)
    with reporter.track("bench", len(variants) + rounds) as advance:
        peaks = {}
        for variant in variants:
            peaks[variant.name] = peak_of(variant.make, threads)
            advance(f"memory: {variant.name}, {peaks[variant.name]} MiB")
        limits = {precision: matmul_peak(precision) for precision in {native(variant.precision) for variant in variants}}
        steps = [variant.make() for variant in variants]
        for step in steps:
            step()  # the first one ranks patches, or allocates
        flops = [count_flops(step) for step in steps]
        seconds = take_turns(steps, rounds, advance)
        for precision in limits:  # the machine may have been busy the first time
            limits[precision] = max(limits[precision], matmul_peak(precision))
    first = variants[0].steps / seconds[0]
    return [
        Measured(
            name=variant.name,
            steps_per_s=round(variant.steps / took, 3),
            images_per_s=round(variant.steps * variant.images / took, 2),
            ratio=round(variant.steps / took / first, 2),
            gflops=round(work / took / 1e9, 1),
            peak_gflops=round(limits[native(variant.precision)], 1),
            share_of_peak=round(work / took / 1e9 / limits[native(variant.precision)], 3),
            peak_mib=peaks[variant.name],
        )
        for variant, took, work in zip(variants, seconds, flops, strict=True)
    ]


def peak_of(make: Callable[[], Step], threads: int) -> int:
    """MiB that a first step adds to the peak of a process of its own."""
    spawning = multiprocessing.get_context("spawn")
    answer = spawning.Queue()
    child = spawning.Process(target=_answer_peak, args=(make, threads, answer))
    child.start()
    while child.is_alive() and answer.empty():
        child.join(timeout=0.1)
    if answer.empty():
        raise ClusterError(f"a first step ended its process (exit code {child.exitcode}): out of memory? lower --batch-size")
    peak = int(answer.get())
    child.join()
    return peak


def _answer_peak(make: Callable[[], Step], threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    step, cpu = make(), torch.device("cpu")
    begin_peak_memory(cpu)
    before = peak_memory_mib(cpu)
    step()
    answer.put(round(peak_memory_mib(cpu) - before))


def write_result(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Write bench/results/NAME.json, with the libraries' versions; returns what it holds."""
    result = found | {"versions": versions()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What one run found.

    Attributes:
        name: of its file in bench/results.
        settings: what it was asked to do.
        others: more of what it found, as JSON.
    """

    name: str
    title: str
    settings: dict[str, Any]
    rows: Sequence[Measured]
    others: dict[str, Any] = field(default_factory=dict)

    def store(self) -> dict[str, Any]:
        """Write bench/results/NAME.json; returns what it holds."""
        rows = [asdict(row) for row in self.rows]
        return write_result(self.name, {"settings": self.settings, "rows": rows, **self.others})

    def table(self) -> Table:
        """To look at."""
        found = Table(title=self.title)
        for column in ("variant", "its/s", "images/s", f"ratio to {self.rows[0].name}", "GFLOP/s", "of the peak", "MiB"):
            found.add_column(column, justify="left" if column == "variant" else "right")
        for row in self.rows:
            numbers = (f"{row.steps_per_s:.3g}", f"{row.images_per_s:.3g}", f"{row.ratio:.2f}", f"{row.gflops:.0f}")
            found.add_row(row.name, *numbers, f"{100 * row.share_of_peak:.0f} %", f"{row.peak_mib:,}")
        return found


def markdown(name: str) -> str:
    """The rows of bench/results/NAME.json as the docs show them."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    lines = ["| variant | its/s | images/s | ratio | GFLOP/s | of the peak | MiB |", "|---|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        numbers = f"{row['steps_per_s']:.3g} | {row['images_per_s']:.3g} | {row['ratio']:.2f} | {row['gflops']:.0f}"
        share = f"{100 * row['share_of_peak']:.0f} % of {row['peak_gflops']:.0f}"
        lines.append(f"| {row['name']} | {numbers} | {share} | {row['peak_mib']:,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(f"{name}\n\n{markdown(name)}" for name in sys.argv[1:]))
