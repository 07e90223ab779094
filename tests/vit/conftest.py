"""A tiny untrained ViT whose weights are large enough that its attention is far from uniform."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from lr_ray.vit.backbone import Backbone
from lr_ray.vit.embedded import digest_tensors


def _make_backbone(*, depth: int = 2, seed: int = 0, **vit_args: Any) -> Backbone:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
    model = VisionTransformer(depth=depth, **(sizes | vit_args)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.copy_(around + 0.25 * torch.randn(parameter.shape, generator=generator))
    weights = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    return Backbone(
        name="tiny",
        model=model,
        image_px=32,
        mean=torch.tensor([0.4, 0.5, 0.6]),
        std=torch.tensor([0.2, 0.25, 0.5]),
        digest=digest_tensors(weights),
        source="random",
    )


@pytest.fixture
def make_backbone() -> Callable[..., Backbone]:
    """`make_backbone(depth=2, seed=0, **timm_vit_args)`: 16 patches of 8 px, width 24, 2 heads, no head."""
    return _make_backbone


@pytest.fixture
def images() -> torch.Tensor:
    """(3, 3, 32, 32) normalised images."""
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))
