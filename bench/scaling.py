"""How inversion scales: actors against one on this machine, and what scheduling costs on a simulated cluster of 64 GPUs.

    python -m bench.scaling actors      # the demo's backbone, 1 and 2 actors, on this machine's processors
    python -m bench.scaling scheduling  # 2,000 items of 10 s, the inversion replaced by a sleep, on 64 logical GPUs

Prints a table and writes bench/results/scaling-PART.json. Items and pool are those of `lr-ray invert`.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from typing import Any

from lr_ray.bench.driver_memory import make_library
from lr_ray.bench.speed import write_result
from rich.console import Console
from rich.table import Table

from lr_ray.config import ExperimentConfig, RayConfig
from lr_ray.report.progress import Reporter
from lr_ray.runtime.board import start_board
from lr_ray.runtime.inversion import InversionActor
from lr_ray.runtime.inversion_plan import InversionItem, plan_inversion
from lr_ray.runtime.session import actor_pool, ray_session


class SleepActor:
    """An inversion that takes a given time and no processor."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, _batch: dict[str, Any]) -> dict[str, Any]:
        begun = time.time()
        time.sleep(self._seconds)
        return {"actor": [os.getpid()], "begun": [begun], "ended": [time.time()]}


def scheduling(num_gpus: int = 64, num_items: int = 2000, item_s: float = 10.0) -> dict[str, Any]:
    """How busy the GPUs are while all actors are there and items are left, and the gap between two items of an actor."""
    config = RayConfig(num_gpus_per_actor=1, max_actors=num_gpus)
    items = [
        InversionItem(adapter_folder=f"adapter-{i}", adapter_id=f"adapter-{i}", classes=(0,), uri=f"/nowhere/{i}", seed=i)
        for i in range(num_items)
    ]
    import ray

    ray.init("local", num_cpus=num_gpus, num_gpus=num_gpus, logging_level="error", log_to_driver=False)
    start, by_actor = time.time(), defaultdict(list)
    with Reporter().track("items", num_items) as advance:
        for row in actor_pool(items, config, SleepActor, item_s).iter_rows():
            by_actor[row["actor"]].append((row["begun"], row["ended"]))
            advance("")
    ray.shutdown()
    spans = [sorted(spans) for spans in by_actor.values()]
    all_there = max(own[0][0] for own in spans)
    last_handed_out = max(own[-1][0] for own in spans)
    asleep = sum(max(0.0, min(end, last_handed_out) - max(begun, all_there)) for own in spans for begun, end in own)
    gaps = [after[0] - before[1] for own in spans for before, after in pairwise(own) if before[1] >= all_there]
    return {
        "gpus": len(spans),
        "items": num_items,
        "item_s": item_s,
        "seconds_to_first_actor": round(min(own[0][0] for own in spans) - start, 1),
        "seconds_to_last_actor": round(all_there - start, 1),
        "busy_percent": round(100 * asleep / (len(spans) * (last_handed_out - all_there)), 2),
        "overhead_percent": round(100 * statistics.mean(gaps) / item_s, 2),
        "longest_gap_s": round(max(gaps), 2),
    }


def actors(count: int = 8) -> list[dict[str, Any]]:
    """The same adapters by 1 and by 2 actors of one processor each; the time from when every actor has done its first."""
    rows = []
    with tempfile.TemporaryDirectory() as root:
        make_library(root, count)
        for num_actors in (1, 2):
            config = ExperimentConfig.model_validate(
                {
                    "name": "scaling",
                    "output": f"{root}/{num_actors}",
                    "adapters": f"{root}/adapters",
                    "backbone": {"name": "embedded", "image_px": 42},
                    "inversion": {"images_per_class": 6, "num_steps": 60, "prior": None},
                    "ray": {"max_actors": num_actors},
                }
            )
            plan = plan_inversion(config)
            with ray_session(config.ray):
                finished = actor_pool(plan.todo, config.ray, InversionActor, (config,), start_board()).iter_rows()
                ends = [(time.monotonic(), row["num_images"]) for row in finished]
            # the first rows mark when all actors are at work
            (first, _), *others = ends[num_actors - 1 :]
            seconds, images = ends[-1][0] - first, sum(number for _, number in others)
            rows.append({"actors": num_actors, "images_per_s": round(images / seconds, 2)})
    for row in rows:
        row["efficiency"] = round(row["images_per_s"] / row["actors"] / rows[0]["images_per_s"], 3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("actors", "scheduling"))
    part = parser.parse_args().part
    rows = actors() if part == "actors" else [scheduling()]
    table = Table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    write_result(f"scaling-{part}", {"rows": rows})


if __name__ == "__main__":
    main()
