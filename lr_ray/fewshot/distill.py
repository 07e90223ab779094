"""The meta-training loss of one episode, and the schedule of its learning rate."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lr_ray.fewshot.episodes import Episode, EpisodeShape
from lr_ray.fewshot.protonet import Distance, class_centres, prototype_logits
from lr_ray.fewshot.relations import RelationsConfig
from lr_ray.section import Section
from lr_ray.vit.augment import AugmentationConfig, augment
from lr_ray.vit.backbone import Backbone, Precision, autocast
from lr_ray.vit.lora import LoRAConfig
from lr_ray.vit.tokens import encode

Objective = Literal["episodes", "joint"]


class ScheduleConfig(Section):
    """Cyclic learning rate: linear warm-up, then cosine, again and again (the paper: 25 + 75 steps)."""

    lowest: float = Field(default=1e-5, gt=0)
    """Where a cycle starts and ends."""
    highest: float = Field(default=1e-3, gt=0)
    """Where the warm-up ends."""
    warmup_steps: int = Field(default=25, ge=0)
    """Steps of linear warm-up in a cycle."""
    cosine_steps: int = Field(default=75, gt=0)
    """Steps of cosine decay in a cycle."""

    def at(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        position = step % (self.warmup_steps + self.cosine_steps)
        if position < self.warmup_steps:
            return self.lowest + (self.highest - self.lowest) * position / self.warmup_steps
        phase = (position - self.warmup_steps) / self.cosine_steps
        return self.lowest + (self.highest - self.lowest) * 0.5 * (1 + math.cos(math.pi * phase))


class TrainConfig(Section):
    """How the meta-LoRA is meta-trained."""

    lora: LoRAConfig = LoRAConfig()
    """Size of the meta-LoRA."""
    init_scale: float = Field(default=0.0, ge=0)
    """Start from the average of the LoRAs' products times this, cut to the meta-LoRA's rank; 0 starts from no update."""
    objective: Objective = "episodes"
    """`episodes`; or `joint`: plain supervision, cross-entropy of a linear classifier of all synthetic classes on as many
    images as an episode holds, the classifier thrown away afterwards (the paper's ablation)."""
    episode: EpisodeShape = EpisodeShape(n_query=7)
    """Shape of the training episodes."""
    num_steps: int = Field(default=300, gt=0)
    """Optimiser steps."""
    episodes_per_step: int = Field(default=1, gt=0)
    """Episodes of one optimiser step, over all workers; a multiple of their number."""
    adapter_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the episodes that hold classes of one adapter and are taught by it (KL); the others interpolate across
    adapters (cross-entropy)."""
    relations: RelationsConfig = RelationsConfig()
    """Batches that take the place of a share of the episodes."""
    temperature: float = Field(default=1.0, gt=0)
    """Of teacher and student in the KL."""
    distance: Distance = "euclidean"
    """Between queries and prototypes."""
    logit_scale: float = Field(default=1.0, gt=0)
    """Factor on the student's logits."""
    keep_ratio: float = Field(default=1.0, gt=0, le=1)
    """Share of the synthetic images' patches that enter the student, most attended first."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Of the training images."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Of the learning rate."""
    precision: Precision = "auto"
    """Of the student's passes."""
    validate_every: int = Field(default=25, gt=0)
    """Steps between validations; each one also writes a checkpoint."""
    validation_episodes: int = Field(default=100, gt=0)
    """Episodes of one validation."""
    holdout_adapters: int = Field(default=2, ge=0)
    """Adapters kept from training, whose synthetic images validate it when no real data are named for that; 0 keeps
    none: then the last weights are the result."""
    num_workers: int = Field(default=1, gt=0)
    """Ray Train workers."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.episodes_per_step % self.num_workers:
            raise ValueError(f"episodes_per_step {self.episodes_per_step} is no multiple of num_workers {self.num_workers}")
        if self.objective == "joint" and self.relations.share:
            raise ValueError(f"objective joint does not go with relations.share {self.relations.share}; set it to 0")
        moving = [name for name in ("roll", "affine", "crop") if getattr(self.augmentation, name)]
        if self.keep_ratio < 1 and moving:
            raise ValueError(
                f"keep_ratio below 1 does not go with augmentation.{moving[0]}: patches would move; set either to off"
            )
        return self


class Student(nn.Module):
    """The backbone with the meta-LoRA attached, as one module for DistributedDataParallel."""

    def __init__(self, backbone: Backbone, precision: Precision, *, num_classes: int | None = None) -> None:
        """With `num_classes`, a linear classifier on top, which starts from zero."""
        super().__init__()
        self.model = backbone.model
        self.classifier: nn.Linear | None = None
        if num_classes is not None:
            self.classifier = nn.Linear(backbone.num_features, num_classes, device=backbone.device)
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)
        self._backbone, self._precision = backbone, precision

    def forward(self, pixels: Tensor, keep_indices: Tensor | None) -> Tensor:
        """(B, 3, H, W) in [0, 1], (B, K) or None → (B, D) features, or (B, C) logits of the classifier, in fp32."""
        features = self.features(pixels, keep_indices)
        return features if self.classifier is None else self.classifier(features)

    def features(self, pixels: Tensor, keep_indices: Tensor | None) -> Tensor:
        """(B, 3, H, W) in [0, 1], (B, K) or None → (B, D) features in fp32."""
        with autocast(self._backbone.device, self._precision):
            encoding = encode(self.model, self._backbone.normalize(pixels), keep_indices=keep_indices)
        return encoding.features.float()


def episode_loss(
    student: nn.Module, episode: Episode, config: TrainConfig, *, grid_size: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """KL to the teacher where the episode has one, else cross-entropy with the labels.

    Support and query pass the student in one batch.

    Args:
        student: a `Student`, possibly wrapped.
        grid_size: patches along (H, W).
        generator: CPU generator of the augmentation.

    Returns:
        The scalar loss and the scalar accuracy on the queries.
    """
    images = torch.cat([episode.support_images, episode.query_images])
    pixels, keep = augment(images, episode.keep_indices, config.augmentation, grid_size=grid_size, generator=generator)
    features: Tensor = student(pixels, keep)
    support, queries = features.split([len(episode.support_images), len(episode.query_images)])
    prototypes = class_centres(support, n_way=episode.n_way)
    logits = prototype_logits(queries, prototypes, distance=config.distance, scale=config.logit_scale)
    labels = episode.query_labels.to(logits.device)
    if episode.teacher_logits is None:
        loss = F.cross_entropy(logits, labels)
    else:
        loss = distillation_loss(logits, episode.teacher_logits.to(logits.device).float(), config.temperature)
    return loss, (logits.argmax(dim=1) == labels).float().mean().detach()


def joint_loss(
    student: nn.Module,
    images: Tensor,
    keep_indices: Tensor | None,
    labels: Tensor,
    config: TrainConfig,
    *,
    grid_size: tuple[int, int],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over all synthetic classes at once.

    Args:
        student: a `Student` with a classifier, possibly wrapped.
        images: (B, 3, H, W) uint8.
        keep_indices: (B, K) patches to keep, or None for all.
        labels: (B,) in [0, C).
        grid_size: patches along (H, W).
        generator: CPU generator of the augmentation.

    Returns:
        The scalar loss and the scalar accuracy.
    """
    pixels, keep = augment(images, keep_indices, config.augmentation, grid_size=grid_size, generator=generator)
    logits: Tensor = student(pixels, keep)
    labels = labels.to(logits.device)
    return F.cross_entropy(logits, labels), (logits.argmax(dim=1) == labels).float().mean().detach()


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL between teacher and student at a temperature T, times T²: (M, N), (M, N) → scalar."""
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2
