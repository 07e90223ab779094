"""Prototypes and logits: a class is the mean of its support features."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Literal["euclidean", "squared", "cosine"]


def class_centres(features: Tensor, *, n_way: int) -> Tensor:
    """(..., N·S, D) support features, class by class → (..., N, D) prototypes, the means."""
    centres: Tensor = features.unflatten(-2, (n_way, -1)).mean(dim=-2)
    return centres


def centres_of_ways(features: Tensor, labels: Tensor) -> Tensor:
    """The mean of each way: (..., S, D) support features and their (S,) ways in [0, N) → (..., N, D)."""
    counts = labels.bincount()
    n_way, n_shot = len(counts), int(counts[0])
    if torch.equal(labels, torch.arange(n_way, device=labels.device).repeat_interleave(n_shot)):
        return class_centres(features, n_way=n_way)
    sums = features.new_zeros(*features.shape[:-2], n_way, features.shape[-1]).index_add_(-2, labels, features)
    return sums / counts.to(features)[:, None]


def prototype_logits(queries: Tensor, prototypes: Tensor, *, distance: Distance = "euclidean", scale: float = 1.0) -> Tensor:
    """Class scores of the queries: minus the distance to each prototype (paper: Euclidean), or cosine, times `scale`.

    Args:
        queries: (..., M, D).
        prototypes: (..., N, D).

    Returns:
        (..., M, N).
    """
    if distance == "cosine":
        return scale * F.normalize(queries, dim=-1) @ F.normalize(prototypes, dim=-1).transpose(-2, -1)
    if distance == "squared":
        return -scale * torch.cdist(queries, prototypes).square()
    return -scale * torch.cdist(queries, prototypes)
