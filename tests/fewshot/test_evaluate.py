import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from lr_ray.fewshot.episodes import EpisodeShape, draw_test_episodes
from lr_ray.fewshot.evaluate import AccuracyReport, episode_accuracies

SHAPE = EpisodeShape(n_way=4, n_shot=3, n_query=5)
LABELS = np.repeat(np.arange(6), 10)
NUM_EPISODES = 230  # more than two of the chunks that they are computed in


def features(noise: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 8, generator=generator)
    return centres[torch.from_numpy(LABELS)] + noise * torch.randn(60, 8, generator=generator)


def test_euclidean_against_scikit_learn():
    found_in, episodes = features(2.0), draw_test_episodes(LABELS, SHAPE, num_episodes=NUM_EPISODES, seed=0)
    expected = []
    for episode in episodes:
        support, query = episode[:, :3].ravel(), episode[:, 3:].ravel()
        classifier = NearestCentroid().fit(found_in[support].numpy(), LABELS[support])
        expected.append(classifier.score(found_in[query].numpy(), LABELS[query]))
    found = episode_accuracies(found_in, episodes, SHAPE)
    assert found.shape == (NUM_EPISODES,)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert 0.25 < found.mean() < 1
    assert len(set(found)) > 5


def test_cosine_against_a_loop():
    found_in, episodes = features(2.0), draw_test_episodes(LABELS, SHAPE, num_episodes=30, seed=1)
    vectors = found_in.double().numpy()
    expected = []
    for episode in episodes:
        centres = [vectors[row[:3]].mean(axis=0) for row in episode]
        right = 0
        for truth, row in enumerate(episode):
            for query in vectors[row[3:]]:
                cosines = [query @ c / np.linalg.norm(query) / np.linalg.norm(c) for c in centres]
                right += int(np.argmax(cosines)) == truth
        expected.append(right / 20)
    found = episode_accuracies(found_in, episodes, SHAPE, distance="cosine")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not np.array_equal(found, episode_accuracies(found_in, episodes, SHAPE))


def test_perfect_features_are_always_right():
    episodes = draw_test_episodes(LABELS, SHAPE, num_episodes=20, seed=0)
    assert episode_accuracies(features(0.0), episodes, SHAPE).tolist() == [1.0] * 20


def test_features_of_the_wrong_class_are_always_wrong():
    """Support on one side, query on the side of the other class."""
    shape = EpisodeShape(n_way=2, n_shot=1, n_query=1)
    points = torch.tensor([[0.0], [1.0], [1.0], [0.0]])  # class 0: images 0, 1; class 1: images 2, 3
    assert episode_accuracies(points, np.array([[[0, 1], [2, 3]]]), shape).tolist() == [0.0]


def report(accuracies: list[float]) -> AccuracyReport:
    return AccuracyReport(method="nn", dataset="toy", shape=SHAPE, accuracies=np.array(accuracies))


def test_mean_and_ci95():
    found = report([0.2, 0.4, 0.6, 0.8])
    assert found.mean == pytest.approx(0.5)
    deviation = ((0.09 + 0.01 + 0.01 + 0.09) / 3) ** 0.5
    assert found.ci95 == pytest.approx(1.96 * deviation / 2)
    assert type(found.mean) is float
    assert type(found.ci95) is float


def test_ci95_shrinks_with_the_root_of_the_episodes():
    few, many = report([0.0, 1.0] * 50), report([0.0, 1.0] * 5000)
    assert few.ci95 / many.ci95 == pytest.approx(10, rel=0.01)


def test_a_single_episode_has_no_interval():
    assert report([0.7]).ci95 == 0.0
