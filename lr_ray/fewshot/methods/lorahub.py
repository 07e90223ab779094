"""`lorahub`: a weighted sum of the LoRAs, whose weights are searched for on each episode's support set, without gradients.

Original: NGOpt of nevergrad minimises a language model's loss. Here an evolution strategy of one parent and one child
minimises the cross-entropy of the nearest class centre, which adds no head that would need training.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lr_ray.fewshot.methods import Adapt, Adaptation, MethodInputs, TunedMethod
from lr_ray.fewshot.methods.episode_tuning import support_labels
from lr_ray.fewshot.methods.stacked_loras import StackedLoRAs, stack_loras
from lr_ray.fewshot.protonet import class_centres, prototype_logits
from lr_ray.section import Section
from lr_ray.vit.augment import AugmentationConfig, random_views
from lr_ray.vit.lora import merged

_VIEW = AugmentationConfig(flip=False, crop=0.25)
_FIRST_STEP = 0.5
_GROWTH = 1.5


class LorahubSettings(Section):
    """Of `lorahub`."""

    num_evaluations: int = Field(default=20, gt=0)
    """Of the loss: how often weights are tried (the authors: at most 40)."""
    l1: float = Field(default=0.05, ge=0)
    """Of the weights' mean absolute value, in the loss (the authors)."""
    bound: float = Field(default=1.5, gt=0)
    """Of each weight's absolute value (the authors)."""
    rank: int | None = Field(default=None, gt=0)
    """Cut the sum that was found to this rank, by SVD; default: it is kept whole."""


def search(loss: Callable[[Tensor], float], size: int, settings: LorahubSettings, generator: torch.Generator) -> Tensor:
    """(size,) weights of the least loss + L1 found, from zeros, by a (1+1) evolution strategy.

    A step's length grows by 1.5 when the child is better and shrinks by its fourth root when not (the one-fifth rule).
    """

    def objective(weights: Tensor) -> float:
        return loss(weights) + settings.l1 * float(weights.abs().mean())

    best, step = torch.zeros(size), _FIRST_STEP
    least = objective(best)
    for _ in range(settings.num_evaluations - 1):
        child = (best + step * torch.randn(size, generator=generator)).clamp(-settings.bound, settings.bound)
        value = objective(child)
        if value < least:
            best, least, step = child, value, step * _GROWTH
        else:
            step *= _GROWTH**-0.25
    return best


def compose(stacks: Mapping[str, StackedLoRAs], weights: Tensor, rank: int | None = None) -> dict[str, Tensor]:
    """{module name: the weighted sum of the products B·A}, cut to a rank if one is given."""
    deltas = {name: stack.delta(weights.to(stack.b)) for name, stack in stacks.items()}
    return deltas if rank is None else {name: _cut(delta, rank) for name, delta in deltas.items()}


def _cut(delta: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    cut: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return cut


def left_out_loss(support: Tensor, views: Tensor | None) -> float:
    """Cross-entropy of the nearest centre on (N, K, D) support features, no image being part of the centre it is held to.

    Args:
        views: (N, 1, D) other views of the images, which are the queries where K is 1.
    """
    n_way, n_shot = support.shape[:2]
    labels = support_labels(support, support.device)
    centres = class_centres(support.flatten(0, 1), n_way=n_way)
    if views is not None:
        return float(F.cross_entropy(prototype_logits(views.flatten(0, 1), centres), labels))
    without = (n_shot * centres[:, None] - support) / (n_shot - 1)
    logits = prototype_logits(support.flatten(0, 1), centres)
    own = -(support - without).norm(dim=-1).flatten()
    return float(F.cross_entropy(logits.scatter(1, labels[:, None], own[:, None]), labels))


@contextmanager
def _adapt(inputs: MethodInputs, settings: LorahubSettings) -> Iterator[Adapt]:
    model = inputs.backbone.model
    stacks, count = stack_loras(inputs.adapters(), inputs.backbone.device)

    @torch.no_grad()
    def adapt(support: Tensor, queries: Tensor, seed: int) -> Adaptation:
        n_way, n_shot = support.shape[:2]
        generator = torch.Generator().manual_seed(seed)
        images = support.flatten(0, 1).float() / 255
        if n_shot == 1:
            images = torch.cat([images, random_views(images.flip(3), _VIEW, generator=generator)[0]])

        def loss(weights: Tensor) -> float:
            with merged(model, compose(stacks, weights)):
                features = inputs.embed(images).unflatten(0, (-1, n_way, n_shot))
            return left_out_loss(features[0], features[1] if n_shot == 1 else None)

        weights = search(loss, count, settings, generator)
        with merged(model, compose(stacks, weights, settings.rank)):
            features, of_queries = inputs.embed(support.flatten(0, 1)), inputs.embed(queries)
        return Adaptation(scores=prototype_logits(of_queries, class_centres(features, n_way=n_way)), num_trained=count)

    yield adapt


METHOD = TunedMethod(
    name="lorahub",
    source="Huang et al., LoraHub, COLM 2024, arXiv 2307.13269; of the products, so that ranks may differ; a (1+1) evolution "
    "strategy for NGOpt, the nearest centre for the language model's loss, leave-one-out or (1-shot) a mirrored crop as query",
    settings=LorahubSettings,
    needs=lambda _settings: ("adapters",),
    adapt=_adapt,
)
