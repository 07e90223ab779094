"""LoRA inversion: from an adapter to images of its classes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lr_ray.errors import AdapterError, InversionError
from lr_ray.inversion.canvas import CANVASES, CanvasName
from lr_ray.inversion.objective import cross_entropy, squared_norm, total_variation
from lr_ray.inversion.priors import BatchNormPrior
from lr_ray.section import ClassPatterns, Section
from lr_ray.vit.augment import AugmentationConfig, random_views
from lr_ray.vit.backbone import Backbone, Precision, autocast
from lr_ray.vit.lora import Adapter, as_tuned, merged
from lr_ray.vit.tokens import encode, num_kept

NonNegativeShare = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class InversionConfig(Section):
    """How images are made from an adapter."""

    images_per_class: int = Field(default=20, gt=0)
    """Images made for every class of an adapter."""
    batch_size: int = Field(default=50, gt=0)
    """Images optimised together; each batch holds its classes in equal parts as far as they go."""
    classes_per_item: int = Field(default=10, gt=0)
    """Classes of one adapter that are at most one piece of work, and one file."""
    classes: ClassPatterns | None = None
    """Classes to invert of every adapter: names, patterns (`bird*`) or ranges of positions (`0:20`); default all."""
    num_steps: int = Field(default=2000, gt=0)
    """Optimiser steps of every batch (the paper: 2000)."""
    learning_rate: float = Field(default=0.25, gt=0)
    """Of Adam, in units of what the canvas holds: for `pixels`, normalised pixels (the paper: 0.25)."""
    betas: tuple[NonNegativeShare, NonNegativeShare] = (0.5, 0.99)
    """Of Adam (the paper: 0.5, 0.99)."""
    prior: str | None = "efficientnet-lite0"
    """CNN whose BatchNorm statistics the images should match: `efficientnet-lite0`, a timm name, or null for none."""
    prior_weight: float = Field(default=10.0, ge=0)
    """Weight of that prior, which is about 1 at noise and 0.7 on real images."""
    tv_weight: float = Field(default=0.0, ge=0)
    """Weight of the total variation (the paper: 0)."""
    l2_weight: float = Field(default=0.0, ge=0)
    """Weight of the mean squared pixel (the paper: 0)."""
    canvas: CanvasName = "pixels"
    """What is optimised: `pixels` (the paper); `spectrum`: Fourier coefficients, low frequencies first, for natural
    images; `two-colour`: a smooth mask between two colours, kept as black on white, for marks on a ground; or `strokes`:
    Bézier curves, black on white, for writing."""
    views: AugmentationConfig = AugmentationConfig(roll=0.125, flip=True)
    """What every step sees of the images (the paper: rolled by up to 1/8 of the side, mirrored half of the time)."""
    keep_ratios: dict[int, Share] = {}
    """{block index: share of the patch tokens kept there}; the others are dropped, by lowest attention from [CLS]."""
    prune_from: float = Field(default=0.25, ge=0, le=1)
    """Share of the steps after which tokens are dropped (the paper: 0.25)."""
    sparse: dict[NonNegativeShare, Share] = {}
    """{share of the steps: share of the patches}: from there on only so many patches of a view enter the first block."""
    sparse_patches: Literal["attended", "random"] = Field(default="attended", exclude_if=lambda kind: kind == "attended")
    """Which: `attended`, those that [CLS] attended most when that began, which follow the image's shifts, mirrorings and crops
    into each view; or `random`, drawn anew for each view, so that all of an image is optimised."""
    prior_every: int = Field(default=1, gt=0)
    """Steps from one look of the prior at the images to the next; its weight is multiplied by that."""
    prior_share: Share = Field(default=1.0, exclude_if=lambda share: share == 1)  # older digests hold
    """Share of a batch's images whose views the prior looks at, others at every step."""
    precision: Precision = "auto"
    """Of the backbone's passes; the prior always runs in fp32."""

    @property
    def prior_in_use(self) -> str | None:
        """`prior`, or None where its weight is 0."""
        return self.prior if self.prior_weight else None

    def piece_bounds(self, num_classes: int) -> list[int]:
        """Where the pieces of work of so many classes begin, and the last ends: as few as may be, of about the same size."""
        pieces = -(-num_classes // self.classes_per_item)
        return [num_classes * index // max(1, pieces) for index in range(pieces + 1)]

    def keep_ratio_at(self, step: int) -> float:
        """Share of the patches that enter the first block in step `step`, counted from 0."""
        begun = [share for share in self.sparse if step >= share * self.num_steps]
        return self.sparse[max(begun)] if begun else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticImages:
    """The images of one adapter.

    Attributes:
        images: (B, 3, H, W) uint8.
        labels: (B,) class index in the adapter.
        patch_order: (B, P) patch positions, most attended by [CLS] first.
        teacher_logits: (B, C) of the adapter on the 8-bit images, all tokens kept.
        flipped_logits: (B, C) the same of the images mirrored left and right.
        loss_ce: (B,) cross-entropy of `teacher_logits`: of the images as they are, not of the view they were kept for.
        loss_prior: (B,) of the step whose images were kept.
    """

    images: Tensor
    labels: Tensor
    patch_order: Tensor
    teacher_logits: Tensor
    flipped_logits: Tensor
    loss_ce: Tensor
    loss_prior: Tensor


class Checkpoint(Protocol):
    """Keeps the state of one inversion, so that another process can go on with it."""

    def load(self) -> dict[str, Tensor] | None:
        """What was saved last, or None."""

    def due(self) -> bool:
        """Whether the state should be saved now."""

    def save(self, state: dict[str, Tensor]) -> None:
        """In the place of what was saved before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InversionStep:
    """What an optimiser step found.

    Attributes:
        done: steps so far, of all batches.
        total: steps of all batches.
        loss_ce: (B,) cross-entropy of the views that the step saw.
    """

    done: int
    total: int
    loss_ce: Tensor


def invert(
    adapter: Adapter,
    backbone: Backbone,
    config: InversionConfig,
    *,
    classes: Sequence[int] | None = None,
    prior: BatchNormPrior | None,
    generator: torch.Generator,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[InversionStep], None] = lambda _step: None,
) -> SyntheticImages:
    """Optimise noise until the adapter recognises its classes in it.

    min over X of CE(h(f(X)), Y) + α·R_BN(X) (+ total variation, l2), by Adam; every step sees a random view of
    each image, pixels stay in the valid range, and each image is kept as it was at its own lowest loss.

    Args:
        adapter: with a head; merged into the backbone's weights while this runs.
        backbone: that the adapter was made for.
        classes: of the adapter, to invert; default all.
        prior: for R_BN, or None.
        generator: CPU generator; determines everything drawn here.
        checkpoint: where to go on from, and where to save the state when it is due; the result does not depend on it.
        on_step: called after every optimiser step.

    Raises:
        AdapterError: the adapter has no head.
        InversionError: the loss became NaN.
    """
    if adapter.head_weight is None:
        raise AdapterError(f"adapter {adapter.spec.adapter_id} has no head, so it has no classes to invert; remove it")
    backbone = as_tuned(adapter, backbone)
    chosen = torch.arange(adapter.head_weight.shape[0]) if classes is None else torch.tensor(classes)
    labels = chosen.repeat(config.images_per_class)
    parts = labels.split(config.batch_size)
    with merged(backbone.model, adapter.updates()), prior or nullcontext():
        saved = checkpoint.load() if checkpoint else None
        finished = _finished_in(saved)
        for index in range(len(finished), len(parts)):
            batch = InversionBatch(adapter, backbone, parts[index], config, prior=prior, generator=generator)
            if saved:
                batch.load(saved)
                generator.set_state(saved["generator"])
                saved = None
            while batch.step < config.num_steps:
                ce = batch.run_step()
                done, total = index * config.num_steps + batch.step, len(parts) * config.num_steps
                on_step(InversionStep(done=done, total=total, loss_ce=ce))
                if checkpoint and checkpoint.due():
                    checkpoint.save(_state(finished) | batch.state() | {"generator": generator.get_state()})
            finished.append(batch.result())
        images, loss_prior = (torch.cat(found) for found in zip(*finished, strict=True))
        return described(adapter, backbone, images, labels, loss_prior, config)


def described(
    adapter: Adapter, backbone: Backbone, images: Tensor, labels: Tensor, loss_prior: Tensor, config: InversionConfig
) -> SyntheticImages:
    """(B, 3, H, W) uint8 images by class, with what the adapter makes of them; it is merged into the backbone's weights."""
    teacher_logits, flipped_logits, patch_order = describe(adapter, backbone, images, config)
    order = labels.argsort(stable=True)
    return SyntheticImages(
        images=images[order],
        labels=labels[order],
        patch_order=patch_order[order],
        teacher_logits=teacher_logits[order],
        flipped_logits=flipped_logits[order],
        loss_ce=cross_entropy(teacher_logits, labels)[order],
        loss_prior=loss_prior[order],
    )


def _state(finished: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Results of the batches that are done."""
    named = {"images": [batch[0] for batch in finished], "loss_prior": [batch[1] for batch in finished]}
    return {f"{name}.{i}": value.contiguous() for name, values in named.items() for i, value in enumerate(values)}


def _finished_in(state: Mapping[str, Tensor] | None) -> list[tuple[Tensor, Tensor]]:
    state = state or {}
    count = sum(name.startswith("images.") for name in state)
    return [(state[f"images.{i}"], state[f"loss_prior.{i}"]) for i in range(count)]


class InversionBatch:
    """Images that are optimised together."""

    _KEPT = ("best", "best_loss", "best_prior", "naturalness", "importance")

    def __init__(
        self,
        adapter: Adapter,
        backbone: Backbone,
        labels: Tensor,
        config: InversionConfig,
        *,
        prior: BatchNormPrior | None,
        generator: torch.Generator,
    ) -> None:
        """Start from noise.

        Args:
            adapter: merged into the backbone.
            labels: (B,) the class each image is to become.
            prior: within its context.
        """
        device = backbone.device
        self._adapter, self._backbone, self._config = adapter, backbone, config
        self._prior, self._generator = prior, generator
        self._labels = labels.to(device)
        self._canvas = CANVASES[config.canvas](len(labels), backbone, generator=generator)
        self._optimizer = torch.optim.Adam(self._canvas.parameters(), lr=config.learning_rate, betas=config.betas)
        self._best = self._canvas.draw().detach().clone()
        self._best_loss, self._best_prior = (torch.full((len(labels),), torch.inf, device=device) for _ in range(2))
        self._naturalness = torch.zeros((), device=device)
        self._importance = torch.zeros(len(labels), 1, *backbone.model.patch_embed.grid_size, device=device)
        self.step = 0

    def run_step(self) -> Tensor:
        """One step of the optimiser; (B,) cross-entropy of the views."""
        config, backbone = self._config, self._backbone
        images = self._canvas.draw()
        views, keep_indices = self._views(images)
        keep_ratios = config.keep_ratios if self.step >= config.prune_from * config.num_steps else {}
        logits = teacher_logits_of(
            self._adapter,
            backbone,
            backbone.normalize(views),
            config.precision,
            keep_indices=keep_indices,
            keep_ratios=keep_ratios,
        )
        ce = cross_entropy(logits, self._labels)
        loss = ce + config.tv_weight * total_variation(images) + config.l2_weight * squared_norm(images)
        objective = loss
        if self._prior and self.step % config.prior_every == 0:
            naturalness = self._prior(self._sample(views))
            objective = loss + config.prior_every * config.prior_weight * naturalness
            self._naturalness = naturalness.detach()
        with torch.no_grad():
            loss = loss + config.prior_weight * self._naturalness
            better = loss < self._best_loss
            self._best = torch.where(better[:, None, None, None], images, self._best)
            self._best_loss = torch.where(better, loss, self._best_loss)
            self._best_prior = torch.where(better, self._naturalness, self._best_prior)
        self._optimizer.zero_grad()
        objective.mean().backward()
        self._optimizer.step()
        self._canvas.after_step()
        self.step += 1
        return ce.detach()

    def _views(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """What this step sees of the images, (B, 3, H, W) in [0, 1], and the (B, K) patches of it that it looks at."""
        config, backbone = self._config, self._backbone
        pixels, keep_ratio = backbone.denormalize(images), config.keep_ratio_at(self.step)
        if keep_ratio == 1 or config.sparse_patches == "random":
            views, _ = random_views(pixels, config.views, generator=self._generator)
            return views, None if keep_ratio == 1 else self._random_patches(keep_ratio)
        if self.step == 0 or config.keep_ratio_at(self.step - 1) != keep_ratio:
            self._importance = rank_patches(backbone, images, config.precision)
        side = backbone.image_px // self._importance.shape[-1]
        riders = F.interpolate(self._importance, scale_factor=side)
        seen, _ = random_views(pixels, config.views, generator=self._generator, riders=riders)
        found = F.avg_pool2d(seen[:, 3:].detach(), side).flatten(1)
        order = found.argsort(dim=1, descending=True, stable=True)
        return seen[:, :3], order[:, : num_kept(order.shape[1], keep_ratio)]

    def _random_patches(self, keep_ratio: float) -> Tensor:
        """(B, K) positions, others for each image."""
        places = torch.rand(len(self._labels), self._backbone.num_patches, generator=self._generator).argsort(dim=1)
        return places[:, : num_kept(places.shape[1], keep_ratio)].to(self._labels.device)

    def _sample(self, views: Tensor) -> Tensor:
        """The views that the prior looks at in this step."""
        size = num_kept(len(views), self._config.prior_share)
        if size == len(views):
            return views
        return views[torch.randperm(len(views), generator=self._generator)[:size].to(views.device)]

    def result(self) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8 images, and the (B,) prior loss of the step that each was kept from.

        Raises:
            InversionError: the loss became NaN.
        """
        if not (torch.isfinite(self._best_loss).all() and torch.isfinite(self._canvas.draw()).all()):
            raise InversionError(
                f"adapter {self._adapter.spec.adapter_id}: the loss became NaN or infinite; "
                "look for extreme weights in the adapter, or try inversion.precision=fp32"
            )
        pixels = self._canvas.finish(self._backbone.denormalize(self._best)).mul(255).round().clamp(0, 255).to(torch.uint8)
        return pixels.cpu(), self._best_prior.cpu()

    def state(self) -> dict[str, Tensor]:
        """On the CPU; of a batch that has run a step."""
        state = {"step": torch.tensor(self.step)}
        state |= {name: getattr(self, f"_{name}") for name in self._KEPT}
        for i, parameter in enumerate(self._canvas.parameters()):
            state[f"canvas.{i}"] = parameter.detach()
            state |= {f"adam.{i}.{name}": value for name, value in self._optimizer.state[parameter].items()}
        return {name: value.cpu().contiguous() for name, value in state.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        device = self._backbone.device
        self.step = int(state["step"])
        for name in self._KEPT:
            setattr(self, f"_{name}", state[name].to(device))
        for i, parameter in enumerate(self._canvas.parameters()):
            parameter.copy_(state[f"canvas.{i}"])
            moments = {name: state[f"adam.{i}.{name}"].to(device) for name in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[parameter] = {"step": state[f"adam.{i}.step"], **moments}


def teacher_logits_of(
    adapter: Adapter,
    backbone: Backbone,
    images: Tensor,
    precision: Precision,
    *,
    keep_indices: Tensor | None = None,
    keep_ratios: Mapping[int, float] | None = None,
) -> Tensor:
    """(B, 3, H, W) normalised → (B, C) logits of the adapter, which is merged into the backbone."""
    with autocast(backbone.device, precision):
        encoding = encode(backbone.model, images, keep_indices=keep_indices, keep_ratios=keep_ratios, pool=adapter.pool)
    return adapter.logits(encoding.features.float())


@torch.no_grad()
def rank_patches(backbone: Backbone, images: Tensor, precision: Precision) -> Tensor:
    """(B, 3, H, W) normalised → (B, 1, rows, columns) importance of each patch in (0, 1], by the attention of [CLS]."""
    with autocast(backbone.device, precision):
        order = encode(backbone.model, images, rank_patches=True).patch_order
    assert order is not None
    places = torch.linspace(1, 1 / order.shape[1], order.shape[1], device=images.device).expand(order.shape)
    ranks: Tensor = torch.zeros_like(places).scatter(1, order, places)
    return ranks.reshape(len(ranks), 1, *backbone.model.patch_embed.grid_size)


@torch.no_grad()
def describe(adapter: Adapter, backbone: Backbone, images: Tensor, config: InversionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """What the adapter makes of (B, 3, H, W) uint8 images.

    Args:
        adapter: with a head; merged into the backbone's weights.

    Returns:
        (B, C) logits on all tokens, the same of the mirrored images, and the (B, P) patch order under the pruning schedule.
    """
    logits, flipped, orders = [], [], []
    for part in images.split(config.batch_size):
        inputs = backbone.normalize(part)
        encoding = encode(backbone.model, inputs, keep_ratios=config.keep_ratios, rank_patches=True, pool=adapter.pool)
        assert encoding.patch_order is not None
        features = encode(backbone.model, inputs, pool=adapter.pool).features if config.keep_ratios else encoding.features
        orders.append(encoding.patch_order.cpu())
        logits.append(adapter.logits(features).cpu())
        flipped.append(teacher_logits_of(adapter, backbone, inputs.flip(3), "fp32").cpu())
    return torch.cat(logits), torch.cat(flipped), torch.cat(orders)
