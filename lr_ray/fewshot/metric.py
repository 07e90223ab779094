"""A metric learnt from the images that the meta-LoRA was trained on: directions in which images of one class differ count less.

No part of the paper. z = λ · (x − m) W / ‖(x − m) W‖, W = (Σ + s · tr(Σ) / D · I)^(−power / 2), with Σ the covariance of
features within classes, m their mean, and λ the mean of ‖x − m‖, so that distances are about as long as they were.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

POWER, SHRINKAGE = 0.5, 0.1
"""Chosen on `train` classes of CIFAR-FS that no LoRA knew (docs/method.md)."""


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


def fit_metric(features: Tensor, class_of: Tensor, *, power: float = POWER, shrinkage: float = SHRINKAGE) -> Metric:
    """The metric of some images.

    Args:
        features: (M, D) float32, on the CPU.
        class_of: (M,) integers.
        power: 0 for none of W, 1 to make all directions alike within a class.
        shrinkage: s, towards a Σ that is the same in all directions.
    """
    exact = features.double()
    mean = exact.mean(dim=0)
    _, members, counts = class_of.unique(return_inverse=True, return_counts=True)
    sums = exact.new_zeros(len(counts), exact.shape[1]).index_add_(0, members, exact)
    deviations = exact - (sums / counts[:, None])[members]
    values, vectors = torch.linalg.eigh(deviations.T @ deviations / max(1, len(exact) - len(counts)))
    widths = values.clamp(min=0) + shrinkage * values.mean()
    scales = widths ** (-power / 2) if float(widths[0]) > 0 else torch.ones_like(widths)
    weight = (vectors * scales) @ vectors.T
    length = (exact - mean).norm(dim=1).mean()
    return Metric(mean=mean.float(), weight=weight.float().contiguous(), length=length.float())
