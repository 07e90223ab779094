"""`linear-probe`: logistic regression on the features of each episode's support set."""

import math

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lr_ray.fewshot.methods import FeatureMethod, Head
from lr_ray.fewshot.methods.features import BACKBONE, FeaturesName
from lr_ray.section import Section

_STEPS = 200
"""Of Nesterov's method, for 25 images at C = 1, after which the weights are within 2e-4 of the optimum (a test); times the
root of how much larger C or C times the images is, for so much flatter is the minimum."""
_IMAGES = 25


class LinearProbeSettings(Section):
    """Of `linear-probe`."""

    features: FeaturesName = BACKBONE
    """What they are of; each of unit length."""
    c: float = Field(default=1.0, gt=0, le=10_000)
    """Of scikit-learn's LogisticRegression: the weight of the support set against that of the regularisation. The authors
    fit on five augmented copies of it, which weigh as much as 5 here."""


def logistic_regression(inputs: Tensor, labels: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """The minimum of C · Σ cross-entropy + ‖W‖²/2, the bias b free, of many episodes at once.

    Args:
        inputs: (E, S, D) of unit length.
        labels: (S,) classes in [0, N) of every episode.

    Returns:
        W (E, N, D) and b (E, N).
    """
    wanted = F.one_hot(labels).T.to(inputs)
    n_way, count = wanted.shape
    gram = inputs @ inputs.transpose(-2, -1)  # W = A·X throughout, so all steps are taken on A (E, N, S)
    decay = 1 / (c * count)
    step = 1 / (1 + decay)  # the Hessian is at most half of ‖(x, 1)‖² = 2, plus the decay
    factors = ahead = inputs.new_zeros(len(inputs), n_way, count)
    bias = ahead_bias = inputs.new_zeros(len(inputs), n_way, 1)
    for iteration in range(math.ceil(_STEPS * max(1.0, c, c * count / _IMAGES) ** 0.5)):
        errors = ((ahead @ gram + ahead_bias).softmax(dim=-2) - wanted) / count
        momentum = iteration / (iteration + 3)
        before, factors = factors, ahead - step * (errors + decay * ahead)
        before_bias, bias = bias, ahead_bias - step * errors.sum(dim=-1, keepdim=True)
        ahead, ahead_bias = factors + momentum * (factors - before), bias + momentum * (bias - before_bias)
    return factors @ inputs, bias[..., 0]


def linear_head(c: float) -> Head:
    """Scores of logistic regressions that are fitted to each episode."""

    def score(support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        weights, bias = logistic_regression(F.normalize(support, dim=-1), labels, c)
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
