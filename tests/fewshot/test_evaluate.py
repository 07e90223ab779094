import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from lr_ray.fewshot.episodes import EpisodeShape, draw_test_episodes
from lr_ray.fewshot.evaluate import AccuracyReport, episode_accuracies, is_right, paired_difference, predict
from lr_ray.fewshot.methods.nn_cosine import nearest_direction

SHAPE = EpisodeShape(n_way=4, n_shot=3, n_query=5)
LABELS = np.repeat(np.arange(6), 10)
NUM_EPISODES = 230


@pytest.fixture(autouse=True)
def _chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of 100 episodes of 32 images and 8 numbers, so that there are more than two of them."""
    monkeypatch.setattr("lr_ray.fewshot.evaluate._FLOATS_AT_ONCE", 100 * 32 * 8)


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
    found = is_right(predict(found_in, episodes, SHAPE, nearest_direction)).mean(axis=(1, 2))
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
    """Of episodes of one way with ten queries."""
    right = np.array([[np.arange(10) < round(10 * accuracy)] for accuracy in accuracies])
    return AccuracyReport(right=right, classes=np.zeros((len(accuracies), 1), dtype=int))


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


def test_accuracy_by_class():
    right = np.array([[[True, True], [True, False]], [[False, False], [True, True]]])
    found = AccuracyReport(right=right, classes=np.array([[2, 0], [0, 1]]))
    assert found.per_class(("cat", "dog", "owl", "ant")) == {"cat": 0.25, "dog": 1.0, "owl": 1.0}
    assert found.accuracies.tolist() == [0.75, 0.5]


def test_predictions_are_of_ways_in_the_order_of_the_episode():
    """Two classes of opposite features; the second episode has them the other way round, and a query of the other's."""
    features = torch.tensor([[0.0], [0.1], [1.0], [0.9], [0.2]])
    episodes = np.array([[[0, 1], [2, 3]], [[2, 3], [0, 1]], [[0, 3], [2, 4]]])
    found = predict(features, episodes, EpisodeShape(n_way=2, n_shot=1, n_query=1))
    assert found.tolist() == [[[0], [1]], [[0], [1]], [[1], [0]]]
    assert is_right(found).tolist() == [[[True], [True]], [[True], [True]], [[False], [False]]]


def test_a_paired_difference_sees_what_unpaired_intervals_do_not():
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0.3, 0.9, 600)
    better, worse = difficulty + rng.normal(0.01, 0.02, 600), difficulty
    found = paired_difference(better, worse)
    assert found.mean == pytest.approx(0.01, abs=0.002)
    assert 0 < found.ci95 < 0.002
    assert found.p_value < 1e-10
    assert paired_difference(worse, better).mean == -found.mean


def test_a_paired_difference_is_over_the_episodes_that_both_met():
    found = paired_difference(np.array([0.5, 0.7]), np.array([0.4, 0.4, 1.0]))
    assert found.num_episodes == 2
    assert found.mean == pytest.approx(0.2)


@pytest.mark.parametrize(("others", "p_value"), [([0.5, 0.7], 1.0), ([0.4, 0.6], 0.0)])
def test_a_difference_that_is_always_the_same(others: list[float], p_value: float):
    assert paired_difference(np.array([0.5, 0.7]), np.array(others)).p_value == pytest.approx(p_value, abs=1e-12)
