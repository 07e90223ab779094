"""`nn`: nearest class centre, Euclidean, on the features of the backbone as it came."""

from torch import Tensor

from lr_ray.fewshot.methods import FeatureMethod
from lr_ray.fewshot.methods.features import BACKBONE
from lr_ray.fewshot.protonet import centres_of_ways, prototype_logits


def nearest_centre(support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Minus the Euclidean distance to the mean of each way: (E, S, D), (S,), (E, M, D) → (E, M, N)."""
    return prototype_logits(queries, centres_of_ways(support, labels))


METHOD = FeatureMethod(
    name="nn",
    source="Snell et al., Prototypical Networks, NeurIPS 2017, arXiv 1703.05175; without its training",
    features=lambda _settings: BACKBONE,
    head=lambda _settings, _trained: nearest_centre,
)
