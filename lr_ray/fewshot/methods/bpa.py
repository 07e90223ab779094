"""`bpa`: the Balanced-Pairwise-Affinities transform of an episode's features, then the nearest class centre."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lr_ray.fewshot.methods import FeatureMethod, Head
from lr_ray.fewshot.methods.features import BACKBONE, FeaturesName
from lr_ray.fewshot.methods.nn import nearest_centre
from lr_ray.section import Section

_NEVER = 1e3


class BPASettings(Section):
    """Of `bpa`."""

    features: FeaturesName = BACKBONE
    """What they are of."""
    regularisation: float = Field(default=0.1, gt=0)
    """Of the transport's entropy (the authors: 0.1 to 0.2)."""
    num_iterations: int = Field(default=10, gt=0)
    """Of Sinkhorn."""


def balanced_affinities(features: Tensor, *, regularisation: float, num_iterations: int) -> Tensor:
    """Row i: how much of i each of the others takes when all give and take one unit at the least cost, 1 - cosine.

    Args:
        features: (E, L, D), support and queries of an episode together.

    Returns:
        (E, L, L), each episode's highest value 1, and 1 on the diagonal.
    """
    directions = F.normalize(features, dim=-1)
    cost = 1 - directions @ directions.transpose(-2, -1)
    itself = torch.eye(cost.shape[-1], dtype=torch.bool, device=cost.device)
    kernel = -cost.masked_fill(itself, _NEVER) / regularisation
    rows = torch.zeros_like(kernel[..., 0])
    columns = torch.zeros_like(rows)
    for _ in range(num_iterations):
        rows = -(kernel + columns[..., None, :]).logsumexp(dim=-1)
        columns = -(kernel + rows[..., :, None]).logsumexp(dim=-2)
    plan = (kernel + rows[..., :, None] + columns[..., None, :]).exp()
    scaled: Tensor = (plan / plan.amax(dim=(-2, -1), keepdim=True)).masked_fill(itself, 1.0)
    return scaled


def _head(settings: BPASettings) -> Head:
    def score(support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        together = torch.cat([support, queries], dim=1)
        transformed = balanced_affinities(
            together, regularisation=settings.regularisation, num_iterations=settings.num_iterations
        )
        of_support, of_queries = transformed.split([support.shape[1], queries.shape[1]], dim=1)
        return nearest_centre(of_support, labels, of_queries)

    return score


METHOD = FeatureMethod(
    name="bpa",
    source="Shalam and Korman, The Balanced-Pairwise-Affinities Feature Transform, ICML 2024, arXiv 2407.01467; transductive",
    settings=BPASettings,
    features=lambda settings: str(settings.features),
    head=lambda settings, _trained: _head(settings),
)
