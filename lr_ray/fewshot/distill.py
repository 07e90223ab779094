"""The meta-training loss of one batch, and the schedule of its learning rate."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lr_ray.fewshot.episodes import Episode, EpisodeShape
from lr_ray.fewshot.metric import MetricConfig
from lr_ray.fewshot.protonet import Distance, class_centres, prototype_logits
from lr_ray.fewshot.relations import RelationsConfig, relation_loss
from lr_ray.section import Section
from lr_ray.vit.augment import AugmentationConfig, augment
from lr_ray.vit.backbone import Backbone, Precision, autocast
from lr_ray.vit.lora import LoRAConfig
from lr_ray.vit.tokens import encode

Objective = Literal["episodes", "joint"]


class ScheduleConfig(Section):
    """Learning rate: linear warm-up, then cosine, again and again (the paper: 25 + 75 steps), or once."""

    lowest: float = Field(default=1e-5, gt=0)
    """Where a cycle starts and ends."""
    highest: float = Field(default=1e-3, gt=0)
    """Where the warm-up ends."""
    warmup_steps: int = Field(default=25, ge=0)
    """Steps of linear warm-up in a cycle."""
    cosine_steps: int | None = Field(default=75, gt=0)
    """Steps of cosine decay in a cycle; null: one cycle, which lasts to the end of the training."""

    def at(self, step: int, num_steps: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0, of `num_steps`."""
        cosine_steps = self.cosine_steps or max(1, num_steps - self.warmup_steps)
        position = step % (self.warmup_steps + cosine_steps)
        if position < self.warmup_steps:
            return self.lowest + (self.highest - self.lowest) * position / self.warmup_steps
        phase = (position - self.warmup_steps) / cosine_steps
        return self.lowest + (self.highest - self.lowest) * 0.5 * (1 + math.cos(math.pi * phase))


class StreamConfig(Section):
    """How a set that is larger than memory is read."""

    buffer_classes: int = Field(default=500, gt=1)
    """Classes in memory at a time, among which episodes mix, once for each worker: images a class · 3 · image_px² bytes
    each. A set of no more is held whole and read once."""
    uses_per_class: float = Field(default=8.0, gt=0)
    """Episodes that a class takes part in, on average, before others take its place."""


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
    smallest_episode: EpisodeShape | None = None
    """Draw way, shot and queries of each episode anew, from these to those of `episode`; default all have those."""
    num_steps: int = Field(default=300, gt=0)
    """Optimiser steps, at most."""
    episodes_per_step: int = Field(default=1, gt=0)
    """Episodes of one optimiser step, over all workers, which deal them out in turn; no fewer than workers. One after the
    other passes a worker's student, gradients add up."""
    adapter_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the episodes that hold classes of one adapter and are taught by it (KL); the others interpolate across
    adapters (cross-entropy)."""
    relations: RelationsConfig = RelationsConfig()
    """Batches that take the place of a share of the episodes."""
    temperature: float = Field(default=1.0, gt=0)
    """Of teacher and student in the KL."""
    distance: Distance = "euclidean"
    """Between queries and prototypes, in training; validation and `recycle` go by Euclidean distance whatever it is."""
    logit_scale: float = Field(default=1.0, gt=0)
    """Factor on the student's logits."""
    keep_ratio: float = Field(default=1.0, gt=0, le=1)
    """Share of the synthetic images' patches that enter the student, most attended first."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Of the training images."""
    metric: MetricConfig = Field(
        default=MetricConfig(), exclude_if=lambda metric: metric == MetricConfig()
    )  # older digests hold
    """That the classes are told apart in afterwards."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Of the learning rate."""
    precision: Precision = "auto"
    """Of the student's passes."""
    recompute: bool = False
    """Compute activations again in the backward pass: a third more work, for a small part of the memory."""
    validate_every: int = Field(default=25, gt=0)
    """Steps between validations; each one also writes a checkpoint."""
    validation_episodes: int = Field(default=100, gt=0)
    """Episodes of one validation."""
    holdout_adapters: int = Field(default=2, ge=0)
    """Adapters whose synthetic images are not trained on but validate, when no real data are named for that (in the average
    to start from and among the teachers of relations they are nevertheless); 0: then the last weights are the result."""
    patience: int | None = Field(default=None, gt=0)
    """End after this many validations without a better one; default never."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of an average of the weights, which is validated and kept in their place; 0: none."""
    stream: StreamConfig = StreamConfig()
    """Of the images."""
    num_workers: int = Field(default=1, gt=0)
    """Ray Train workers."""
    min_workers: int | None = Field(default=None, gt=0)
    """Go on with as few as these when machines are lost, and with more when they come back; default `num_workers`."""

    def determining(self) -> dict[str, Any]:
        """What the trained weights depend on: all but how the work is spread and how much memory it takes."""
        return self.model_dump(mode="json", exclude={"num_workers", "min_workers", "recompute"})

    def validates_at(self, step: int) -> bool:
        """Whether the training is validated and saved after optimiser step `step`, counted from 1."""
        return step % self.validate_every == 0 or step == self.num_steps

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.episodes_per_step < self.num_workers:
            raise ValueError(f"episodes_per_step {self.episodes_per_step} leaves some of num_workers {self.num_workers} idle")
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than num_workers {self.num_workers}")
        if (low := self.smallest_episode) is not None:
            for name in ("n_way", "n_shot", "n_query"):
                if (value := getattr(low, name)) > (most := getattr(self.episode, name)):
                    raise ValueError(f"smallest_episode.{name} {value} is more than episode.{name} {most}")
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

    def __init__(
        self, backbone: Backbone, precision: Precision, *, num_classes: int | None = None, recompute: bool = False
    ) -> None:
        """With `num_classes`, a linear classifier on top, which starts from zero; `recompute` as of `encode`."""
        super().__init__()
        self.model = backbone.model
        self.classifier: nn.Linear | None = None
        if num_classes is not None:
            self.classifier = nn.Linear(backbone.num_features, num_classes, device=backbone.device)
            nn.init.zeros_(self.classifier.weight)
            nn.init.zeros_(self.classifier.bias)
        self._backbone, self._precision, self._recompute = backbone, precision, recompute

    def forward(self, pixels: Tensor, keep_indices: Tensor | None) -> Tensor:
        """(B, 3, H, W) in [0, 1], (B, K) or None → (B, D) features, or (B, C) logits of the classifier, in fp32."""
        features = self.features(pixels, keep_indices)
        return features if self.classifier is None else self.classifier(features)

    def features(self, pixels: Tensor, keep_indices: Tensor | None) -> Tensor:
        """(B, 3, H, W) in [0, 1], (B, K) or None → (B, D) features in fp32."""
        with autocast(self._backbone.device, self._precision):
            inputs = self._backbone.normalize(pixels)
            encoding = encode(self.model, inputs, keep_indices=keep_indices, recompute=self._recompute)
        return encoding.features.float()


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingBatch:
    """Views of images for one pass of the student, and what it should make of them.

    Attributes:
        pixels: (B, 3, H, W) floats in [0, 1]; of an episode the N·S support images, then the N·Q queries, class by class.
        keep_indices: (B, K) patches to keep, or None for all.
        n_way: of an episode; 0 for other batches.
        labels: (N·Q,) of an episode's queries, in [0, N); or (B,) classes for plain supervision.
        teacher_logits: (N·Q, N) of the episode's adapter, if it has one.
        relation_target: (B, P) features whose distances the student should learn.
    """

    pixels: Tensor
    keep_indices: Tensor | None = None
    n_way: int = 0
    labels: Tensor | None = None
    teacher_logits: Tensor | None = None
    relation_target: Tensor | None = None


def view_episode(
    episode: Episode, config: TrainConfig, *, grid_size: tuple[int, int], generator: torch.Generator
) -> TrainingBatch:
    """A view of every image of an episode; a mirrored query has the teacher's logits of its mirror image.

    Args:
        grid_size: patches along (H, W).
        generator: CPU generator of the augmentation.
    """
    images = torch.cat([episode.support_images, episode.query_images])
    pixels, kept, mirrored = augment(
        images, episode.keep_indices, config.augmentation, grid_size=grid_size, generator=generator
    )
    logits = episode.teacher_logits
    if logits is not None and episode.flipped_logits is not None:
        logits = torch.where(mirrored[len(episode.support_images) :, None], episode.flipped_logits, logits)
    return TrainingBatch(
        pixels=pixels, keep_indices=kept, n_way=episode.n_way, labels=episode.query_labels, teacher_logits=logits
    )


def batch_loss(student: nn.Module, batch: TrainingBatch, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """What the batch asks for: the relations' loss, an episode's, or cross-entropy over all classes at once.

    An episode's is the KL to the teacher where it has one, else cross-entropy with the labels.

    Args:
        student: a `Student`, possibly wrapped; with a classifier for a batch that is no episode.

    Returns:
        The scalar loss and the scalar accuracy.
    """
    features: Tensor = student(batch.pixels, batch.keep_indices)
    if batch.relation_target is not None:
        return relation_loss(features, batch.relation_target.to(features.device), config.relations.temperature)
    assert batch.labels is not None
    labels = batch.labels.to(features.device)
    logits = features
    if batch.n_way:
        support, queries = features.split([len(features) - len(labels), len(labels)])
        prototypes = class_centres(support, n_way=batch.n_way)
        logits = prototype_logits(queries, prototypes, distance=config.distance, scale=config.logit_scale)
    if batch.teacher_logits is None:
        loss = F.cross_entropy(logits, labels)
    else:
        loss = distillation_loss(logits, batch.teacher_logits.to(logits.device).float(), config.temperature)
    return loss, (logits.argmax(dim=1) == labels).float().mean().detach()


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL between teacher and student at a temperature T, times T²: (M, N), (M, N) → scalar."""
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2
