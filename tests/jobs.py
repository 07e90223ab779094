"""What tests of whole steps share."""

import os
from pathlib import Path

from bench.processes import children_of
from lr_ray.config import ExperimentConfig
from lr_ray.report.progress import Reporter

QUIET = Reporter(quiet=True)


def tiny(folder: Path) -> ExperimentConfig:
    """A whole job of seconds, below the folder: an untrained ViT-Tiny at 32 px, three adapters of handwritten digits."""
    return ExperimentConfig.model_validate(
        {
            "name": "tiny",
            "output": str(folder / "run"),
            "backbone": {"name": "vit_tiny_patch16_224", "image_px": 32, "pretrained": False},
            "data": {
                "tune": {"source": "digits", "classes": ["0:6"]},
                "test": {"source": "digits", "classes": ["6:10"]},
            },
            "tuning": {
                "num_adapters": 3,
                "n_way": 3,
                "images_per_class": 8,
                "held_out_per_class": 4,
                "num_steps": 3,
                "batch_size": 12,
                "lora": {"rank": 2},
            },
            "inversion": {
                "images_per_class": 4,
                "num_steps": 4,
                "prior": None,
                "tv_weight": 0.1,
                "keep_ratios": {"5": 0.75},
            },
            "training": {
                "lora": {"rank": 4},
                "init_scale": 1,
                "num_steps": 6,
                "validate_every": 2,
                "validation_episodes": 5,
                "holdout_adapters": 1,
                "keep_ratio": 0.75,
                "relations": {"share": 0.5, "batch_size": 6, "views_per_image": 2},
                "episode": {"n_way": 3, "n_shot": 1, "n_query": 2},
            },
            "evaluation": {
                "methods": ["raw-pixels", "nn", "loras-avg", "recycle", "oracle"],
                "shapes": [{"n_way": 3, "n_shot": 1, "n_query": 5}],
                "episodes": 20,
            },
            "ray": {"num_cpus": 2, "dashboard": False},
        }
    )


def changed(config: ExperimentConfig, **sections: dict[str, object]) -> ExperimentConfig:
    """The config with some values of some sections replaced."""
    updates = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=updates)


def snapshot(folder: str) -> dict[str, tuple[int, bytes]]:
    """Every file below the folder: when it was written, and its content."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def kill_worker(title: str) -> None:
    """Kill the one worker of this process's Ray whose title has that in it."""
    (worker,) = children_of(os.getpid(), title)
    worker.kill()
