"""Kill, starve and cut off `lr-ray invert` at random points, run it again, and count rows lost, doubled and changed.

    python -m bench.chaos [--rounds 4] [--seed 0]

Prints a table and writes bench/results/chaos.json. The adapters are tiny; Ray, its nodes, the processes and the signals are
real. `tests/chaos` runs some of it.
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pyarrow.parquet as pq
from lr_ray.bench.processes import children_of, lr_ray, wait_until
from lr_ray.bench.speed import write_result
from rich.console import Console
from rich.table import Table

from lr_ray.storage.manifest import CLAIM_NAME

DEADLINE_S = 240.0
EXPERIMENT = {
    "name": "chaos",
    "backbone": {"name": "vit_tiny_patch16_224", "image_px": 32, "pretrained": False},
    "data": {"tune": {"source": "digits", "classes": ["0:6"]}},
    "tuning": {"num_adapters": 4, "n_way": 4, "images_per_class": 8, "held_out_per_class": 4, "num_steps": 1, "batch_size": 8},
    "inversion": {"images_per_class": 4, "num_steps": 60, "prior": None, "classes_per_item": 2},
    "ray": {"num_cpus": 2, "checkpoint_every_s": 0.2},
}
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DEDUP_LOGS": "0",
    "OMP_NUM_THREADS": "1",
    "PYTHONFAULTHANDLER": "1",
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one fault.

    Attributes:
        hit: whether the work had begun and was not done when the fault came.
        attempts: how often the command was run until it had nothing left to do.
        survived: whether the first attempt, the one that was hit, ended well.
        lost: rows that are not there in the end.
        doubled: rows that are there twice.
        changed: files whose bytes are not those of an undisturbed run.
    """

    fault: str
    hit: bool
    attempts: int
    survived: bool
    lost: int
    doubled: int
    changed: int
    seconds: float


class Bed:
    """Adapters, and what an undisturbed inversion makes of them."""

    def __init__(self, root: Path) -> None:
        self.config = root / "chaos.yaml"
        self.config.write_text(json.dumps(EXPERIMENT | {"output": str(root / "run")}))
        run("tune", "-c", str(self.config), "--json")
        job = self.start(root / "undisturbed")
        wait_for_work(job, root / "undisturbed")
        begun = time.time()
        assert code_of(job) == 0
        self.work_s = max(path.stat().st_mtime for path in (root / "undisturbed").iterdir()) - begun
        self.expected = files_of(root / "undisturbed")
        self.expected_rows = Counter(rows_of(root / "undisturbed"))

    def start(self, synthetic: Path, *settings: str) -> subprocess.Popen[bytes]:
        """`lr-ray invert` into that folder."""
        overrides = [argument for setting in settings for argument in ("--set", setting)]
        return start("invert", "-c", str(self.config), "--synthetic", str(synthetic), "--json", *overrides)

    def judge(self, fault: str, synthetic: Path, first: subprocess.Popen[bytes], *, hit: bool, begun: float) -> Outcome:
        """Run it again until it has nothing left to do, and compare."""
        code, attempts = code_of(first), 1
        while code != 0:
            attempts += 1
            assert attempts < 5, f"{fault}: it does not come to an end"
            code = code_of(self.start(synthetic))
        return self.compare(fault, synthetic, hit=hit, survived=attempts == 1, attempts=attempts, begun=begun)

    def compare(self, fault: str, synthetic: Path, *, hit: bool, survived: bool, attempts: int, begun: float) -> Outcome:
        rows, files = Counter(rows_of(synthetic)), files_of(synthetic)
        return Outcome(
            fault=fault,
            hit=hit,
            attempts=attempts,
            survived=survived,
            lost=(self.expected_rows - rows).total(),
            doubled=(rows - self.expected_rows).total(),
            changed=sum(files.get(name) != self.expected.get(name) for name in files.keys() | self.expected),
            seconds=round(time.monotonic() - begun, 1),
        )


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(lr_ray(*arguments), stdout=subprocess.DEVNULL, env=os.environ | ENVIRONMENT)


def code_of(job: subprocess.Popen[bytes]) -> int:
    """Its exit code. One that does not end is made to print where each of its threads is.

    Raises:
        subprocess.TimeoutExpired: after `DEADLINE_S`.
    """
    try:
        return job.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        job.send_signal(signal.SIGABRT)
        job.wait()
        raise


def run(*arguments: str) -> None:
    subprocess.run(lr_ray(*arguments), check=True, stdout=subprocess.DEVNULL, env=os.environ | ENVIRONMENT)


def files_of(synthetic: Path) -> dict[str, bytes]:
    """All that is there but the claim and what a killed writer left under a temporary name."""
    return {path.name: path.read_bytes() for path in synthetic.iterdir() if path.suffix not in (".json", ".tmp")}


def rows_of(synthetic: Path) -> Iterator[tuple[str, int, int]]:
    """(adapter, class, position within the class) of every row."""
    for path in sorted(synthetic.glob("*.parquet")):
        table = pq.read_table(path, columns=["adapter_id", "class_index"])
        within: Counter[tuple[str, int]] = Counter()
        for row in table.to_pylist():
            key = (row["adapter_id"], row["class_index"])
            yield (*key, within[key])
            within[key] += 1


def wait_for_work(job: subprocess.Popen[bytes], synthetic: Path) -> None:
    """Until images, or the state of an inversion, are there, or the command has ended."""

    def met() -> bool:
        return job.poll() is not None or (synthetic.exists() and any(path.name != CLAIM_NAME for path in synthetic.iterdir()))

    wait_until(met, "a step of an inversion", timeout_s=DEADLINE_S)


def wait_at_random(bed: Bed, job: subprocess.Popen[bytes], synthetic: Path, rng: random.Random) -> bool:
    """Until some point of the work; whether it is not done yet."""
    wait_for_work(job, synthetic)
    try:
        job.wait(rng.uniform(0, 0.9) * bed.work_s)
    except subprocess.TimeoutExpired:
        return any(not (synthetic / name).exists() for name in bed.expected)
    return False


def kill(bed: Bed, folder: Path, rng: random.Random, *, title: str) -> Outcome:
    """SIGKILL one process of Ray's, or the driver."""
    begun, job = time.monotonic(), bed.start(folder)
    hit = wait_at_random(bed, job, folder, rng)
    victims = children_of(job.pid, title) if title else [psutil.Process(job.pid)]
    if hit and victims:
        rng.choice(victims).kill()
    return bed.judge(title or "driver", folder, job, hit=hit and bool(victims), begun=begun)


@contextmanager
def two_nodes() -> Iterator[tuple[str, list[Any]]]:
    """A head without processors and two nodes of one, as processes on loopback; its address and the nodes."""
    with patch.dict(os.environ, ENVIRONMENT):
        from ray.cluster_utils import Cluster

        soon = {"health_check_period_ms": 500, "health_check_timeout_ms": 500, "health_check_initial_delay_ms": 500}
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "_system_config": {**soon, "health_check_failure_threshold": 2}},
        )
        try:
            yield cluster.address, [cluster.add_node(num_cpus=1) for _ in range(2)]
        finally:
            cluster.shutdown()


def lose_node(bed: Bed, folder: Path, rng: random.Random, *, number: signal.Signals) -> Outcome:
    """SIGKILL, or SIGTERM as a cloud gives to a spot machine, to the raylet of one of two nodes."""
    with two_nodes() as (address, nodes):
        begun, job = time.monotonic(), bed.start(folder, f"ray.address={json.dumps(address)}", "ray.max_actors=2")
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        hit = wait_at_random(bed, job, folder, rng)
        if hit:
            os.kill(rng.choice(raylets), number)
        return bed.judge(f"node, {number.name}", folder, job, hit=hit, begun=begun)


def fill_disk(bed: Bed, folder: Path, rng: random.Random) -> Outcome:
    """A file system with room for some of the files, which is then enlarged."""
    folder.mkdir(parents=True)
    sizes = sorted(len(content) for content in bed.expected.values())
    room = 8192 + int(sum(sizes) * rng.uniform(0.2, 0.8))
    once = shlex.join(lr_ray("invert", "-c", str(bed.config), "--synthetic", f"{folder}/full", "--json"))
    script = f"""
        cd {shlex.quote(str(folder))} && mkdir full && mount -t tmpfs -o size={room} tmpfs full || exit 8
        {once} >/dev/null; code=$?
        mount -o remount,size=64m full; cp -r full before
        [ $code = 0 ] || {once} >/dev/null || exit 9
        cp -r full after; exit $code"""
    begun = time.monotonic()
    private = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    code = subprocess.run(private, timeout=DEADLINE_S, env=os.environ | ENVIRONMENT).returncode
    assert code not in (8, 9), "no small file system" if code == 8 else "it does not come to an end"
    whole = {name: content for name, content in files_of(folder / "before").items() if name.endswith(".parquet")}
    assert all(content == bed.expected[name] for name, content in whole.items()), "a half-written file under its final name"
    return bed.compare("disk full", folder / "after", hit=code != 0, survived=code == 0, attempts=1 + (code != 0), begun=begun)


FAULTS: dict[str, Callable[[Bed, Path, random.Random], Outcome]] = {
    "actor": lambda bed, folder, rng: kill(bed, folder, rng, title="InversionActor"),
    "raylet": lambda bed, folder, rng: kill(bed, folder, rng, title="raylet"),
    "driver": lambda bed, folder, rng: kill(bed, folder, rng, title=""),
    "node": lambda bed, folder, rng: lose_node(bed, folder, rng, number=signal.SIGKILL),
    "preempted": lambda bed, folder, rng: lose_node(bed, folder, rng, number=signal.SIGTERM),
    "disk full": fill_disk,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", choices=FAULTS, action="append")
    arguments = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory() as root:
        bed = Bed(Path(root))
        for round_ in range(arguments.rounds):
            for fault in arguments.fault or FAULTS:
                rng = random.Random(f"{arguments.seed} {round_} {fault}")
                outcomes.append(FAULTS[fault](bed, Path(root, f"{fault}-{round_}"), rng))
                print(outcomes[-1], file=sys.stderr)
    table = Table("fault", "times", "hit the work", "survived", "rows lost", "rows doubled", "files changed")
    rows = []
    for fault in dict.fromkeys(outcome.fault for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.fault == fault]
        sums = {name: sum(getattr(o, name) for o in mine) for name in ("hit", "survived", "lost", "doubled", "changed")}
        rows.append({"fault": fault, "times": len(mine), **sums})
        table.add_row(fault, str(len(mine)), *map(str, sums.values()))
    Console().print(table)
    result = {"rows": rows, "outcomes": [asdict(outcome) for outcome in outcomes], "seed": arguments.seed}
    write_result("chaos", result)


if __name__ == "__main__":
    main()
