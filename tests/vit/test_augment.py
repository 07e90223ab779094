"""Augmentation: determined by the generator, and the patches to keep follow the mirroring."""

import pytest
import torch

from lr_ray.vit.augment import AugmentationConfig, augment, draw_views, random_views

BOUNDED = {
    "roll": 0.25,
    "flip": True,
    "affine": 0.4,
    "crop": 0.4,
    "thickness": 0.8,
    "blur": 1.0,
    "colour": 1.0,
    "negative": 0.5,
}
OFF = {**dict.fromkeys(BOUNDED, 0.0), "flip": False, "noise": 0.0}
ON = {**BOUNDED, "noise": 0.2}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(num_images=16, height=32, width=32):
    return torch.randint(0, 256, (num_images, 3, height, width), dtype=torch.uint8, generator=seeded(9))


def numbered_patches(num_images, rows, columns, patch_px=4):
    """(B, 3, H, W): every pixel of patch p of image i is 100·(i mod 2) + p."""
    grid = torch.arange(rows * columns, dtype=torch.uint8).reshape(rows, columns)
    grid = grid.repeat_interleave(patch_px, 0).repeat_interleave(patch_px, 1)
    return torch.stack([grid + 100 * (index % 2) for index in range(num_images)])[:, None].expand(-1, 3, -1, -1)


@pytest.mark.parametrize("config", [OFF, {**OFF, **BOUNDED}, *({**OFF, key: BOUNDED[key]} for key in BOUNDED)], ids=str)
@pytest.mark.parametrize("content", ["random", "white", "black"])
@pytest.mark.parametrize("seed", range(4))
def test_uint8_comes_out_as_floats_from_0_to_1(config, content, seed):
    images = {"random": random_images(), "white": torch.full_like(random_images(), 255)}.get(
        content, torch.zeros_like(random_images())
    )
    before = images.clone()
    pixels, keep_indices, _ = augment(images, None, AugmentationConfig(**config), grid_size=(4, 4), generator=seeded(seed))
    assert pixels.dtype == torch.float32
    assert pixels.shape == images.shape
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert keep_indices is None
    assert torch.equal(images, before), "the stored images are not touched"


def test_with_everything_off_the_images_are_only_scaled():
    images, keep_indices = random_images(), torch.arange(8).expand(16, -1)
    pixels, kept, _ = augment(images, keep_indices, AugmentationConfig(**OFF), grid_size=(4, 4), generator=seeded())
    assert torch.equal(pixels, images / 255)
    assert torch.equal(kept, keep_indices)


@pytest.mark.parametrize("option", ON)
def test_each_option_alone_changes_the_images(option):
    images = random_images()
    config = AugmentationConfig(**{**OFF, option: ON[option]})
    pixels, _, _ = augment(images, None, config, grid_size=(4, 4), generator=seeded())
    assert (pixels - images / 255).abs().max() > 0.05


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (2, 5), (5, 2), (3, 1)])
def test_the_same_content_is_kept_after_mirroring(rows, columns):
    images = numbered_patches(32, rows, columns)
    generator = seeded(1)
    keep_indices = torch.stack([torch.randperm(rows * columns, generator=generator)[:3] for _ in range(32)])
    config = AugmentationConfig(**{**OFF, "flip": True})
    pixels, kept, _ = augment(images, keep_indices, config, grid_size=(rows, columns), generator=seeded(2))
    mirrored = 0
    for index in range(32):
        original = images[index] / 255
        assert torch.equal(pixels[index], original) or torch.equal(pixels[index], original.flip(2))
        mirrored += not torch.equal(pixels[index], original)
        for before, after in zip(keep_indices[index].tolist(), kept[index].tolist(), strict=True):
            row, column = divmod(after, columns)
            patch = pixels[index, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert ((patch * 255).round() == 100 * (index % 2) + before).all()
    if columns > 1:
        assert 4 < mirrored < 28, "about half of the images"


@pytest.mark.parametrize("vertical", [False, True])
def test_a_crop_shows_a_window_within_the_image_of_at_least_the_stated_side(vertical):
    """On a ramp of columns 0 to 63 a crop is a ramp too; its slope is the share of the side that is shown."""
    ramp = torch.arange(64, dtype=torch.uint8).expand(64, 3, 64, 64)
    ramp = ramp.transpose(2, 3) if vertical else ramp
    config = AugmentationConfig(**{**OFF, "crop": 0.4})
    pixels, _, _ = augment(ramp, None, config, grid_size=(4, 4), generator=seeded(3))
    pixels = pixels.transpose(2, 3) if vertical else pixels
    assert torch.allclose(pixels, pixels[:, :1, :1], atol=1e-5), "the same window in every channel, and no shear"
    left, right = pixels[:, 0, 0, 16] * 255, pixels[:, 0, 0, 48] * 255
    shares = (right - left) / 32
    assert 0.6 - 1e-4 <= shares.min() < 0.65
    assert 0.95 < shares.max() <= 1 + 1e-4
    first = left - 16.5 * shares + 0.5  # the window's left edge, where the image's is 0
    assert first.min() >= -1e-3
    assert (first + 64 * shares).max() <= 64 + 1e-3
    left_over_right = first - (64 - first - 64 * shares)
    assert left_over_right.min() < -10
    assert left_over_right.max() > 10, "at a random place"


def test_blur_keeps_flat_images_and_calms_noisy_ones():
    config = AugmentationConfig(**{**OFF, "blur": 1.0})
    flat = torch.full((4, 3, 32, 32), 77, dtype=torch.uint8)
    blurred, _, _ = augment(flat, None, config, grid_size=(4, 4), generator=seeded())
    torch.testing.assert_close(blurred, flat / 255)
    noisy = random_images()
    blurred, _, _ = augment(noisy, None, config, grid_size=(4, 4), generator=seeded())
    assert (blurred.std(dim=(1, 2, 3)) < (noisy / 255).std(dim=(1, 2, 3))).all()


def test_blur_strikes_with_its_probability():
    images = random_images(200)
    config = AugmentationConfig(**{**OFF, "blur": 0.25})
    pixels, _, _ = augment(images, None, config, grid_size=(1, 1), generator=seeded(1))
    struck = int((pixels != images / 255).flatten(1).any(dim=1).sum())
    assert 30 <= struck <= 70


@pytest.mark.parametrize("config", [ON, {**OFF, "crop": 0.3}, {**OFF, "colour": 0.2}], ids=str)
def test_the_same_seed_gives_the_same_bits(config):
    images, keep_indices = random_images(), torch.arange(5).expand(16, -1)
    runs = [
        augment(images, keep_indices, AugmentationConfig(**config), grid_size=(4, 4), generator=seeded(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_only_the_given_generator_is_used():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    augment(random_images(), None, AugmentationConfig(**ON), grid_size=(4, 4), generator=seeded())
    assert torch.equal(torch.random.get_rng_state(), before)


IMAGES = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)


def views_of(images, seed=0, **options):
    return random_views(images, AugmentationConfig(**{**OFF, **options}), generator=seeded(seed))[0]


def test_a_roll_reaches_as_far_as_its_share_in_both_directions_the_same_for_the_batch():
    generator, config, found = seeded(), AugmentationConfig(**{**OFF, "roll": 0.125}), set()
    for _ in range(300):
        rolled, _ = random_views(IMAGES, config, generator=generator)
        row, column = divmod(int(rolled[0, 0, 0, 0]), 16)
        offset = ((16 - row + 8) % 16 - 8, (16 - column + 8) % 16 - 8)
        assert torch.equal(rolled, IMAGES.roll(offset, dims=(2, 3)))
        found.add(offset)
    assert found == {(rows, columns) for rows in range(-2, 3) for columns in range(-2, 3)}


def test_mirroring_strikes_each_image_by_itself_and_says_which():
    generator, config, patterns = seeded(), AugmentationConfig(**OFF | {"flip": True}), []
    for _ in range(200):
        views, mirrored = random_views(IMAGES, config, generator=generator)
        for view, image, says in zip(views, IMAGES, mirrored.tolist(), strict=True):
            assert torch.equal(view, image.flip(2) if says else image)
        patterns.append(tuple(mirrored.tolist()))
    assert set(patterns) == {(False, False), (False, True), (True, False), (True, True)}
    assert 160 < sum(map(sum, patterns)) < 240  # 400 draws, 4 standard deviations


def test_an_affine_view_moves_a_mark_but_keeps_the_ground_around_it():
    images = torch.zeros(300, 3, 32, 32)
    images[:, :, 14:18, 14:18] = 1
    views = views_of(images, affine=0.4)
    mass = views.sum(dim=(2, 3))[:, 0]
    assert (mass > 4).all(), "the mark stays in the picture"
    assert (mass / 16).min() < 0.75
    assert (mass / 16).max() > 1.3, "larger and smaller"
    positions = torch.arange(32.0) - 15.5
    for other_axis in (1, 2):
        centre = (views[:, 0].sum(dim=other_axis) * positions).sum(dim=1) / mass
        assert centre.min() < -1.5
        assert centre.max() > 1.5, "shifted both ways"
    ground = torch.full((8, 3, 32, 32), 0.25)
    torch.testing.assert_close(views_of(ground, affine=1.0), ground)


def test_a_mark_gets_a_pixel_thicker_or_thinner_or_stays():
    marks = torch.full((600, 3, 16, 16), 255, dtype=torch.uint8)
    marks[:, :, 4:10, 5:9] = 0
    views, _, _ = augment(marks, None, AugmentationConfig(**OFF | {"thickness": 0.6}), grid_size=(4, 4), generator=seeded())
    dark = (views[:, 0] == 0).sum(dim=(1, 2))
    assert set(dark.tolist()) == {4 * 2, 6 * 4, 8 * 6}
    shares = [(dark == pixels).float().mean().item() for pixels in (8, 24, 48)]
    assert shares == pytest.approx([0.3, 0.4, 0.3], abs=0.06)
    assert set(views.unique().tolist()) == {0, 1}


def test_negatives_strike_with_their_probability():
    images = random_images(400) / 255
    views = views_of(images, negative=0.25)
    struck = (views != images).flatten(1).any(dim=1)
    assert torch.equal(views[struck], 1 - images[struck])
    assert 65 < int(struck.sum()) < 135


def test_noise_has_its_standard_deviation_and_no_clip():
    views = views_of(torch.zeros(16, 3, 32, 32), noise=0.2)
    assert abs(float(views.std()) - 0.2) < 0.01
    assert views.min() < -0.3


def test_gradients_reach_the_pixels_through_every_view():
    pixels = (random_images() / 255).requires_grad_()
    views_of(pixels, **{**ON, "colour": 0.2}).square().sum().backward()
    assert torch.isfinite(pixels.grad).all()
    assert (pixels.grad != 0).float().mean() > 0.7


def test_riders_go_where_the_pixels_go_and_keep_their_values():
    moves = AugmentationConfig(roll=0.25, flip=True, affine=0.5, crop=0.3)
    seen, mirrored = random_views(IMAGES, moves, generator=seeded(3), riders=IMAGES[:, :2])
    assert torch.equal(seen[:, 3:], seen[:, :2])
    coloured = moves.model_copy(update={"blur": 0.5, "colour": 0.5, "negative": 0.5, "noise": 0.1})
    again, _ = random_views(IMAGES, coloured, generator=seeded(3), riders=IMAGES[:, :2])
    assert torch.equal(again[:, 3:], seen[:, 3:])
    alone, also = random_views(IMAGES, coloured, generator=seeded(3))
    assert torch.equal(again[:, :3], alone)
    assert torch.equal(mirrored, also)


FEW = random_images(5, 16, 16)


def test_views_are_the_augmented_images_in_turn():
    config = AugmentationConfig(flip=True, colour=0.3)
    views, keep = draw_views(FEW, None, config, views_per_image=3, grid_size=(4, 4), seed=7)
    assert keep is None
    assert views.dtype == torch.uint8
    generator = torch.Generator().manual_seed(7)
    for part in views.split(5):
        expected, _, _ = augment(FEW, None, config, grid_size=(4, 4), generator=generator)
        torch.testing.assert_close(part.float() / 255, expected, atol=0.5 / 255 + 1e-6, rtol=0)
    assert not torch.equal(views[:5], views[5:10])
    assert torch.equal(views, draw_views(FEW, None, config, views_per_image=3, grid_size=(4, 4), seed=7)[0])


def test_patches_to_keep_follow_each_view():
    kept = torch.arange(16).repeat(5, 1)[:, :3]
    views, keep = draw_views(FEW, kept, AugmentationConfig(flip=True), views_per_image=4, grid_size=(4, 4), seed=0)
    assert keep is not None
    assert keep.shape == (20, 3)
    for view, original, patches in zip(views, FEW.repeat(4, 1, 1, 1), keep, strict=True):
        mirrored = torch.equal(view, original.flip(2))
        assert mirrored or torch.equal(view, original)
        assert patches.tolist() == ([3, 2, 1] if mirrored else [0, 1, 2])


def test_noise_leaves_valid_pixels():
    views, _ = draw_views(FEW, None, AugmentationConfig(flip=False, noise=1.0), views_per_image=1, grid_size=(4, 4), seed=0)
    assert not torch.equal(views, FEW)
    clipped = ((views == 0) | (views == 255)).float().mean()
    assert 0.2 < clipped < 0.8, "what leaves the range is clipped, and does not wrap around"
    assert torch.nn.functional.mse_loss(views.float(), FEW.float()) > 1000
