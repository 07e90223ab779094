"""Relations: how far apart any two images are to all adapters together, for the student to learn.

Every adapter sees any image, also one of another adapter's classes. A student that keeps the images as far apart as the
adapters do learns from all of them at once, needs no label, and holds on where the episodes' classes are too easy.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lr_ray.section import Section


class RelationsConfig(Section):
    """Learning the adapters' distances between images, beside the episodes or in their place."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Share of the training episodes that are replaced by a batch of images whose distances are learnt."""
    batch_size: int = Field(default=60, gt=2)
    """Images of such a batch."""
    views_per_image: int = Field(default=4, gt=0)
    """Augmented views of every synthetic image, drawn once, that the adapters see."""
    teacher_scale: float = Field(default=1.0, gt=0)
    """Factor on every adapter's update while it is a teacher here."""
    temperature: float = Field(default=0.2, gt=0)
    """Of the neighbourhoods, in units of the mean distance of a batch."""
    width: int = Field(default=2048, gt=0)
    """Numbers an image that the features of all adapters are projected to, however many they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RelationTargets:
    """Views and what the adapters make of them.

    Attributes:
        images: (M, 3, H, W) uint8.
        keep_indices: (M, K) patches to keep, or None for all.
        features: (M, P), whose distances are the adapters'.
    """

    images: Tensor
    keep_indices: Tensor | None
    features: Tensor


def directions(features: Tensor) -> Tensor:
    """(M, D) features of one adapter → as unit vectors from their mean, so that every adapter and image counts alike.

    Without it what an adapter says is hidden behind what all of its features have in common, and adapters with large
    features speak loudest.
    """
    return F.normalize(features - features.mean(dim=0), dim=1)


def project(features: Tensor, *, width: int, seed: int) -> Tensor:
    """(M, D) → (M, width) by a seeded Gaussian matrix, which keeps distances (Johnson-Lindenstrauss).

    Summed over adapters, each with a seed of its own, squared distances add up as if the features had been
    concatenated.
    """
    generator = torch.Generator().manual_seed(seed)
    return features @ torch.randn(features.shape[1], width, generator=generator).div_(math.sqrt(width))


def relation_loss(features: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL of the neighbourhoods: softmax over j of −d(i, j) / (T · mean d), target against student.

    Args:
        features: (B, D) of the student.
        target: (B, P) of the adapters.

    Returns:
        The scalar loss, and the scalar share of the images whose nearest neighbour is the target's.
    """
    student, teacher = _neighbourhoods(features, temperature), _neighbourhoods(target, temperature)
    loss = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return loss, (student.argmax(dim=1) == teacher.argmax(dim=1)).float().mean().detach()


def _neighbourhoods(features: Tensor, temperature: float) -> Tensor:
    """(B, D) → (B, B - 1) log-probabilities of the other images."""
    batch = len(features)
    others = ~torch.eye(batch, dtype=torch.bool, device=features.device)
    distances = torch.cdist(features, features)[others].view(batch, batch - 1)
    return F.log_softmax(-distances / (temperature * distances.mean().detach()), dim=1)
