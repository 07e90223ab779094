"""What inversion optimises: every pixel of an image, or a few numbers that it is drawn from."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lr_ray.vit.backbone import Backbone

CanvasName = Literal["pixels", "two-colour"]


class PixelCanvas:
    """(B, 3, H, W) normalised pixels, kept in the valid range after every step."""

    def __init__(self, batch: int, backbone: Backbone, *, generator: torch.Generator) -> None:
        device, side = backbone.device, backbone.image_px
        self._darkest = backbone.normalize(torch.zeros(1, 3, 1, 1, device=device))
        self._brightest = backbone.normalize(torch.ones(1, 3, 1, 1, device=device))
        noise = torch.randn(batch, 3, side, side, generator=generator).to(device)
        self._pixels = noise.clamp(self._darkest, self._brightest).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [self._pixels]

    def draw(self) -> Tensor:
        """(B, 3, H, W) normalised."""
        return self._pixels

    @torch.no_grad()
    def after_step(self) -> None:
        self._pixels.clamp_(self._darkest, self._brightest)

    @staticmethod
    def finish(pixels: Tensor) -> Tensor:
        """What is kept of (B, 3, H, W) pixels in [0, 1]: all."""
        return pixels


class TwoColourCanvas:
    """A smooth (M, M) mask between two colours: x = m·fg + (1 - m)·bg, m = σ(4·upsampled p), inside the valid range.

    For images of marks on a ground. There is no room for texture: 16² + 6 numbers an image in place of 3·H·W. The colours
    are free while the mask is sought, which keeps it smooth; they are no part of the result.
    """

    mask_px = 16

    def __init__(self, batch: int, backbone: Backbone, *, generator: torch.Generator) -> None:
        device = backbone.device
        self._backbone = backbone
        self._mask = (0.3 * torch.randn(batch, 1, self.mask_px, self.mask_px, generator=generator)).to(device).requires_grad_()
        mark = torch.randn(batch, 3, 1, 1, generator=generator)
        ground = 0.3 * torch.randn(batch, 3, 1, 1, generator=generator) - mark
        self._mark, self._ground = mark.to(device).requires_grad_(), ground.to(device).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [self._mask, self._mark, self._ground]

    def draw(self) -> Tensor:
        """(B, 3, H, W) normalised."""
        side = self._backbone.image_px
        mask = torch.sigmoid(4 * F.interpolate(self._mask, size=(side, side), mode="bicubic", align_corners=False))
        colours = mask * self._mark + (1 - mask) * self._ground
        return self._backbone.normalize(0.5 + 0.5 * torch.tanh(colours))

    def after_step(self) -> None:
        """Nothing: tanh keeps the range."""

    @staticmethod
    def finish(pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [0, 1], black on white: the commoner shade is the ground."""
        grey = pixels.mean(dim=1, keepdim=True)
        darkest, brightest = grey.amin(dim=(2, 3), keepdim=True), grey.amax(dim=(2, 3), keepdim=True)
        stretched = (grey - darkest) / (brightest - darkest).clamp_min(1e-3)
        dark_ground = stretched.mean(dim=(1, 2, 3), keepdim=True) < 0.5
        return torch.where(dark_ground, 1 - stretched, stretched).expand_as(pixels)


CANVASES: dict[CanvasName, type[PixelCanvas] | type[TwoColourCanvas]] = {"pixels": PixelCanvas, "two-colour": TwoColourCanvas}
