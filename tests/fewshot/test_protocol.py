"""Episodes of ways and shots that vary, held to Meta-Dataset's formulas, and what heads make of them."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from lr_ray.errors import EpisodeError
from lr_ray.fewshot.episodes import EpisodeShape, draw_test_episodes
from lr_ray.fewshot.evaluate import AccuracyReport, is_right, predict, predict_each
from lr_ray.fewshot.protocol import DrawnEpisode, VaryingShape, draw_counts, draw_episodes

SIZES = (4, 13, 20, 31, 150, 8, 9, 60, 7, 300, 45, 12)
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(100, 112), SIZES))
SMALL = VaryingShape(ways=(2, 6), max_query=3, max_support=20, max_support_per_class=8)


def counts(num_images: list[int], shape: VaryingShape, beta: float, alphas: list[float]) -> tuple[list[int], int]:
    """Section 3.2 of the paper, class by class: shots and queries for a beta in (0, 1] and an alpha of each class."""
    queries = min(shape.max_query, math.floor(0.5 * min(num_images)))
    size = min(
        shape.max_support, sum(math.ceil(beta * min(shape.max_support_per_class, count - queries)) for count in num_images)
    )
    total = sum(math.exp(alpha) * count for alpha, count in zip(alphas, num_images, strict=True))
    shots = []
    for alpha, count in zip(alphas, num_images, strict=True):
        share = math.exp(alpha) * count / total
        shots.append(min(math.floor(share * (size - len(num_images))) + 1, count - queries))
    return shots, queries


@pytest.mark.parametrize("shape", [VaryingShape(), SMALL], ids=["as in Meta-Dataset", "small"])
@pytest.mark.parametrize("seed", range(8))
def test_counts_are_the_papers(seed: int, shape: VaryingShape) -> None:
    num_images = np.random.default_rng(100 + seed).integers(2, 400, size=12)
    shots, queries = draw_counts(num_images, shape, np.random.default_rng(seed))
    again = np.random.default_rng(seed)
    beta = 1 - again.random()
    alphas = again.uniform(math.log(0.5), math.log(2), size=12).tolist()
    assert (shots.tolist(), queries) == counts(num_images.tolist(), shape, beta, alphas)


@pytest.mark.parametrize("shape", [VaryingShape(), SMALL], ids=["as in Meta-Dataset", "small"])
def test_episodes_keep_the_bounds(shape: VaryingShape) -> None:
    drawn = draw_episodes(LABELS, shape, num_episodes=400, seed=0)
    size_of = Counter(LABELS.tolist())
    for episode in drawn:
        n_way, num_query = episode.size
        classes = LABELS[episode.images]
        ways, support = (
            [np.unique(classes[episode.ways == way]) for way in range(n_way)],
            Counter(episode.support_ways.tolist()),
        )
        assert [len(found) for found in ways] == [1] * n_way
        assert len(np.unique(ways)) == n_way
        assert len(np.unique(episode.images)) == len(episode.images) == len(episode.support) + n_way * num_query
        sizes = [size_of[int(found[0])] for found in ways]
        assert num_query == min(shape.max_query, min(sizes) // 2)
        assert n_way <= len(episode.support) <= shape.max_support
        assert all(1 <= support[way] <= size - num_query for way, size in enumerate(sizes))
        assert (np.diff(episode.ways) >= 0).all()
        assert all((np.diff(episode.is_query[episode.ways == way].astype(int)) >= 0).all() for way in range(n_way))
        assert (episode.ways[episode.is_query].reshape(n_way, num_query) == np.arange(n_way)[:, None]).all()
    found = Counter(episode.n_way for episode in drawn)
    fewest, most = shape.ways[0], min(shape.ways[1], 12)
    assert set(found) == set(range(fewest, most + 1))
    assert max(found.values()) < 2 * 400 / (most - fewest + 1)
    assert {int(c) for episode in drawn for c in LABELS[episode.images]} == set(range(100, 112))
    assert any(len(set(Counter(episode.support_ways.tolist()).values())) > 1 for episode in drawn)


def test_larger_classes_have_more_shots() -> None:
    shots = np.stack([draw_counts(np.array([50, 50, 400]), VaryingShape(), np.random.default_rng(i))[0] for i in range(300)])
    assert shots[:, 2].mean() > 3 * shots[:, 0].mean()
    assert shots[:, 0].mean() == pytest.approx(shots[:, 1].mean(), rel=0.15)


def same(one: DrawnEpisode, other: DrawnEpisode) -> bool:
    return np.array_equal(one.images, other.images) and one.composition == other.composition


def test_an_episode_is_the_same_for_a_seed_and_index() -> None:
    first = draw_episodes(LABELS, SMALL, num_episodes=20, seed=5)
    assert all(map(same, first, draw_episodes(LABELS, SMALL, num_episodes=20, seed=5)))
    assert all(map(same, first[:7], draw_episodes(LABELS, SMALL, num_episodes=7, seed=5)))
    assert not any(map(same, first, draw_episodes(LABELS, SMALL, num_episodes=20, seed=6)))
    assert len({episode.images.tobytes() for episode in first}) == 20


def test_episodes_of_a_fixed_shape_are_those_that_are_drawn_together() -> None:
    shape = EpisodeShape(n_way=3, n_shot=2, n_query=1)
    together = draw_test_episodes(LABELS, shape, num_episodes=9, seed=1)
    drawn = draw_episodes(LABELS, shape, num_episodes=9, seed=1)
    for episode, expected in zip(drawn, together, strict=True):
        assert episode.size == (3, 1)
        assert np.array_equal(episode.images, expected.ravel())
        assert np.array_equal(episode.support, expected[:, :2].ravel())
        assert np.array_equal(episode.queries, expected[:, 2:].ravel())
        assert episode.support_ways.tolist() == [0, 0, 1, 1, 2, 2]


def test_too_few_classes() -> None:
    with pytest.raises(EpisodeError, match="episodes of 13 and more ways: the data have 12 classes; lower ways or give more"):
        draw_episodes(LABELS, VaryingShape(ways=(13, 20)), num_episodes=1, seed=0)


def test_too_few_images() -> None:
    labels = np.append(LABELS, [999])
    with pytest.raises(EpisodeError, match="class 999 has 1 images, but a shot and a query need 2; give more or leave it out"):
        draw_episodes(labels, SMALL, num_episodes=1, seed=0)


# ------------------------------------------------------------------------------------------------------- predictions


def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(12, 8, generator=generator)
    return centres[torch.from_numpy(LABELS - 100)] + 1.5 * torch.randn(len(LABELS), 8, generator=generator)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # scikit-learn's, of deviations within ways of one shot
def test_varying_episodes_against_scikit_learn() -> None:
    found_in, drawn = features(), draw_episodes(LABELS, SMALL, num_episodes=60, seed=0)
    predicted = predict_each(found_in, drawn)
    classes = [LABELS[episode.queries.reshape(episode.size)[:, 0]] for episode in drawn]
    report = AccuracyReport(right=[is_right(ways) for ways in predicted], classes=classes)
    right: dict[int, list[float]] = {}
    expected = []
    for episode in drawn:
        classifier = NearestCentroid().fit(found_in[episode.support].numpy(), LABELS[episode.support])
        hits = classifier.predict(found_in[episode.queries].numpy()) == LABELS[episode.queries]
        expected.append(hits.mean())
        for c in np.unique(LABELS[episode.queries]):
            right.setdefault(int(c), []).append(hits[LABELS[episode.queries] == c].mean())
    np.testing.assert_allclose(report.accuracies, expected, atol=1e-6)
    assert 0.3 < report.mean < 0.95
    names = {c: f"class {c}" for c in right}
    assert report.per_class(names) == pytest.approx({names[c]: np.mean(hits) for c, hits in right.items()})  # type: ignore[arg-type]


def test_episodes_that_are_alike_go_together_wherever_they_stand() -> None:
    found_in, fixed = features(), EpisodeShape(n_way=4, n_shot=1, n_query=2)
    alike = draw_episodes(LABELS, fixed, num_episodes=5, seed=3)
    varying = draw_episodes(LABELS, SMALL, num_episodes=3, seed=3)
    calls: list[int] = []

    def head(support: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        calls.append(len(support))
        return -torch.stack(
            [(queries - support[:, labels == way].mean(1, True)).norm(dim=-1) for way in labels.unique()], dim=-1
        )

    found = predict_each(found_in, [*alike[:3], *varying, *alike[3:]], head)
    assert calls == [3, 1, 1, 1, 2]
    dense = draw_test_episodes(LABELS, fixed, num_episodes=5, seed=3)
    assert np.array_equal(np.stack([*found[:3], *found[6:]]), predict(found_in, dense, fixed))
    for ways, episode in zip(found[3:6], varying, strict=True):
        assert ways.shape == episode.size
        assert np.array_equal(ways, predict_each(found_in, [episode])[0])
