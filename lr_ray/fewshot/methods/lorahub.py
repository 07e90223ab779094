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

from lr_ray.fewshot.methods import Adapt, Adaptation, FewShotTask, MethodInputs, TunedMethod
from lr_ray.fewshot.methods.episode_tuning import one_by_one
from lr_ray.fewshot.methods.stacked_loras import StackedLoRAs, stack_loras
from lr_ray.fewshot.protonet import centres_of_ways, prototype_logits
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
    """Of the weights' mean absolute value, beside the mean cross-entropy (the paper; the authors' code divides the
    cross-entropy by the number of images once more, so that theirs weighs so many times more)."""
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
    """{parameter name: the weighted sum of the products B·A}, cut to a rank if one is given."""
    deltas = {f"{name}.weight": stack.delta(weights.to(stack.b)) for name, stack in stacks.items()}
    return deltas if rank is None else {name: _cut(delta, rank) for name, delta in deltas.items()}


def _cut(delta: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    cut: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return cut


def left_out_loss(support: Tensor, labels: Tensor, views: Tensor) -> float:
    """Cross-entropy of the nearest centre on support features, no image being part of the centre it is held to.

    Args:
        support: (S, D).
        labels: (S,) ways.
        views: (V, D) other views of the images that are alone in their way, which are queries in their place.
    """
    n_shot, alone = labels.bincount()[labels], is_alone(labels)
    centres = centres_of_ways(support, labels)
    queries = support.index_put((alone,), views)
    logits = prototype_logits(queries, centres)
    without = (n_shot[:, None] * centres[labels] - support)[~alone] / (n_shot[~alone, None] - 1)
    logits[~alone, labels[~alone]] = -(support[~alone] - without).norm(dim=-1)
    return float(F.cross_entropy(logits, labels))


def is_alone(labels: Tensor) -> Tensor:
    """(S,) ways of the support set → (S,) whether an image is the only one of its way."""
    return labels.bincount()[labels] == 1


@contextmanager
def _adapt(inputs: MethodInputs, settings: LorahubSettings) -> Iterator[Adapt]:
    model = inputs.backbone.model
    stacks, count = stack_loras(inputs.adapters(), inputs.backbone.device)

    @torch.no_grad()
    def adapt(task: FewShotTask, seed: int) -> Adaptation:
        generator = torch.Generator().manual_seed(seed)
        images, labels = task.support.float() / 255, task.labels.to(inputs.backbone.device)
        mirrored = images[is_alone(task.labels)].flip(3)
        if len(mirrored):
            images = torch.cat([images, random_views(mirrored, _VIEW, generator=generator)[0]])

        def loss(weights: Tensor) -> float:
            with merged(model, compose(stacks, weights)):
                features = inputs.embed(images)
            return left_out_loss(features[: len(labels)], labels, features[len(labels) :])

        weights = search(loss, count, settings, generator)
        with merged(model, compose(stacks, weights, settings.rank)):
            features, of_queries = inputs.embed(task.support), inputs.embed(task.queries)
        return Adaptation(scores=prototype_logits(of_queries, centres_of_ways(features, labels)), num_trained=count)

    yield one_by_one(adapt)


METHOD = TunedMethod(
    name="lorahub",
    source="Huang et al., LoraHub, COLM 2024, arXiv 2307.13269; of the products, so that ranks may differ; a (1+1) evolution "
    "strategy for NGOpt, the nearest centre for the language model's loss, leave-one-out or (1-shot) a mirrored crop as query",
    settings=LorahubSettings,
    needs=lambda _settings: ("adapters",),
    adapt=_adapt,
)
