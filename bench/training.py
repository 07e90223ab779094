"""A meta-training step: what dropping tokens saves, against the textbook's; what a second worker gives; how long it waits."""

import json
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
from lr_ray.bench.processes import lr_ray
from lr_ray.bench.speed import Bench, Step, Variant, measure
from lr_ray.bench.textbook import TextbookTraining

from lr_ray.config import load_config
from lr_ray.fewshot.distill import TrainConfig, TrainingBatch
from lr_ray.fewshot.episodes import EpisodeShape
from lr_ray.fewshot.metatrain import MetaTrainer
from lr_ray.report.progress import Reporter
from lr_ray.runtime.training import train_meta_lora
from lr_ray.vit.backbone import Backbone, BackboneConfig, load_backbone
from lr_ray.vit.lora import LoRAConfig, attach_lora, detach_lora, extract_lora

KEEP_RATIOS = (1.0, 0.75, 0.5, 0.25)
_SHAPE = EpisodeShape(n_way=5, n_shot=1, n_query=3)
_IMAGES = _SHAPE.n_way * (_SHAPE.n_shot + _SHAPE.n_query)


def random_batch(backbone: Backbone, keep_ratio: float) -> TrainingBatch:
    """A step's work: an episode of 20 images, its share of the patches kept."""
    rows, columns = backbone.model.patch_embed.grid_size
    generator, side = torch.Generator().manual_seed(0), backbone.image_px
    kept = None
    if keep_ratio < 1:
        order = torch.rand(_IMAGES, rows * columns, generator=generator).argsort(dim=1)
        kept = order[:, : round(keep_ratio * rows * columns)]
    return TrainingBatch(
        pixels=torch.rand(_IMAGES, 3, side, side, generator=generator),
        keep_indices=kept,
        n_way=_SHAPE.n_way,
        labels=torch.arange(_SHAPE.n_way).repeat_interleave(_SHAPE.n_query),
    )


def _ours(backbone: BackboneConfig, keep_ratio: float, changes: dict[str, Any]) -> Step:
    loaded = load_backbone(backbone)
    fields = {"episode": _SHAPE, "keep_ratio": keep_ratio, "augmentation": {"flip": True}, "num_steps": 10_000, **changes}
    trainer = MetaTrainer(loaded, TrainConfig(lora=LoRAConfig(), **fields), seed=0)
    return partial(trainer.run_step, [random_batch(loaded, keep_ratio)])


def _textbook(backbone: BackboneConfig, keep_ratio: float) -> Step:
    loaded = load_backbone(backbone)
    attach_lora(loaded.model, LoRAConfig(), generator=torch.Generator().manual_seed(0))
    updates = extract_lora(loaded.model)
    detach_lora(loaded.model)
    training, batch = TextbookTraining(loaded, updates), random_batch(loaded, keep_ratio)
    assert batch.labels is not None
    return partial(training.run_step, batch.pixels, batch.keep_indices, batch.labels, batch.n_way)


def bench_training(backbone: BackboneConfig, *, threads: int, rounds: int, worker_steps: int, reporter: Reporter) -> Bench:
    """Steps in this process, then whole trainings of `worker_steps` steps by one worker and by two."""

    def textbook(keep_ratio: float) -> Variant:
        name = "textbook" if keep_ratio == 1 else f"textbook, keep_ratio {keep_ratio:g}"
        return Variant(name=name, make=partial(_textbook, backbone, keep_ratio), precision="fp32", images=_IMAGES)

    def ours(keep_ratio: float, **changes: Any) -> Variant:
        name = ", ".join([f"keep_ratio {keep_ratio:g}", *(f"{key} {value}" for key, value in changes.items())])
        make = partial(_ours, backbone, keep_ratio, changes)
        return Variant(name=name, make=make, precision=changes.get("precision", "auto"), images=_IMAGES)

    variants = [textbook(1), textbook(0.25), ours(1, precision="fp32"), *map(ours, KEEP_RATIOS), ours(1, recompute=True)]
    rows = measure(variants, threads=threads, rounds=rounds, reporter=reporter)
    return Bench(
        name=f"training-{backbone.name}-{backbone.image_px}",
        title=f"A meta-training step: {backbone.name}, {backbone.image_px} px, {_IMAGES} images, {threads} threads",
        settings={"backbone": backbone.name, "image_px": backbone.image_px, "threads": threads, "images": _IMAGES},
        rows=rows,
        others={"workers": measure_workers(worker_steps)} if worker_steps else {},
    )


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
