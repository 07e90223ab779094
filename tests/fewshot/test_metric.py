"""The metric: the formula, by loops; what it is for; and images that leave nothing to fit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lr_ray.fewshot.methods.nn import nearest_centre
from lr_ray.fewshot.methods.nn_metric import centre_in_metric
from lr_ray.fewshot.metric import Metric, MetricConfig, fit_metric


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    """Ten classes that differ in the first four of twelve directions; within a class all others differ, and a lot."""
    generator = torch.Generator().manual_seed(3)
    centres = torch.cat([torch.randn(10, 4, generator=generator), torch.zeros(10, 8)], dim=1)
    class_of = torch.arange(10).repeat_interleave(9)
    noise = torch.randn(90, 12, generator=generator) * torch.tensor([0.3] * 4 + [3.0] * 8)
    return centres[class_of] + noise + 5, class_of


@pytest.mark.parametrize(("power", "shrinkage"), [(0.5, 0.1), (1.0, 1e-3), (0.0, 0.1)])
def test_it_is_the_formula(features: tuple[Tensor, Tensor], power: float, shrinkage: float) -> None:
    found, class_of = (value.numpy() for value in features)
    found = found.astype(np.float64)
    mean = found.mean(axis=0)
    scatter = np.zeros((12, 12))
    for c in range(10):
        members = found[class_of == c]
        for row in members - members.mean(axis=0):
            scatter += np.outer(row, row) / (90 - 10)
    shrunk = scatter + shrinkage * np.trace(scatter) / 12 * np.eye(12)
    values, vectors = np.linalg.eig(shrunk)
    mapped = (found - mean) @ (vectors @ np.diag(values ** (-power / 2)) @ vectors.T)
    length = np.mean([np.sqrt(((row - mean) ** 2).sum()) for row in found])
    expected = length * mapped / np.sqrt((mapped**2).sum(axis=1, keepdims=True))

    metric = fit_metric(*features, MetricConfig(power=power, shrinkage=shrinkage))

    torch.testing.assert_close(metric(features[0]), torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metric.weight, metric.weight.T)


def test_classes_that_noise_hides_are_told_apart(features: tuple[Tensor, Tensor]) -> None:
    found, class_of = features
    metric = fit_metric(found, class_of, MetricConfig(power=1.0))
    support, queries = found.unflatten(0, (10, 9)).split([1, 8], dim=1)
    labels = torch.arange(10)
    wanted = labels.repeat_interleave(8)

    def accuracy(head: object) -> float:
        scores = head(support.flatten(0, 1)[None], labels, queries.flatten(0, 1)[None])  # type: ignore[operator]
        return float((scores[0].argmax(dim=-1) == wanted).float().mean())

    without, within = accuracy(nearest_centre), accuracy(centre_in_metric(metric.tensors()))
    assert accuracy(centre_in_metric({})) == without
    assert without < 0.3
    assert within > 2 * without


@pytest.mark.parametrize("repeats", [1, 3])
def test_classes_without_any_spread_leave_directions_as_they_are(repeats: int) -> None:
    distinct = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    metric = fit_metric(distinct.repeat_interleave(repeats, dim=0), torch.arange(4).repeat_interleave(repeats), MetricConfig())
    torch.testing.assert_close(metric.weight, torch.eye(6))


def test_fewer_images_than_directions(features: tuple[Tensor, Tensor]) -> None:
    metric = fit_metric(features[0][:12], features[1][:12], MetricConfig())
    assert torch.isfinite(metric.weight).all()
    assert float(metric(features[0]).norm(dim=1).std()) < 1e-4


def test_one_view_is_refused() -> None:
    with pytest.raises(ValueError, match="one view differs from no other; give 0, or 2 to 100"):
        MetricConfig(views_per_image=1)


def test_tensors_and_back(features: tuple[Tensor, Tensor]) -> None:
    metric = fit_metric(*features, MetricConfig())
    again = Metric.of(metric.tensors())
    assert torch.equal(again(features[0]), metric(features[0]))
    assert again(features[0][:6].reshape(2, 3, 12)).shape == (2, 3, 12)
