"""Canvases: valid pixels, driven by the generator alone, and able to become what a loss asks for."""

import pytest
import torch

from lr_ray.inversion.canvas import CANVASES


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", CANVASES)
def test_pixels_stay_valid_whatever_the_step(backbone, name):
    canvas = CANVASES[name](4, backbone, generator=seeded())
    for _ in range(2):
        pixels = backbone.denormalize(canvas.draw())
        assert pixels.shape == (4, 3, 32, 32)
        assert pixels.min() >= -1e-5
        assert pixels.max() <= 1 + 1e-5
        with torch.no_grad():
            for parameter in canvas.parameters():
                parameter += 50 * torch.randn(parameter.shape, generator=seeded(1))
        canvas.after_step()


@pytest.mark.parametrize("name", CANVASES)
def test_the_generator_determines_the_start(backbone, name):
    first, again, other = (CANVASES[name](4, backbone, generator=seeded(seed)).draw() for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.flatten(1).unique(dim=0)) == 4


@pytest.mark.parametrize("name", CANVASES)
def test_a_canvas_can_show_a_dark_mark_on_a_bright_ground(backbone, name):
    target = torch.full((2, 3, 32, 32), 0.9)
    target[:, :, 8:24, 12:20] = 0.1
    canvas = CANVASES[name](2, backbone, generator=seeded())
    optimizer = torch.optim.Adam(canvas.parameters(), lr=0.1)
    for _ in range(200):
        loss = (backbone.denormalize(canvas.draw()) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        canvas.after_step()
    assert loss < 0.02


def test_strokes_are_black_on_white_with_sharp_edges(backbone):
    canvas = CANVASES["strokes"](6, backbone, generator=seeded())
    pixels = backbone.denormalize(canvas.draw().detach())
    finished = canvas.finish(pixels)
    assert torch.equal(pixels[:, :1].expand_as(pixels), pixels)
    assert 0.7 < finished.median() <= finished.max() <= 1
    assert ((finished > 0.1) & (finished < 0.9)).float().mean() < 0.5 * ((pixels > 0.1) & (pixels < 0.9)).float().mean()


@pytest.mark.parametrize("name", ["pixels", "spectrum"])
def test_pixels_are_kept_as_they_are(name):
    pixels = torch.rand(2, 3, 8, 8, generator=seeded())
    assert torch.equal(CANVASES[name].finish(pixels), pixels)


def test_a_coefficient_counts_by_its_frequency_to_the_power_of_minus_one_and_a_half(backbone):
    def contrast(row: int, column: int) -> float:
        """Of the image whose only coefficient is that one, in the sigmoid's argument."""
        canvas = CANVASES["spectrum"](1, backbone, generator=seeded())
        with torch.no_grad():
            canvas.parameters()[0].zero_()[0, 0, row, column, 0] = 0.01
        return float(backbone.denormalize(canvas.draw().detach()).logit().std())

    assert contrast(0, 2) / contrast(0, 8) == pytest.approx(4**1.5, rel=1e-3)
    assert contrast(2, 0) / contrast(8, 0) == pytest.approx(4**1.5, rel=1e-3)


def test_a_spectrum_without_coefficients_is_grey(backbone):
    canvas = CANVASES["spectrum"](2, backbone, generator=seeded())
    with torch.no_grad():
        canvas.parameters()[0].zero_()
    torch.testing.assert_close(backbone.denormalize(canvas.draw()), torch.full((2, 3, 32, 32), 0.5))


def test_two_colours_become_black_on_white_with_the_commoner_as_ground():
    pixels = torch.zeros(2, 3, 8, 8)
    pixels[:] = torch.tensor([0.2, 0.4, 0.3])[:, None, None]
    pixels[0, :, 2:4, 2:4] = torch.tensor([0.9, 0.5, 0.1])[:, None, None]  # a bright mark
    pixels[1, :, 2:4, 2:4] = 0.1  # a dark one
    finished = CANVASES["two-colour"].finish(pixels)
    expected = torch.ones(2, 3, 8, 8)
    expected[:, :, 2:4, 2:4] = 0
    torch.testing.assert_close(finished, expected)


def test_an_image_of_one_colour_is_no_mark_at_all():
    assert torch.isfinite(CANVASES["two-colour"].finish(torch.full((1, 3, 8, 8), 0.4))).all()


def test_two_colours_lie_on_one_line(backbone):
    """Every pixel is between the two colours, as logits: three channels, one degree of freedom."""
    canvas = CANVASES["two-colour"](1, backbone, generator=seeded())
    with torch.no_grad():
        canvas.parameters()[0].mul_(10)
    pixels = backbone.denormalize(canvas.draw().detach())[0].flatten(1).clamp(1e-4, 1 - 1e-4)
    logits = torch.atanh(2 * pixels - 1)
    singular = torch.linalg.svdvals(logits - logits.mean(dim=1, keepdim=True))
    assert singular[1] < 0.01 * singular[0]
