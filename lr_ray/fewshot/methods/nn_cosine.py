"""`nn-cosine`: nearest class centre by cosine similarity."""

from torch import Tensor

from lr_ray.fewshot.methods import FeatureMethod
from lr_ray.fewshot.methods.features import BACKBONE, FeaturesName
from lr_ray.fewshot.protonet import centres_of_ways, prototype_logits
from lr_ray.section import Section


class NNCosineSettings(Section):
    """Of `nn-cosine`."""

    features: FeaturesName = BACKBONE
    """What they are of."""


def nearest_direction(support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """Cosine of the angle to the mean of each way: (E, S, D), (S,), (E, M, D) → (E, M, N)."""
    return prototype_logits(queries, centres_of_ways(support, labels), distance="cosine")


METHOD = FeatureMethod(
    name="nn-cosine",
    source="Chen et al., Meta-Baseline, ICCV 2021, arXiv 2003.04390: its Classifier-Baseline",
    settings=NNCosineSettings,
    features=lambda settings: str(settings.features),
    head=lambda _settings, _trained: nearest_direction,
)
