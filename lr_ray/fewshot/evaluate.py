"""From an episode's scores to accuracy: its 95 % confidence interval, by class, and against another method's."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from lr_ray.fewshot.episodes import EpisodeShape
from lr_ray.fewshot.methods import Head
from lr_ray.fewshot.methods.nn import nearest_centre
from lr_ray.fewshot.protocol import DrawnEpisode, layout_of

_FLOATS_AT_ONCE = 1_000_000
"""Of the features of the episodes that are scored together: 4 MB, which a cache holds; with 128 it takes 2.7 times as long."""


def predict(features: Tensor, episodes: np.ndarray, shape: EpisodeShape, head: Head = nearest_centre) -> np.ndarray:
    """What a head makes of the queries, from features computed once.

    Args:
        features: (M, D) of all images.
        episodes: (E, N, K + Q) indices from `draw_test_episodes`.

    Returns:
        (E, N, Q) predicted ways in [0, N).
    """
    ways, is_query = layout_of(np.full(shape.n_way, shape.n_shot), shape.n_query)
    return _predict_alike(features, episodes.reshape(len(episodes), -1), ways, is_query, head)


def predict_each(features: Tensor, episodes: Iterable[DrawnEpisode], head: Head = nearest_centre) -> list[np.ndarray]:
    """The same of episodes of any shapes: each one's (N, Q) predicted ways. Those alike that follow one another go together."""
    predicted: list[np.ndarray] = []
    for _, alike in groupby(episodes, key=lambda episode: episode.composition):
        first, *others = alike
        images = np.stack([episode.images for episode in (first, *others)])
        predicted += list(_predict_alike(features, images, first.ways, first.is_query, head))
    return predicted


def _predict_alike(features: Tensor, images: np.ndarray, ways: np.ndarray, is_query: np.ndarray, head: Head) -> np.ndarray:
    """(E, I) images of episodes of one composition, as a `DrawnEpisode` has it → (E, N, Q) predicted ways."""
    at_once = max(1, _FLOATS_AT_ONCE // (images.shape[1] * features.shape[1]))
    support, queries = (torch.from_numpy(np.ascontiguousarray(images[:, chosen])) for chosen in (~is_query, is_query))
    labels = torch.from_numpy(ways[~is_query])
    predicted = [
        head(features[of_support].float(), labels, features[of_queries].float()).argmax(dim=-1).to(torch.int16)
        for of_support, of_queries in zip(support.split(at_once), queries.split(at_once), strict=True)
    ]
    found: np.ndarray = torch.cat(predicted).unflatten(1, (int(ways[-1]) + 1, -1)).numpy()
    return found


def is_right(predicted: np.ndarray) -> np.ndarray:
    """(..., N, Q) predicted ways → whether each is its own: queries stand way by way."""
    found: np.ndarray = predicted == np.arange(predicted.shape[-2])[:, None]
    return found


def episode_accuracies(features: Tensor, episodes: np.ndarray, shape: EpisodeShape) -> np.ndarray:
    """(E,) nearest-centre accuracy of every episode, in [0, 1]; arguments as of `predict`."""
    accuracies: np.ndarray = is_right(predict(features, episodes, shape)).mean(axis=(1, 2))
    return accuracies


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyReport:
    """Accuracy of one method over episodes.

    Attributes:
        right: of each episode, (N, Q) whether each query was classified right.
        classes: of each episode, (N,) the class of each way.
    """

    right: Sequence[np.ndarray]
    classes: Sequence[np.ndarray]

    @property
    def accuracies(self) -> np.ndarray:
        """(E,) share of the queries classified right, per episode."""
        return np.array([right.mean() for right in self.right])

    @property
    def mean(self) -> float:
        return float(self.accuracies.mean())

    @property
    def ci95(self) -> float:
        return ci95(self.accuracies)

    def per_class(self, class_names: Sequence[str]) -> dict[str, float]:
        """{class: mean over the episodes that hold it of the share of its queries classified right}."""
        shares = np.concatenate([right.mean(axis=1) for right in self.right])
        classes = np.concatenate(self.classes)
        return {class_names[c]: float(shares[classes == c].mean()) for c in np.unique(classes)}


def ci95(values: np.ndarray) -> float:
    """Half the width of the 95 % confidence interval of the mean: 1.96 standard errors (0 for a single value)."""
    if len(values) < 2:
        return 0.0
    return float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedDifference:
    """By how much one method is better than another on the same episodes.

    Attributes:
        mean: of the episodes' differences; positive: the first is better.
        ci95: half the width of its 95 % confidence interval.
        p_value: of a paired t-test of no difference; 1 where all episodes agree, or there is but one.
        num_episodes: that both were measured on.
    """

    mean: float
    ci95: float
    p_value: float
    num_episodes: int


def paired_difference(accuracies: np.ndarray, others: np.ndarray) -> PairedDifference:
    """Of (E,) and (F,) accuracies, of which the first min(E, F) are of the same episodes."""
    from scipy import stats  # half a second, which every worker would wait for

    count = min(len(accuracies), len(others))
    differences = accuracies[:count] - others[:count]
    if count < 2 or not differences.any():
        p_value = 1.0
    elif differences.std() == 0.0:
        p_value = 0.0
    else:
        p_value = float(stats.ttest_rel(accuracies[:count], others[:count]).pvalue)
    return PairedDifference(mean=float(differences.mean()), ci95=ci95(differences), p_value=p_value, num_episodes=count)
