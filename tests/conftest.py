"""What several test folders share: a tiny experiment, and one Ray for the whole session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lr_ray.config import ExperimentConfig, RayConfig

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray of two processors, bound to loopback."""
    from lr_ray.runtime.session import ray_session

    with ray_session(RayConfig(num_cpus=2)):
        yield


@pytest.fixture
def tiny_experiment(tmp_path: Path) -> ExperimentConfig:
    """A whole job of seconds: an untrained ViT-Tiny at 32 px, three adapters of handwritten digits."""
    return ExperimentConfig.model_validate(
        {
            "name": "tiny",
            "output": str(tmp_path / "run"),
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
                "episode": {"n_way": 3, "n_shot": 1, "n_query": 2},
            },
            "evaluation": {
                "methods": ["raw-pixels", "nn", "loras-avg", "recycle", "oracle"],
                "shapes": [{"n_way": 3, "n_shot": 1, "n_query": 5}],
                "episodes": 20,
            },
            "ray": {"num_cpus": 2},
        }
    )
