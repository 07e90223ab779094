"""What the methods that are tuned on each episode's support set share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lr_ray.fewshot.methods import Adaptation, Embed
from lr_ray.fewshot.methods.linear_probe import logistic_regression

OptimizerName = Literal["adam", "sgd"]
HeadStart = Literal["probe", "zeros"]
"""Of a linear head: the logistic regression of `linear-probe` (C = 1) on the features before tuning, as Kumar et al.,
Fine-Tuning can Distort Pretrained Features, ICLR 2022, arXiv 2202.10054, advise; or zeros."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """How the parameters and a linear head are trained together, by full-batch steps.

    Attributes:
        learning_rate: of the parameters.
        head_learning_rate: of the head.
    """

    optimizer: OptimizerName
    learning_rate: float
    head_learning_rate: float
    num_steps: int
    head: HeadStart


def make_optimizer(name: OptimizerName, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    """Adam, or SGD with a momentum of 0.9; groups of parameters with their learning rates, as torch takes them."""
    return torch.optim.Adam(groups, fused=True) if name == "adam" else torch.optim.SGD(groups, momentum=0.9, fused=True)


def support_labels(support: Tensor, device: torch.device) -> Tensor:
    """(N, K, ...) → (N·K,) ways of the flattened support set."""
    return torch.arange(support.shape[0], device=device).repeat_interleave(support.shape[1])


def tune_with_linear_head(
    embed: Embed,
    support: Tensor,
    queries: Tensor,
    parameters: Sequence[nn.Parameter],
    tuning: Tuning,
    *,
    penalty: Callable[[], Tensor] | None = None,
) -> Adaptation:
    """Train `parameters` and a linear head on the support set by cross-entropy, then score the queries.

    Args:
        embed: the features, differentiable with respect to `parameters`.
        support: (N, K, 3, H, W).
        queries: (M, 3, H, W).
        penalty: added to the loss.
    """
    images = support.flatten(0, 1)
    with torch.enable_grad():
        features = embed(images)
    weight, bias = _start_head(features.detach().unflatten(0, support.shape[:2]), tuning.head)
    labels = support_labels(support, weight.device)
    of_head: dict[str, object] = {"params": [weight, bias], "lr": tuning.head_learning_rate}
    of_parameters: dict[str, object] = {"params": list(parameters), "lr": tuning.learning_rate}
    optimizer = make_optimizer(tuning.optimizer, [of_head, of_parameters])
    for step in range(tuning.num_steps):
        with torch.enable_grad():
            features = embed(images) if step else features
            loss = F.cross_entropy(F.linear(features, weight, bias), labels)
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = F.linear(embed(queries), weight, bias)
    return Adaptation(scores=scores, num_trained=sum(p.numel() for p in (weight, bias, *parameters)))


def _start_head(features: Tensor, start: HeadStart) -> tuple[nn.Parameter, nn.Parameter]:
    """(N, K, D) → (N, D) weights and (N,) biases."""
    n_way, _, dim = features.shape
    if start == "zeros":
        return nn.Parameter(features.new_zeros(n_way, dim)), nn.Parameter(features.new_zeros(n_way))
    weight, bias = logistic_regression(F.normalize(features, dim=-1)[None].cpu(), c=1.0)
    mean_length = features.norm(dim=-1).mean()
    return nn.Parameter(weight[0].to(features) / mean_length), nn.Parameter(bias[0].to(features))


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
