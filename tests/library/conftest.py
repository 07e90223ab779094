"""A tiny backbone, and adapters of it saved in any of the market's formats."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lr_ray.library.market import save_as_stranger
from lr_ray.vit.backbone import Backbone, BackboneConfig, load_backbone
from lr_ray.vit.lora import Adapter, AdapterSpec, LowRank

TINY = BackboneConfig(name="vit_tiny_patch16_224", image_px=32, pretrained=False)


@pytest.fixture(scope="session")
def vit() -> Backbone:
    """Untrained, one for all tests; merging puts the same weights back."""
    return load_backbone(TINY)


@pytest.fixture
def make(vit: Backbone) -> Callable[..., Adapter]:
    """`make(seed, rank=4, num_classes=3, targets=(0, 2))`: an adapter on query and value of every block, drawn."""

    def make(seed: int = 0, *, rank: int = 4, num_classes: int = 3, scale: float = 0.5) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        width, modules = vit.num_features, {}
        for index in range(len(vit.model.blocks)):
            b = torch.zeros(3 * width, 2 * rank)
            b[:width, :rank] = 0.1 * torch.randn(width, rank, generator=generator)
            b[2 * width :, rank:] = 0.1 * torch.randn(width, rank, generator=generator)
            a = 0.1 * torch.randn(2 * rank, width, generator=generator)
            modules[f"blocks.{index}.attn.qkv"] = LowRank(a=a, b=b, scale=scale)
        spec = AdapterSpec(
            adapter_id=f"birds-{seed}",
            digest="",
            backbone=vit.name,
            backbone_digest="",
            class_names=tuple(f"Vogel № {index}" for index in range(num_classes)),
        )
        head = torch.randn(num_classes, width, generator=generator)
        return Adapter(spec=spec, modules=modules, head_weight=head, head_bias=torch.randn(num_classes, generator=generator))

    return make


@pytest.fixture
def share(vit: Backbone, make: Callable[..., Adapter], tmp_path: Path) -> Callable[..., str]:
    """`share(seed, format_="timm", damage="", **make)`: where such an adapter was saved."""

    def share(seed: int = 0, *, format_: str = "timm", damage: str = "", folder: str = "market", **options: int) -> str:
        adapter = make(seed, **options)
        name = f"{format_}-{seed}".replace(" ", "-").replace(",", "")
        return save_as_stranger(str(tmp_path / folder), name, adapter, vit, format_=format_, damage=damage)

    return share


@pytest.fixture
def without_head(make: Callable[..., Adapter]) -> Adapter:
    adapter = make(9)
    return replace(adapter, head_weight=None, head_bias=None, spec=replace(adapter.spec, class_names=()))
