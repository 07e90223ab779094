"""Augmentation of synthetic images: takes away the texture that a student would otherwise memorise."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lr_ray.section import Section


class AugmentationConfig(Section):
    """What may happen to every image of a training episode, each drawn anew per image."""

    flip: bool = True
    """Mirror left and right, with probability one half."""
    crop: float = Field(default=0.0, ge=0, lt=1)
    """Zoom in so far that this share of the side is cut at most, at a random place; then back to size."""
    blur: float = Field(default=0.0, ge=0, le=1)
    """Probability of losing fine detail: down-sampled to between a third and the whole of the side, and up again."""
    colour: float = Field(default=0.0, ge=0, le=1)
    """Strength of random brightness, contrast and per-channel shift."""


def augment(
    images: Tensor,
    keep_indices: Tensor | None,
    config: AugmentationConfig,
    *,
    grid_size: tuple[int, int],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None]:
    """Augment a batch; patches to keep follow the mirroring.

    Args:
        images: (B, 3, H, W) uint8.
        keep_indices: (B, K) patch positions, or None.
        grid_size: patches along (H, W).
        generator: CPU generator that determines everything drawn.

    Returns:
        (B, 3, H, W) floats in [0, 1], and the (B, K) positions in them.
    """
    pixels = images.float().div_(255)
    if config.flip:
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
        if keep_indices is not None:
            columns = grid_size[1]
            flipped = keep_indices // columns * columns + (columns - 1 - keep_indices % columns)
            keep_indices = torch.where(mirrored[:, None], flipped, keep_indices)
    if config.crop:
        pixels = _crop(pixels, config.crop, generator)
    if config.blur:
        pixels = _blur(pixels, config.blur, generator)
    if config.colour:
        pixels = _colour(pixels, config.colour, generator)
    return pixels, keep_indices


def _crop(pixels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Each image's own window, by one affine sampling of the batch."""
    batch = len(pixels)
    scale = 1 - share * torch.rand(batch, generator=generator)
    centre = (1 - scale)[:, None] * (2 * torch.rand(batch, 2, generator=generator) - 1)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = centre
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _blur(pixels: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Down and up by one random factor for the batch, applied to a random part of it."""
    side = pixels.shape[-1]
    small = int(torch.randint(max(side // 3, 1), side + 1, (1,), generator=generator))
    blurred = F.interpolate(pixels, size=(small, small), mode="bilinear", antialias=True, align_corners=False)
    blurred = F.interpolate(blurred, size=pixels.shape[-2:], mode="bilinear", align_corners=False).clamp_(0, 1)
    chosen = torch.rand(len(pixels), generator=generator) < probability
    return torch.where(chosen[:, None, None, None], blurred, pixels)


def _colour(pixels: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Contrast around each image's mean, brightness, and a shift of each channel."""

    def draw(channels: int) -> Tensor:
        return strength * (2 * torch.rand(len(pixels), channels, 1, 1, generator=generator) - 1)

    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    contrasted = mean + (pixels - mean) * (1 + draw(1))
    return (contrasted * (1 + draw(1)) + 0.5 * draw(3)).clamp_(0, 1)
