"""A tiny untrained backbone and adapters for it."""

from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import Adapter, AdapterSpec, LowRank


@pytest.fixture
def backbone() -> Backbone:
    """32 px, patches of 8, width 24, 2 blocks; weights large enough for features to depend on the pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    model.eval().requires_grad_(False)
    half = torch.full((3,), 0.5)
    return Backbone(name="tiny", model=model, image_px=32, mean=half, std=half, digest="tiny", source="random")


@pytest.fixture
def make_adapter() -> Callable[..., Adapter]:
    def make(*, num_classes: int = 3, seed: int = 1) -> Adapter:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return 0.3 * torch.randn(*shape, generator=generator)

        names = [f"blocks.{block}.attn.qkv" for block in range(2)]
        return Adapter(
            spec=AdapterSpec(
                adapter_id=f"adapter-{seed}",
                digest=str(seed),
                backbone="tiny",
                backbone_digest="tiny",
                class_names=tuple(f"class {c}" for c in range(num_classes)),
            ),
            modules={name: LowRank(a=draw(2, 24), b=draw(72, 2), scale=1.5) for name in names},
            head_weight=draw(num_classes, 24),
            head_bias=draw(num_classes),
        )

    return make
