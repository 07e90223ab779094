"""Relations: views drawn once, distances that survive projection, and a loss that is zero where the student agrees."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lr_ray.fewshot.relations import directions, draw_views, project, relation_loss
from lr_ray.vit.augment import AugmentationConfig, augment


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


def test_views_are_the_augmented_images_in_turn():
    config = AugmentationConfig(flip=True, colour=0.3)
    views, keep = draw_views(images(), None, config, views_per_image=3, grid_size=(4, 4), seed=7)
    assert keep is None
    assert views.dtype == torch.uint8
    generator = torch.Generator().manual_seed(7)
    for part in views.split(5):
        expected, _, _ = augment(images(), None, config, grid_size=(4, 4), generator=generator)
        torch.testing.assert_close(part.float() / 255, expected, atol=0.5 / 255 + 1e-6, rtol=0)
    assert not torch.equal(views[:5], views[5:10])
    assert torch.equal(views, draw_views(images(), None, config, views_per_image=3, grid_size=(4, 4), seed=7)[0])


def test_patches_to_keep_follow_each_view():
    kept = torch.arange(16).repeat(5, 1)[:, :3]
    views, keep = draw_views(images(), kept, AugmentationConfig(flip=True), views_per_image=4, grid_size=(4, 4), seed=0)
    assert keep is not None
    assert keep.shape == (20, 3)
    for view, original, patches in zip(views, images().repeat(4, 1, 1, 1), keep, strict=True):
        mirrored = torch.equal(view, original.flip(2))
        assert mirrored or torch.equal(view, original)
        assert patches.tolist() == ([3, 2, 1] if mirrored else [0, 1, 2])


def test_noise_leaves_valid_pixels():
    views, _ = draw_views(
        images(), None, AugmentationConfig(flip=False, noise=1.0), views_per_image=1, grid_size=(4, 4), seed=0
    )
    assert not torch.equal(views, images())
    clipped = ((views == 0) | (views == 255)).float().mean()
    assert 0.2 < clipped < 0.8, "what leaves the range is clipped, and does not wrap around"
    assert F.mse_loss(views.float(), images().float()) > 1000
