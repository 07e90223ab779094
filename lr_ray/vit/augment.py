"""Random views of images: what a student of synthetic images trains on, and what inversion looks at them through.

In training they take away the texture that a student would otherwise memorise; in inversion an image must hold its
class in every view, which leaves little room for the texture in the first place.
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lr_ray.section import Section


class AugmentationConfig(Section):
    """What may happen to an image each time it is seen, drawn anew per image; in the order of the fields."""

    roll: float = Field(default=0.0, ge=0, lt=1)
    """Shift by up to this share of the side, in both directions, around the edges; the same for a whole batch."""
    flip: bool = True
    """Mirror left and right, with probability one half."""
    affine: float = Field(default=0.0, ge=0, le=1)
    """Strength of rotation (up to 0.6 rad at 1), scale and shear (0.6) and shift (a quarter of the side); edges extend."""
    crop: float = Field(default=0.0, ge=0, lt=1)
    """Zoom in so far that this share of the side is cut at most, at a random place; then back to size."""
    thickness: float = Field(default=0.0, ge=0, le=1, exclude_if=lambda share: share == 0)  # older digests hold
    """Probability that what is dark grows or shrinks by a pixel all around, as often one as the other."""
    blur: float = Field(default=0.0, ge=0, le=1)
    """Probability of losing fine detail: down-sampled to between a third and the whole of the side, and up again."""
    colour: float = Field(default=0.0, ge=0, le=1)
    """Strength of random brightness, contrast and per-channel shift."""
    negative: float = Field(default=0.0, ge=0, le=1)
    """Probability of turning dark to bright and bright to dark."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise added to every pixel, as a share of the range; the sum is not clipped."""


def augment(
    images: Tensor,
    keep_indices: Tensor | None,
    config: AugmentationConfig,
    *,
    grid_size: tuple[int, int],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A view of every image of a batch; patches to keep follow the mirroring.

    Args:
        images: (B, 3, H, W) uint8.
        keep_indices: (B, K) patch positions, or None.
        grid_size: patches along (H, W).
        generator: CPU generator that determines everything drawn.

    Returns:
        (B, 3, H, W) floats in [0, 1] (but for `noise`), the (B, K) positions in them, and (B,) bool: mirrored.
    """
    pixels, mirrored = random_views(images.float().div_(255), config, generator=generator)
    if keep_indices is not None:
        columns = grid_size[1]
        flipped = keep_indices // columns * columns + (columns - 1 - keep_indices % columns)
        keep_indices = torch.where(mirrored[:, None], flipped, keep_indices)
    return pixels, keep_indices, mirrored


def draw_views(
    images: Tensor,
    keep_indices: Tensor | None,
    config: AugmentationConfig,
    *,
    views_per_image: int,
    grid_size: tuple[int, int],
    seed: int,
) -> tuple[Tensor, Tensor | None]:
    """(M, 3, H, W) uint8 images → (V·M, 3, H, W) uint8 views and their (V·M, K) patches; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    views: list[Tensor] = []
    kept: list[Tensor] = []
    for _ in range(views_per_image):
        pixels, keep, _ = augment(images, keep_indices, config, grid_size=grid_size, generator=generator)
        views.append(pixels.mul(255).round_().clamp_(0, 255).to(torch.uint8))
        if keep is not None:
            kept.append(keep)
    return torch.cat(views), torch.cat(kept) if kept else None


def random_views(
    pixels: Tensor, config: AugmentationConfig, *, generator: torch.Generator, riders: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Views of (B, 3, H, W) pixels in [0, 1], differentiable, and (B,) bool: mirrored. Draws from a CPU generator.

    Args:
        riders: (B, R, H, W) that go where the pixels go, but keep their values; the views are (B, 3 + R, H, W) then.
    """
    moved, mirrored = _move(pixels if riders is None else torch.cat([pixels, riders], dim=1), config, generator)
    seen = _recolour(moved[:, : pixels.shape[1]], config, generator)
    return seen if riders is None else torch.cat([seen, moved[:, pixels.shape[1] :]], dim=1), mirrored


def _move(pixels: Tensor, config: AugmentationConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What changes the place of the pixels."""
    device, batch = pixels.device, len(pixels)
    mirrored = torch.zeros(batch, dtype=torch.bool, device=device)
    if config.roll:
        reach = int(config.roll * pixels.shape[-1])
        pixels = pixels.roll(torch.randint(-reach, reach + 1, (2,), generator=generator).tolist(), dims=(2, 3))
    if config.flip:
        mirrored = _strikes(batch, 0.5, generator).to(device)
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    if config.affine:
        pixels = _affine(pixels, config.affine, generator)
    if config.crop:
        pixels = _crop(pixels, config.crop, generator)
    return pixels, mirrored


def _recolour(pixels: Tensor, config: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """What changes their values."""
    device, batch = pixels.device, len(pixels)
    if config.thickness:
        pixels = _thicken(pixels, config.thickness, generator)
    if config.blur:
        pixels = _blur(pixels, config.blur, generator)
    if config.colour:
        pixels = _colour(pixels, config.colour, generator)
    if config.negative:
        inverted = _strikes(batch, config.negative, generator).to(device)
        pixels = torch.where(inverted[:, None, None, None], 1 - pixels, pixels)
    if config.noise:
        pixels = pixels + config.noise * torch.randn(pixels.shape, generator=generator).to(device)
    return pixels


def _strikes(batch: int, probability: float, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, generator=generator) < probability


def _spread(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform in [-1, 1)."""
    return 2 * torch.rand(*shape, generator=generator) - 1


def _affine(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each image turned, scaled along both axes, sheared and shifted."""
    batch = len(pixels)
    angle, shear = 0.6 * strength * _spread(generator, batch), 0.6 * strength * _spread(generator, batch)
    scale = 1 + 0.6 * strength * _spread(generator, batch, 2)
    shift = 0.5 * strength * _spread(generator, batch, 2)
    across = torch.stack([angle.cos() * scale[:, 0], shear - angle.sin() * scale[:, 1], shift[:, 0]], dim=1)
    down = torch.stack([angle.sin() * scale[:, 0], angle.cos() * scale[:, 1], shift[:, 1]], dim=1)
    return _sample(pixels, torch.stack([across, down], dim=1))


def _sample(pixels: Tensor, theta: Tensor) -> Tensor:
    """(B, 3, H, W) seen through (B, 2, 3) affine maps; edges extend."""
    grid = F.affine_grid(theta.to(pixels.device), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _crop(pixels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Each image's own window, by one affine sampling of the batch."""
    batch = len(pixels)
    scale = 1 - share * torch.rand(batch, generator=generator)
    centre = (1 - scale)[:, None] * _spread(generator, batch, 2)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = centre
    return _sample(pixels, theta)


def _thicken(pixels: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """The darkest or the brightest of each pixel and the eight around it, in a random part of the batch."""
    changed, darker = (_strikes(len(pixels), share, generator).to(pixels.device) for share in (probability, 0.5))
    darkest, brightest = -F.max_pool2d(-pixels, 3, 1, 1), F.max_pool2d(pixels, 3, 1, 1)
    grown_or_shrunk = torch.where(darker[:, None, None, None], darkest, brightest)
    return torch.where(changed[:, None, None, None], grown_or_shrunk, pixels)


def _blur(pixels: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Down and up by one random factor for the batch, applied to a random part of it."""
    side = pixels.shape[-1]
    small = int(torch.randint(max(side // 3, 1), side + 1, (1,), generator=generator))
    blurred = F.interpolate(pixels, size=(small, small), mode="bilinear", antialias=True, align_corners=False)
    blurred = F.interpolate(blurred, size=pixels.shape[-2:], mode="bilinear", align_corners=False).clamp_(0, 1)
    chosen = _strikes(len(pixels), probability, generator).to(pixels.device)
    return torch.where(chosen[:, None, None, None], blurred, pixels)


def _colour(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Contrast around each image's mean, brightness, and a shift of each channel."""

    def draw(channels: int) -> Tensor:
        return strength * _spread(generator, len(pixels), channels, 1, 1).to(pixels.device)

    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    contrasted = mean + (pixels - mean) * (1 + draw(1))
    return (contrasted * (1 + draw(1)) + 0.5 * draw(3)).clamp(0, 1)
