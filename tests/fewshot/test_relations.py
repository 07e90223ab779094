"""Relations: views drawn once, distances that survive projection, and a loss that is zero where the student agrees."""

import pytest
import torch
from torch import Tensor

from lr_ray.fewshot.relations import directions, project, relation_loss


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(count: int = 5) -> Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def naive_loss(features: Tensor, target: Tensor, temperature: float) -> float:
    """By loops over pairs."""
    rows = []
    for points in (features, target):
        batch = len(points)
        distances = [[float((points[i] - points[j]).norm()) for j in range(batch) if j != i] for i in range(batch)]
        mean = sum(map(sum, distances)) / (batch * (batch - 1))
        rows.append([torch.tensor([-d / (temperature * mean) for d in row]).softmax(0) for row in distances])
    pairs = zip(*rows, strict=True)
    return sum(float((teacher * (teacher / student).log()).sum()) for student, teacher in pairs) / len(features)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_loss_against_a_naive_loop(temperature: float):
    features, target = random(7, 4), random(7, 9, seed=1)
    loss, _ = relation_loss(features, target, temperature)
    assert float(loss) == pytest.approx(naive_loss(features, target, temperature), rel=1e-4)


def test_no_loss_where_distances_agree_up_to_scale_rotation_and_shift():
    target = random(8, 6)
    rotation = torch.linalg.qr(random(6, 6, seed=1))[0]
    loss, agreement = relation_loss(3 * target @ rotation + 5, target, 0.2)
    assert float(loss) == pytest.approx(0, abs=1e-5)
    assert float(agreement) == 1


def test_agreement_counts_the_same_nearest_neighbours():
    target = torch.tensor([[0.0], [1.0], [10.0], [11.0]])  # nearest: 1, 0, 3, 2
    student = torch.tensor([[0.0], [1.0], [10.0], [3.0]])  # nearest: 1, 0, 3, 1
    _, agreement = relation_loss(student, target, 0.2)
    assert float(agreement) == 0.75


def test_following_the_gradient_brings_the_neighbourhoods_together():
    target = random(10, 6)
    features = random(10, 6, seed=1).requires_grad_()
    optimizer = torch.optim.Adam([features], lr=0.05)
    first, before = relation_loss(features, target, 0.2)
    for _ in range(200):
        loss, agreement = relation_loss(features, target, 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * first
    assert agreement > before


def test_a_projection_keeps_distances_and_sums_to_the_concatenation():
    one, other = random(20, 64), random(20, 96, seed=1)
    summed = project(one, width=4096, seed=1) + project(other, width=4096, seed=2)
    exact = torch.cdist(*(2 * [torch.cat([one, other], dim=1)]))
    error = (torch.cdist(summed, summed) / exact.fill_diagonal_(1) - 1).fill_diagonal_(0)
    assert error.abs().max() < 0.06  # 1 / sqrt(2 · 4096) = 0.011 is one standard error
    assert torch.equal(project(one, width=8, seed=3), project(one, width=8, seed=3))
    assert not torch.equal(project(one, width=8, seed=3), project(one, width=8, seed=4))


def test_directions_forget_what_all_images_share_and_how_large_an_adapters_features_are():
    features = random(20, 64)
    found = directions(features)
    assert torch.allclose(found.norm(dim=1), torch.ones(20))
    assert torch.allclose(directions(50 * features + 1000), found, atol=1e-3)
    apart = torch.tensor([[100.0, 1.0], [100.0, -1.0]])
    assert torch.allclose(directions(apart), torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
