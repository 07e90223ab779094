"""LoRA inversion: from an adapter to images of its classes."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lr_ray.errors import AdapterError, InversionError
from lr_ray.inversion.canvas import CANVASES, CanvasName
from lr_ray.inversion.objective import cross_entropy, squared_norm, total_variation
from lr_ray.inversion.priors import BatchNormPrior
from lr_ray.section import Section
from lr_ray.vit.augment import AugmentationConfig, random_views
from lr_ray.vit.backbone import Backbone, Precision, autocast
from lr_ray.vit.lora import Adapter, merged
from lr_ray.vit.tokens import encode


class InversionConfig(Section):
    """How images are made from an adapter."""

    images_per_class: int = Field(default=20, gt=0)
    """Images made for every class of an adapter."""
    batch_size: int = Field(default=50, gt=0)
    """Images optimised together; each batch holds its classes in equal parts as far as they go."""
    num_steps: int = Field(default=2000, gt=0)
    """Optimiser steps of every batch (the paper: 2000)."""
    learning_rate: float = Field(default=0.25, gt=0)
    """Of Adam, in units of what the canvas holds: for `pixels`, normalised pixels (the paper: 0.25)."""
    betas: tuple[float, float] = (0.5, 0.99)
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
    images; or `two-colour`: a smooth mask between two colours, kept as black on white, for marks on a ground."""
    views: AugmentationConfig = AugmentationConfig(roll=0.125, flip=True)
    """What every step sees of the images (the paper: rolled by up to 1/8 of the side, mirrored half of the time)."""
    keep_ratios: dict[int, float] = {}
    """{block index: share of the patch tokens kept there}; the others are dropped, by lowest attention from [CLS]."""
    prune_from: float = Field(default=0.25, ge=0, le=1)
    """Share of the steps after which tokens are dropped (the paper: 0.25)."""
    precision: Precision = "auto"
    """Of the backbone's passes; the prior always runs in fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticImages:
    """The images of one adapter.

    Attributes:
        images: (B, 3, H, W) uint8.
        labels: (B,) class index in the adapter.
        patch_order: (B, P) patch positions, most attended by [CLS] first.
        teacher_logits: (B, C) of the adapter on the 8-bit images, all tokens kept.
        loss_ce: (B,) cross-entropy of `teacher_logits`: of the images as they are, not of the view they were kept for.
        loss_prior: (B,) of the step whose images were kept.
    """

    images: Tensor
    labels: Tensor
    patch_order: Tensor
    teacher_logits: Tensor
    loss_ce: Tensor
    loss_prior: Tensor


def invert(
    adapter: Adapter,
    backbone: Backbone,
    config: InversionConfig,
    *,
    prior: BatchNormPrior | None,
    generator: torch.Generator,
    on_step: Callable[[], None] = lambda: None,
) -> SyntheticImages:
    """Optimise noise until the adapter recognises its classes in it.

    min over X of CE(h(f(X)), Y) + α·R_BN(X) (+ total variation, l2), by Adam; every step sees a random view of
    each image, pixels stay in the valid range, and each image is kept as it was at its own lowest loss.

    Args:
        adapter: with a head; merged into the backbone's weights while this runs.
        backbone: that the adapter was made for.
        prior: for R_BN, or None.
        generator: CPU generator; determines everything drawn here.
        on_step: called after every optimiser step.

    Raises:
        AdapterError: the adapter has no head.
        InversionError: the loss became NaN.
    """
    if adapter.head_weight is None:
        raise AdapterError(f"adapter {adapter.spec.adapter_id} has no head, so it has no classes to invert; remove it")
    num_classes = adapter.head_weight.shape[0]
    labels = torch.arange(num_classes * config.images_per_class) % num_classes
    with merged(backbone.model, adapter.deltas()), prior or nullcontext():
        batches = [
            _invert_batch(adapter, backbone, part, config, prior=prior, generator=generator, on_step=on_step)
            for part in labels.split(config.batch_size)
        ]
        images, loss_prior = (torch.cat(parts) for parts in zip(*batches, strict=True))
        teacher_logits, patch_order = describe(adapter, backbone, images, config)
    order = labels.argsort(stable=True)
    return SyntheticImages(
        images=images[order],
        labels=labels[order],
        patch_order=patch_order[order],
        teacher_logits=teacher_logits[order],
        loss_ce=cross_entropy(teacher_logits, labels)[order],
        loss_prior=loss_prior[order],
    )


def _invert_batch(
    adapter: Adapter,
    backbone: Backbone,
    labels: Tensor,
    config: InversionConfig,
    *,
    prior: BatchNormPrior | None,
    generator: torch.Generator,
    on_step: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) uint8 images, and the (B,) prior loss of the step that each was kept from."""
    device = backbone.device
    labels = labels.to(device)
    canvas = CANVASES[config.canvas](len(labels), backbone, generator=generator)
    optimizer = torch.optim.Adam(canvas.parameters(), lr=config.learning_rate, betas=config.betas)
    best = canvas.draw().detach().clone()
    best_loss, best_prior = (torch.full((len(labels),), torch.inf, device=device) for _ in range(2))
    for step in range(config.num_steps):
        images = canvas.draw()
        views, _ = random_views(backbone.denormalize(images), config.views, generator=generator)
        keep_ratios = config.keep_ratios if step >= config.prune_from * config.num_steps else {}
        inputs = backbone.normalize(views)
        logits = teacher_logits_of(adapter, backbone, inputs, config.precision, keep_ratios=keep_ratios)
        ce = cross_entropy(logits, labels)
        naturalness = prior(views) if prior else images.new_zeros(())
        loss = ce + config.prior_weight * naturalness
        loss = loss + config.tv_weight * total_variation(images) + config.l2_weight * squared_norm(images)
        with torch.no_grad():
            better = loss < best_loss
            best = torch.where(better[:, None, None, None], images, best)
            best_loss = torch.where(better, loss, best_loss)
            best_prior = torch.where(better, naturalness, best_prior)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        canvas.after_step()
        on_step()
    if not torch.isfinite(best_loss).all():
        raise InversionError(
            f"adapter {adapter.spec.adapter_id}: the loss is NaN or infinite from the first step; "
            "look for extreme weights in the adapter, or try inversion.precision=fp32"
        )
    pixels = canvas.finish(backbone.denormalize(best)).mul(255).round().clamp(0, 255).to(torch.uint8)
    return pixels.cpu(), best_prior.cpu()


def teacher_logits_of(
    adapter: Adapter,
    backbone: Backbone,
    images: Tensor,
    precision: Precision,
    *,
    keep_ratios: Mapping[int, float] | None = None,
) -> Tensor:
    """(B, 3, H, W) normalised → (B, C) logits of the adapter, which is merged into the backbone."""
    assert adapter.head_weight is not None
    with autocast(backbone.device, precision):
        features = encode(backbone.model, images, keep_ratios=keep_ratios).features
    return F.linear(features.float(), adapter.head_weight, adapter.head_bias)


@torch.no_grad()
def describe(adapter: Adapter, backbone: Backbone, images: Tensor, config: InversionConfig) -> tuple[Tensor, Tensor]:
    """(B, C) logits on all tokens and (B, P) patch order under the pruning schedule, of uint8 images.

    Args:
        adapter: with a head; merged into the backbone's weights.
    """
    assert adapter.head_weight is not None
    logits, orders = [], []
    for part in images.split(config.batch_size):
        inputs = backbone.normalize(part)
        encoding = encode(backbone.model, inputs, keep_ratios=config.keep_ratios, rank_patches=True)
        assert encoding.patch_order is not None
        features = encode(backbone.model, inputs).features if config.keep_ratios else encoding.features
        logits.append(F.linear(features, adapter.head_weight, adapter.head_bias).cpu())
        orders.append(encoding.patch_order.cpu())
    return torch.cat(logits), torch.cat(orders)
