"""How many episodes a second are tuned when 1, 2, 5 or 10 of them share a forward pass, on one thread.

    python -m bench.tuned_episodes [--data cifar-fs/val] [--image-px 70] [--rounds 1]
        [--methods lora-linear ...] [--shots 1 5]

Writes bench/results/tuned_episodes.json. Processor time, so that what else runs on the machine hardly counts; sizes take
turns, and the quickest round of each counts. Peak memory is that of the process: it tells what a size takes of the first
method alone.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from lr_ray.bench.inversion import random_adapter
from lr_ray.bench.speed import RESULTS, write_result

from lr_ray.data.images import DataConfig
from lr_ray.data.load import load_data
from lr_ray.fewshot.episodes import EpisodeShape
from lr_ray.fewshot.methods import Adapt, FewShotTask, MethodInputs, TunedMethod, find_method
from lr_ray.fewshot.protocol import draw_episodes
from lr_ray.runtime.cost import begin_peak_memory, peak_memory_mib
from lr_ray.runtime.evaluation import task_of
from lr_ray.vit.backbone import BackboneConfig, load_backbone

METHODS = ("lora-linear", "vpt", "vpt:deep", "mole")
AT_ONCE = (1, 2, 5, 10)
LEAST_EPISODES = 4
NUM_ADAPTERS = 24
Row = dict[str, Any]
NAME = "tuned_episodes"


def tune(adapt: Adapt, tasks: Sequence[FewShotTask], at_once: int) -> tuple[torch.Tensor, float, float]:
    """The episodes' scores, processor seconds an episode, and the peak of memory in MiB."""
    begin_peak_memory(torch.device("cpu"))
    tasks = tasks[: max(at_once, LEAST_EPISODES)]
    start = time.process_time()
    found = [
        adaptation.scores
        for first in range(0, len(tasks), at_once)
        for adaptation in adapt(tasks[first : first + at_once], range(first, first + at_once))
    ]
    seconds = (time.process_time() - start) / len(tasks)
    return torch.stack(found), seconds, peak_memory_mib(torch.device("cpu"))


def measure(label: str, inputs: MethodInputs, tasks: Sequence[FewShotTask], rounds: int) -> list[Row]:
    """A row a size of call."""
    chosen = find_method(label)
    assert isinstance(chosen.method, TunedMethod)
    with chosen.method.adapt(inputs, chosen.settings) as adapt:
        tune(adapt, tasks[:1], 1)  # the first of a process is slow
        runs: dict[int, list[tuple[torch.Tensor, float, float]]] = {size: [] for size in AT_ONCE}
        for _ in range(rounds):
            for size in AT_ONCE:
                runs[size].append(tune(adapt, tasks, size))
    seconds = {size: min(took for _, took, _ in of_size) for size, of_size in runs.items()}
    return [
        {
            "method": label,
            "image_px": inputs.backbone.image_px,
            "precision": inputs.precision,
            "n_shot": len(tasks[0].labels) // 5,
            "at_once": size,
            "episodes_per_s": round(1 / seconds[size], 3),
            "times_as_fast": round(seconds[1] / seconds[size], 2),
            "peak_mib": round(of_size[0][2]),
            "other_predictions": int((runs[1][0][0].argmax(dim=-1) != of_size[0][0][:LEAST_EPISODES].argmax(dim=-1)).sum()),
        }
        for size, of_size in runs.items()
    ]


def keep(rows: list[Row]) -> None:
    """Beside those of other methods, shots, sizes and precisions."""
    kinds = ("method", "n_shot", "image_px", "precision")
    measured = {tuple(row[kind] for kind in kinds) for row in rows}
    path = RESULTS / f"{NAME}.json"
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    others = [row for row in known if tuple(row[kind] for kind in kinds) not in measured]
    write_result(NAME, {"threads": 1, "rows": others + rows})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", default="cifar-fs/val")
    parser.add_argument("--image-px", type=int, default=70)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--shots", nargs="+", type=int, default=(1, 5))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load_backbone(BackboneConfig(name="embedded", image_px=arguments.image_px))
    adapters = [random_adapter(backbone, seed) for seed in range(NUM_ADAPTERS)]
    inputs = MethodInputs(
        backbone=backbone,
        precision="auto",
        adapters=lambda: iter(adapters),
        meta_lora=lambda: adapters[0],
        joint=lambda: adapters[0],
        oracle=lambda: adapters[0],
    )
    data = load_data(DataConfig(source=arguments.data))
    for n_shot in arguments.shots:
        drawn = draw_episodes(data.labels, EpisodeShape(n_shot=n_shot), num_episodes=max(AT_ONCE), seed=0)
        tasks = [task_of(episode, data, arguments.image_px) for episode in drawn]
        for label in arguments.methods:
            rows = measure(label, inputs, tasks, arguments.rounds)
            print(*rows, sep="\n", flush=True)
            keep(rows)


if __name__ == "__main__":
    main()
