"""A metric learnt from synthetic images: directions in which images of one kind differ count less.

No part of the paper. z = λ · (x − m) W / ‖(x − m) W‖, W = (Σ + s · tr(Σ) / D · I)^(−power / 2), with Σ the covariance of
features among the views of an image (or the images of a class), m their mean, and λ the mean of ‖x − m‖, so that distances
are about as long as they were.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from lr_ray.section import Section
from lr_ray.vit.augment import AugmentationConfig


class MetricConfig(Section):
    """How the metric is learnt (docs/evidence.md has what each value is worth)."""

    power: float = Field(default=0.5, ge=0)
    """Of the covariance; 0: only the mean is taken off and lengths are made equal; 1: all directions alike."""
    shrinkage: float = Field(default=0.1, gt=0)
    """Of that covariance towards one that is the same in all directions."""
    views_per_image: int = Field(default=0, ge=0, le=100)
    """Views of each synthetic image: the covariance is of how views of one image differ. 0, and always for real images: of how
    the images of a class do, as they are."""
    views: AugmentationConfig = AugmentationConfig()
    """How they are drawn."""

    @field_validator("views_per_image")
    @classmethod
    def _differ(cls, number: int) -> int:
        if number == 1:
            raise ValueError("one view differs from no other; give 0, or 2 to 100")
        return number


METRIC_TENSORS = ("mean", "weight", "length")


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """z of features.

    Attributes:
        mean: (D,) m.
        weight: (D, D) W, symmetric.
        length: () λ.
    """

    mean: Tensor
    weight: Tensor
    length: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        return self.length * F.normalize((features - self.mean) @ self.weight, dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """By the names of the attributes."""
        return {name: getattr(self, name) for name in METRIC_TENSORS}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Metric":
        """What `tensors` gave."""
        return cls(**{name: tensors[name] for name in METRIC_TENSORS})


def fit_metric(features: Tensor, kind_of: Tensor, config: MetricConfig) -> Metric:
    """The metric of some images.

    Args:
        features: (M, D) float32, on the CPU.
        kind_of: (M,) integers: the image that each is a view of, or its class.
    """
    exact = features.double()
    mean = exact.mean(dim=0)
    _, members, counts = kind_of.unique(return_inverse=True, return_counts=True)
    sums = exact.new_zeros(len(counts), exact.shape[1]).index_add_(0, members, exact)
    deviations = exact - (sums / counts[:, None])[members]
    values, vectors = torch.linalg.eigh(deviations.T @ deviations / max(1, len(exact) - len(counts)))
    widths = values.clamp(min=0) + config.shrinkage * values.mean()
    scales = widths ** (-config.power / 2) if float(widths[0]) > 0 else torch.ones_like(widths)
    weight = (vectors * scales) @ vectors.T
    length = (exact - mean).norm(dim=1).mean()
    return Metric(mean=mean.float(), weight=weight.float().contiguous(), length=length.float())
