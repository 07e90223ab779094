"""The terms of the inversion loss, one pure function each."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE(h(f(x)), y) of each image: (B, C), (B,) → (B,)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, both directions added: (B, 3, H, W) → (B,)."""
    rows = images.diff(dim=2).abs().mean(dim=(1, 2, 3))
    columns = images.diff(dim=3).abs().mean(dim=(1, 2, 3))
    return rows + columns


def squared_norm(images: Tensor) -> Tensor:
    """Mean squared value: (B, 3, H, W) → (B,)."""
    return images.square().mean(dim=(1, 2, 3))
