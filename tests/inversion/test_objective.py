import math

import torch

from lr_ray.inversion.objective import cross_entropy, squared_norm, total_variation


def test_cross_entropy_of_each_image():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [math.log(3.0), 0.0]])
    found = cross_entropy(logits, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(found, torch.tensor([math.log(2), math.log(4 / 3), math.log(4)]))


def test_cross_entropy_of_half_precision_logits_is_fp32():
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.bfloat16)
    assert cross_entropy(logits, torch.tensor([0])).dtype == torch.float32


def test_total_variation_is_zero_for_a_constant_image():
    assert total_variation(torch.full((2, 3, 5, 5), 0.7)).tolist() == [0.0, 0.0]


def test_total_variation_adds_both_directions():
    row = torch.arange(4.0)  # a ramp of slope 1 along the width, and one of slope 2 along the height
    column = 2 * torch.arange(4.0)[:, None]
    images = torch.stack([row.expand(3, 4, 4), column.expand(3, 4, 4), (row + column).expand(3, 4, 4)])
    assert total_variation(images).tolist() == [1.0, 2.0, 3.0]


def test_total_variation_counts_rises_and_falls():
    stripes = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(1, 3, 4, 4)
    assert total_variation(stripes).tolist() == [1.0]
    assert total_variation(stripes.transpose(2, 3)).tolist() == [1.0]


def test_squared_norm_is_the_mean_square_of_each_image():
    images = torch.stack([torch.full((3, 2, 2), -3.0), torch.zeros(3, 2, 2)])
    images[1, 0] = 1.0  # one channel of three
    torch.testing.assert_close(squared_norm(images), torch.tensor([9.0, 1 / 3]))
