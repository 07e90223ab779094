"""Pools of images."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lr_ray.fewshot.episodes import ImagePool


@pytest.fixture
def make_pool() -> Callable[..., ImagePool]:
    """One-pixel images that are their own index, so that an episode tells what it drew.

    Teacher logit of image i for slot s: 100 i + s, of its mirror image the negative. Patch order of image i: 16 patches,
    from patch i mod 16 on.
    """

    def make(names: list[list[str]], *, per_class: int = 6) -> ImagePool:
        """Args: names, the classes of each adapter."""
        sizes = [len(of_adapter) for of_adapter in names]
        num_classes, widest = sum(sizes), max(sizes, default=0)
        class_of = np.arange(num_classes * per_class) % num_classes
        index = torch.arange(len(class_of))
        return ImagePool(
            images=index.to(torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1),
            class_of=class_of,
            class_names=tuple(name for of_adapter in names for name in of_adapter),
            adapter_of=np.repeat(np.arange(len(names)), sizes),
            slot_of=np.concatenate([np.arange(size) for size in sizes] or [np.zeros(0, int)]),
            teacher_logits=100.0 * index[:, None] + torch.arange(widest),
            flipped_logits=-100.0 * index[:, None] - torch.arange(widest),
            patch_order=(index[:, None] + torch.arange(16)) % 16,
        )

    return make


@pytest.fixture
def colour_pool() -> ImagePool:
    """Two adapters of three classes; an image of a class is its colour with noise on it; the teachers know for sure."""
    rng = np.random.default_rng(0)
    colours = rng.uniform(100, 155, (6, 1, 3, 1, 1))
    images = np.clip(colours + rng.normal(0, 60, (6, 12, 3, 32, 32)), 0, 255).astype(np.uint8).reshape(-1, 3, 32, 32)
    class_of = np.repeat(np.arange(6), 12)
    slot_of = np.array([0, 1, 2, 0, 1, 2])
    teacher_logits = 8 * torch.eye(3)[torch.from_numpy(slot_of[class_of])]
    return ImagePool(
        images=torch.from_numpy(images),
        class_of=class_of,
        class_names=tuple("abcdef"),
        adapter_of=np.array([0, 0, 0, 1, 1, 1]),
        slot_of=slot_of,
        teacher_logits=teacher_logits,
        flipped_logits=teacher_logits,
        patch_order=torch.from_numpy(rng.permuted(np.tile(np.arange(16), (72, 1)), axis=1)),
    )
