"""What dropping tokens saves in meta-training, what a second worker gives, and how long trainers wait for images: one run.

    python -m bench.training [--image-px 224] [--threads 2] [--steps 40]

Prints tables and writes bench/results/training.json.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.inversion_step import measure
from bench.processes import lr_ray
from lr_ray.config import load_config
from lr_ray.fewshot.distill import TrainConfig, TrainingBatch
from lr_ray.fewshot.episodes import EpisodeShape
from lr_ray.fewshot.metatrain import MetaTrainer
from lr_ray.report.progress import Reporter
from lr_ray.runtime.training import train_meta_lora
from lr_ray.storage.manifest import versions
from lr_ray.vit.backbone import BackboneConfig, load_backbone
from lr_ray.vit.lora import LoRAConfig

RESULT = Path(__file__).parent / "results" / "training.json"
KEEP_RATIOS = (1.0, 0.75, 0.5, 0.25)
SHAPE = EpisodeShape(n_way=5, n_shot=1, n_query=3)


def trainer_and_batch(image_px: int, keep_ratio: float) -> tuple[MetaTrainer, TrainingBatch]:
    """A step's work: an episode of 20 images, its share of the patches kept."""
    backbone = load_backbone(BackboneConfig(name="embedded", image_px=image_px))
    config = TrainConfig(lora=LoRAConfig(rank=4), episode=SHAPE, keep_ratio=keep_ratio, num_steps=1000)
    rows, columns = backbone.model.patch_embed.grid_size
    count = SHAPE.n_way * (SHAPE.n_shot + SHAPE.n_query)
    generator = torch.Generator().manual_seed(0)
    kept = None
    if keep_ratio < 1:
        order = torch.rand(count, rows * columns, generator=generator).argsort(dim=1)
        kept = order[:, : round(keep_ratio * rows * columns)]
    batch = TrainingBatch(
        pixels=torch.rand(count, 3, image_px, image_px, generator=generator),
        keep_indices=kept,
        n_way=SHAPE.n_way,
        labels=torch.arange(SHAPE.n_way).repeat_interleave(SHAPE.n_query),
    )
    return MetaTrainer(backbone, config, seed=0), batch


def peak_of_a_step(image_px: int, keep_ratio: float, threads: int, answer: Any) -> None:
    """MiB that a first step adds to the peak of a process of its own."""
    torch.set_num_threads(threads)
    trainer, batch = trainer_and_batch(image_px, keep_ratio)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer.run_step([batch])
    answer.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def measure_sparsity(image_px: int, threads: int) -> list[dict[str, float]]:
    """Median seconds of a step and its memory; the variants take turns, so that a noisy machine is noisy for all."""
    spawning = multiprocessing.get_context("spawn")
    peaks = {}
    for keep_ratio in KEEP_RATIOS:
        answer = spawning.Queue()
        child = spawning.Process(target=peak_of_a_step, args=(image_px, keep_ratio, threads, answer))
        child.start()
        peaks[keep_ratio] = answer.get()
        child.join()
    steps = {}
    for keep_ratio in KEEP_RATIOS:
        trainer, batch = trainer_and_batch(image_px, keep_ratio)
        steps[str(keep_ratio)] = partial(trainer.run_step, [batch])
    seconds = {float(name): median for name, median in measure(steps).items()}
    return [
        {
            "keep_ratio": keep_ratio,
            "seconds": round(seconds[keep_ratio], 3),
            "episodes_per_s": round(1 / seconds[keep_ratio], 3),
            "ratio": round(seconds[1.0] / seconds[keep_ratio], 2),
            "peak_mib": round(peaks[keep_ratio]),
        }
        for keep_ratio in KEEP_RATIOS
    ]


class Watch(Reporter):
    """Notes when each step was shown, and what its line said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.steps: list[tuple[float, str]] = []

    @contextmanager
    def track(self, title: str, total: int, under_way: Any = None) -> Iterator[Any]:
        yield lambda text: self.steps.append((time.perf_counter(), text)) if title.startswith("train") else None


def measure_workers(num_steps: int) -> list[dict[str, float]]:
    """Whole trainings of the demo's size of episodes, 4 a step, by one worker and by two, each on one processor."""
    rows = []
    with tempfile.TemporaryDirectory() as root:
        path = Path(root, "bench.yaml")
        path.write_text(json.dumps(_experiment(root, num_steps)))
        for command in ("tune", "invert"):
            subprocess.run(lr_ray(command, "-c", str(path), "--json"), check=True, stdout=subprocess.DEVNULL)
        for num_workers in (1, 2):
            watch = Watch()
            made = [f"{name}={root}/run/{name}" for name in ("adapters", "synthetic")]
            config = load_config(path, [*made, f"output={root}/{num_workers}", f"training.num_workers={num_workers}"])
            train_meta_lora(config, watch)
            times = [shown for shown, _ in watch.steps]
            pace = statistics.median(later - sooner for sooner, later in pairwise(times))
            waiting = float(watch.steps[-1][1].rpartition("waiting for images ")[2])
            rows.append({"workers": num_workers, "seconds_a_step": round(pace, 3), "waiting_for_images": waiting})
    return rows


def _experiment(root: str, num_steps: int) -> dict[str, Any]:
    return {
        "name": "bench",
        "output": f"{root}/run",
        "backbone": {"name": "embedded", "image_px": 70},
        "data": {"tune": {"source": "digits"}},
        "tuning": {"num_adapters": 4, "images_per_class": 10, "held_out_per_class": 4, "num_steps": 1, "batch_size": 20},
        "inversion": {"images_per_class": 8, "num_steps": 1, "prior": None},
        "training": {
            "num_steps": num_steps,
            "episodes_per_step": 4,
            "holdout_adapters": 0,
            "validate_every": num_steps,
            "augmentation": {"flip": True, "crop": 0.2, "blur": 0.5, "colour": 0.3},
        },
        "ray": {"num_cpus": 2},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-px", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    workers = measure_workers(arguments.steps)
    sparsity = measure_sparsity(arguments.image_px, arguments.threads)
    for rows in (sparsity, workers):
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console().print(table)
    result = {"arguments": vars(arguments), "sparsity": sparsity, "workers": workers, "versions": versions()}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
