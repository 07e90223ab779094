"""What the methods that are tuned on each episode's support set share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lr_ray.fewshot.methods import Adapt, Adaptation, Embed, FewShotTask
from lr_ray.fewshot.methods.linear_probe import logistic_regression
from lr_ray.vit.backbone import Backbone

OptimizerName = Literal["adam", "sgd"]
HeadStart = Literal["probe", "zeros"]
"""Of a linear head: the logistic regression of `linear-probe` (C = 1) on the features before tuning, as Kumar et al.,
Fine-Tuning can Distort Pretrained Features, ICLR 2022, arXiv 2202.10054, advise; or zeros."""

_BLOCKS_OF_A_QUERY = 4
"""A pass without gradients holds as much of an image at a time as so many blocks keep of it for the way back."""
_FLOATS_AT_ONCE = 50_000_000
"""Of the tokens that enter the blocks, support images of all episodes together: as many as those of one 5-way 5-shot episode of
a ViT-B/16 at 224 px; a step keeps some 13 times as many bytes as they have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """How the parameters and a linear head are trained together, by full-batch steps.

    Attributes:
        learning_rate: of the parameters.
        head_learning_rate: of the head.
    """

    optimizer: OptimizerName = "adam"
    learning_rate: float
    head_learning_rate: float
    num_steps: int
    head: HeadStart


def make_optimizer(name: OptimizerName, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """Adam, or SGD with a momentum of 0.9; groups of parameters with their learning rates, as torch takes them."""
    return torch.optim.Adam(groups, fused=True) if name == "adam" else torch.optim.SGD(groups, momentum=0.9, fused=True)


def episodes_at_once(_settings: object) -> int:
    """Of the methods that leave the weights alone; of large images `within_memory` takes fewer."""
    return 5


def within_memory(backbone: Backbone, adapt: Adapt) -> Adapt:
    """The same in as many parts as memory asks for."""
    model = backbone.model
    tokens = model.num_prefix_tokens + backbone.num_patches
    floats_of_tokens = tokens * backbone.num_features

    def adapt_parts(tasks: Sequence[FewShotTask], seeds: Sequence[int]) -> list[Adaptation]:
        support, queries = len(tasks[0].support) * len(model.blocks), len(tasks[0].queries) * _BLOCKS_OF_A_QUERY
        size = max(1, _FLOATS_AT_ONCE // (max(support, queries) * floats_of_tokens))
        parts = range(0, len(tasks), size)
        return [found for start in parts for found in adapt(tasks[start : start + size], seeds[start : start + size])]

    return adapt_parts


def one_by_one(adapt: Callable[[FewShotTask, int], Adaptation]) -> Adapt:
    """Of a method that changes the weights which all episodes of a call would share."""
    return lambda tasks, seeds: [adapt(task, seed) for task, seed in zip(tasks, seeds, strict=True)]


def tune_with_linear_heads(
    embed: Embed,
    tasks: Sequence[FewShotTask],
    parameters: Sequence[nn.Parameter],
    tuning: Tuning,
    *,
    penalty: Callable[[], Tensor] | None = None,
) -> list[Adaptation]:
    """Train `parameters` and a linear head for each of E tasks on its support set by cross-entropy, then score its queries.

    The loss is the sum of the tasks', and the optimizers work element by element: no task has a part in another's steps.

    Args:
        embed: the features of images that stand task by task, differentiable with respect to `parameters`.
        parameters: (E, ...), each task's own; of any shape if there is one task.
        penalty: added to the loss.
    """
    images = torch.stack([task.support for task in tasks])
    with torch.enable_grad():
        features = _embed_tasks(embed, images)
    labels = tasks[0].labels.to(features.device)
    weight, bias = _start_heads(features.detach(), labels, tuning.head)
    of_head: dict[str, object] = {"params": [weight, bias], "lr": tuning.head_learning_rate}
    of_parameters: dict[str, object] = {"params": list(parameters), "lr": tuning.learning_rate}
    optimizer = make_optimizer(tuning.optimizer, [of_head, of_parameters])
    for step in range(tuning.num_steps):
        with torch.enable_grad():
            features = _embed_tasks(embed, images) if step else features
            logits = _linear(features, weight, bias).flatten(0, 1)
            loss = len(tasks) * F.cross_entropy(logits, labels.repeat(len(tasks)))
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = _linear(_embed_tasks(embed, torch.stack([task.queries for task in tasks])), weight, bias)
    num_trained = sum(p.numel() for p in (weight, bias, *parameters)) // len(tasks)
    return [Adaptation(scores=of_task, num_trained=num_trained) for of_task in scores]


def _embed_tasks(embed: Embed, images: Tensor) -> Tensor:
    """(E, S, 3, H, W) → (E, S, D)."""
    features: Tensor = embed(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    return features


def _linear(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each task's head: (E, S, D), (E, N, D), (E, N) → (E, S, N)."""
    return features @ weight.transpose(1, 2) + bias[:, None]


def _start_heads(features: Tensor, labels: Tensor, start: HeadStart) -> tuple[nn.Parameter, nn.Parameter]:
    """(E, S, D) features and the (S,) ways of all tasks → (E, N, D) weights and (E, N) biases."""
    n_task, _, dim = features.shape
    n_way = int(labels.max()) + 1
    if start == "zeros":
        return nn.Parameter(features.new_zeros(n_task, n_way, dim)), nn.Parameter(features.new_zeros(n_task, n_way))
    weight, bias = logistic_regression(F.normalize(features, dim=-1).cpu(), labels.cpu(), c=1.0)
    mean_length = features.norm(dim=-1).mean(dim=1)[:, None, None]
    return nn.Parameter(weight.to(features) / mean_length), nn.Parameter(bias.to(features))


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with other modules in some places; the very same ones are put back on leaving."""
    originals = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, original in originals.items():
            model.set_submodule(name, original)


@contextmanager
def trainable_copies(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """All the model's parameters replaced by trainable copies; the very same ones are put back on leaving."""
    owners = [(module, name, own) for module in model.modules() for name, own in module.named_parameters(recurse=False)]
    try:
        for module, name, own in owners:
            setattr(module, name, nn.Parameter(own.detach().clone()))
        yield [getattr(module, name) for module, name, _ in owners]
    finally:
        for module, name, own in owners:
            setattr(module, name, own)
