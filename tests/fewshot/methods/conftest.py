"""What the methods draw on, and an episode of classes that are colours."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lr_ray.fewshot.methods import MethodInputs
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import Adapter


@pytest.fixture
def make_inputs(backbone: Backbone, make_adapter: Callable[..., Adapter]) -> Callable[..., MethodInputs]:
    """Of that many adapters, of ranks 1, 2, 3, 1, ..., and an oracle."""

    def make(num_adapters: int = 3) -> MethodInputs:
        def nothing() -> Adapter:
            raise AssertionError("not to be asked for")

        return MethodInputs(
            backbone=backbone,
            precision="fp32",
            adapters=lambda: (make_adapter(seed, rank=1 + seed % 3) for seed in range(num_adapters)),
            meta_lora=nothing,
            joint=nothing,
            oracle=lambda: make_adapter(9),
        )

    return make


@pytest.fixture
def inputs(make_inputs: Callable[..., MethodInputs]) -> MethodInputs:
    return make_inputs()


@pytest.fixture
def make_episode() -> Callable[..., tuple[Tensor, Tensor]]:
    """(3, K, 3, 32, 32) support images and (3 · 4, 3, 32, 32) queries of three colours under noise, way by way."""

    def make(n_shot: int = 2) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(3)
        colours = torch.tensor([[200.0, 40, 40], [40, 200, 40], [40, 40, 200]])[:, None, :, None, None]
        noise = 20 * torch.randn(3, n_shot + 4, 3, 32, 32, generator=generator)
        images = (colours + noise).clamp(0, 255).to(torch.uint8)
        return images[:, :n_shot], images[:, n_shot:].flatten(0, 1)

    return make
