"""Tuning one adapter: LoRA and linear head on real labelled images."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lr_ray.section import Section
from lr_ray.vit.augment import AugmentationConfig, random_views
from lr_ray.vit.backbone import Backbone, Precision, autocast
from lr_ray.vit.lora import LoRAConfig, LowRank, attach_lora, detach_lora, extract_lora
from lr_ray.vit.tokens import encode


class TuneConfig(Section):
    """A library of adapters, each of a random task."""

    num_adapters: int = Field(default=10, gt=0)
    """How many adapters."""
    n_way: int = Field(default=5, gt=1)
    """Classes of each adapter's task."""
    images_per_class: int = Field(default=100, gt=0)
    """Images to tune on, of each class; fewer if the data have fewer."""
    held_out_per_class: int = Field(default=20, gt=0)
    """Other images of each class, on which the adapter's accuracy is measured."""
    lora: LoRAConfig = LoRAConfig()
    """Of each adapter."""
    num_steps: int = Field(default=60, gt=0)
    """Optimiser steps."""
    batch_size: int = Field(default=50, gt=0)
    """Images of a step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of Adam, for LoRA and head (the paper: 1e-3); decays along a cosine."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Of the images."""
    precision: Precision = "auto"
    """Of the backbone's passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedWeights:
    """What tuning gives: {timm module: update}, head (C, D) and (C,), accuracy on the held-out images."""

    modules: dict[str, LowRank]
    head_weight: Tensor
    head_bias: Tensor
    accuracy: float


def tune(
    backbone: Backbone,
    config: TuneConfig,
    *,
    images: Tensor,
    labels: Tensor,
    held_out_images: Tensor,
    held_out_labels: Tensor,
    generator: torch.Generator,
) -> TunedWeights:
    """Train a LoRA and a linear head by cross-entropy; the backbone is left as it was.

    Args:
        images: (M, 3, H, W) uint8.
        labels: (M,) in [0, C).
        held_out_images, held_out_labels: to measure on.
        generator: CPU generator; determines the start, the batches and the augmentation.
    """
    num_classes = int(labels.max()) + 1
    head = torch.nn.Linear(backbone.num_features, num_classes, device=backbone.device)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    loras = attach_lora(backbone.model, config.lora, generator=generator)
    try:
        parameters = [p for lora in loras for p in (lora.lora_a, lora.lora_b)] + list(head.parameters())
        optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.num_steps)
        order = _batches(len(images), config, generator)
        for chosen in order:
            pixels, _ = random_views(images[chosen].float().div(255), config.augmentation, generator=generator)
            with autocast(backbone.device, config.precision):
                features = encode(backbone.model, backbone.normalize(pixels)).features
            loss = F.cross_entropy(head(features.float()), labels[chosen].to(backbone.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        accuracy = _accuracy(backbone, head, held_out_images, held_out_labels, config)
        return TunedWeights(
            modules=extract_lora(backbone.model),
            head_weight=head.weight.detach(),
            head_bias=head.bias.detach(),
            accuracy=accuracy,
        )
    finally:
        detach_lora(backbone.model)


def _batches(num_images: int, config: TuneConfig, generator: torch.Generator) -> list[Tensor]:
    """`num_steps` batches of positions, from shuffled passes over the images."""
    size = min(config.batch_size, num_images)
    num_passes = -(-config.num_steps * size // num_images)
    stream = torch.cat([torch.randperm(num_images, generator=generator) for _ in range(num_passes)])
    return list(stream.split(size)[: config.num_steps])


@torch.no_grad()
def _accuracy(backbone: Backbone, head: torch.nn.Linear, images: Tensor, labels: Tensor, config: TuneConfig) -> float:
    right = 0
    for part, expected in zip(images.split(config.batch_size), labels.split(config.batch_size), strict=True):
        with autocast(backbone.device, config.precision):
            features = encode(backbone.model, backbone.normalize(part)).features
        right += int((head(features.float()).argmax(dim=1).cpu() == expected).sum())
    return right / len(labels)
