"""`linear-probe`: logistic regression on the features of each episode's support set."""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lr_ray.fewshot.methods import FeatureMethod, Head
from lr_ray.fewshot.methods.features import BACKBONE, FeaturesName
from lr_ray.section import Section

_STEPS = 200
"""Of Nesterov's method, times √C above 1, after which the weights are within 2e-4 of the optimum (a test)."""


class LinearProbeSettings(Section):
    """Of `linear-probe`."""

    features: FeaturesName = BACKBONE
    """What they are of; each of unit length."""
    c: float = Field(default=1.0, gt=0)
    """Of scikit-learn's LogisticRegression: the weight of the support set against that of the regularisation."""


def logistic_regression(support: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """The minimum of C · Σ cross-entropy + ‖W‖²/2, the bias b free, of many episodes at once.

    Args:
        support: (E, N, K, D) of unit length.

    Returns:
        W (E, N, D) and b (E, N).
    """
    n_way, n_shot = support.shape[1:3]
    inputs = F.pad(support.flatten(1, 2), (0, 1), value=1.0)  # (E, N·K, D + 1), the last for the bias
    wanted = torch.eye(n_way, dtype=inputs.dtype).repeat_interleave(n_shot, dim=0)
    decay = torch.full((inputs.shape[-1],), 1 / (c * n_way * n_shot), dtype=inputs.dtype)
    decay[-1] = 0.0
    step = 1.0 / (1.0 + float(decay[0]))  # the Hessian is at most half of the largest ‖x‖² = 2, plus the decay
    weights = ahead = torch.zeros(len(inputs), n_way, inputs.shape[-1], dtype=inputs.dtype)
    for iteration in range(math.ceil(_STEPS * max(1.0, c) ** 0.5)):
        errors = (inputs @ ahead.transpose(-2, -1)).softmax(dim=-1) - wanted
        gradient = errors.transpose(-2, -1) @ inputs / (n_way * n_shot) + decay * ahead
        before, weights = weights, ahead - step * gradient
        ahead = weights + iteration / (iteration + 3) * (weights - before)
    return weights[..., :-1], weights[..., -1]


def linear_head(c: float) -> Head:
    """Scores of logistic regressions that are fitted to each episode."""

    def score(support: Tensor, queries: Tensor) -> Tensor:
        weights, bias = logistic_regression(F.normalize(support, dim=-1), c)
        return F.normalize(queries, dim=-1) @ weights.transpose(-2, -1) + bias[:, None]

    return score


METHOD = FeatureMethod(
    name="linear-probe",
    source="Tian et al., Rethinking Few-Shot Image Classification, ECCV 2020, arXiv 2003.11539: logistic regression, C = 1",
    settings=LinearProbeSettings,
    features=lambda settings: str(settings.features),
    head=lambda settings, _trained: linear_head(settings.c),
    num_trained=lambda _settings, n_way, dim: n_way * (dim + 1),
)
