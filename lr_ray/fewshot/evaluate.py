"""Accuracy and its 95 % confidence interval over episodes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lr_ray.fewshot.episodes import EpisodeShape
from lr_ray.fewshot.protonet import Distance, class_centres, prototype_logits

_EPISODES_AT_ONCE = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyReport:
    """Accuracy of one method on one data set.

    Attributes:
        accuracies: (E,) share of the queries classified right, per episode.
    """

    method: str
    dataset: str
    shape: EpisodeShape
    accuracies: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean())

    @property
    def ci95(self) -> float:
        """Half the width of the 95 % confidence interval: 1.96 standard errors (0 for a single episode)."""
        if len(self.accuracies) < 2:
            return 0.0
        return float(1.96 * self.accuracies.std(ddof=1) / np.sqrt(len(self.accuracies)))


def episode_accuracies(
    features: Tensor, episodes: np.ndarray, shape: EpisodeShape, *, distance: Distance = "euclidean"
) -> np.ndarray:
    """Nearest-centre accuracy of every episode, from features computed once.

    Args:
        features: (M, D) of all images.
        episodes: (E, N, S + Q) indices from `draw_test_episodes`.

    Returns:
        (E,) in [0, 1].
    """
    accuracies = []
    expected = torch.arange(shape.n_way).repeat_interleave(shape.n_query)
    for part in torch.from_numpy(episodes).split(_EPISODES_AT_ONCE):
        support = features[part[:, :, : shape.n_shot]].flatten(1, 2)
        queries = features[part[:, :, shape.n_shot :]].flatten(1, 2)
        logits = prototype_logits(queries, class_centres(support, n_way=shape.n_way), distance=distance)
        accuracies.append((logits.argmax(dim=-1) == expected).float().mean(dim=1))
    return torch.cat(accuracies).numpy()
