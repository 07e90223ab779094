"""What inversion optimises: every pixel of an image, or a few numbers that it is drawn from."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lr_ray.vit.backbone import Backbone

CanvasName = Literal["pixels", "spectrum", "two-colour", "strokes"]
_COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
"""Columns: what RGB values of natural images vary along, most first (Olah et al., Feature Visualization, 2017)."""


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


class SpectrumCanvas:
    """The Fourier coefficients of an image, each weighted by its frequency^-1.5, its channels decorrelated.

    Natural images have such spectra. A step moves what is coarse further than what is fine, so that an image takes shape
    where single pixels would take on texture. A sigmoid keeps the range.
    """

    power = 1.5

    def __init__(self, batch: int, backbone: Backbone, *, generator: torch.Generator) -> None:
        device, side = backbone.device, backbone.image_px
        self._backbone = backbone
        rows, columns = torch.fft.fftfreq(side, device=device), torch.fft.rfftfreq(side, device=device)
        frequency = (rows[:, None].square() + columns.square()).sqrt().clamp_min(1 / side)
        self._weight = frequency.pow(-self.power) / (4 * side ** (self.power - 1))
        colours = torch.tensor(_COLOURS, device=device)
        self._colours = colours / colours.norm(dim=0).max()
        start = 0.01 * torch.randn(batch, 3, *frequency.shape, 2, generator=generator)
        self._coefficients = start.to(device).requires_grad_()

    def parameters(self) -> list[Tensor]:
        return [self._coefficients]

    def draw(self) -> Tensor:
        """(B, 3, H, W) normalised."""
        side = self._backbone.image_px
        weighted = torch.view_as_complex(self._coefficients) * self._weight
        channels = torch.fft.irfft2(weighted, s=(side, side), norm="ortho")
        return self._backbone.normalize(torch.einsum("bchw,dc->bdhw", channels, self._colours).sigmoid())

    def after_step(self) -> None:
        """Nothing: the sigmoid keeps the range."""

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


class StrokesCanvas:
    """Four Bézier curves of one width, black on white: what writing and signs are made of.

    37 numbers an image, with which nothing but a shape can be drawn.
    """

    num_strokes, samples, edge_px = 4, 40, 0.8

    def __init__(self, batch: int, backbone: Backbone, *, generator: torch.Generator) -> None:
        device, side = backbone.device, backbone.image_px
        self._backbone = backbone

        def draw(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=generator).to(device)

        self._points = draw(self.num_strokes, 4, 2).requires_grad_()
        self._width = draw(1).requires_grad_()
        self._presence = (1 + draw(self.num_strokes)).requires_grad_()
        t = torch.linspace(0, 1, self.samples, device=device)
        self._basis = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
        centres = (torch.arange(side, device=device) + 0.5) / side
        self._places = torch.cartesian_prod(centres, centres)

    def parameters(self) -> list[Tensor]:
        return [self._points, self._width, self._presence]

    def draw(self) -> Tensor:
        """(B, 3, H, W) normalised."""
        side = self._backbone.image_px
        curves = self._basis @ (0.1 + 0.8 * self._points.sigmoid())
        with torch.no_grad():  # the distances to all but the nearest point of a stroke need no gradient
            distances = torch.cdist(self._places, curves.flatten(1, 2)).unflatten(2, (self.num_strokes, self.samples))
        nearest = distances.argmin(dim=3).transpose(1, 2)[..., None].expand(-1, -1, -1, 2)
        distance = torch.linalg.vector_norm(self._places - curves.gather(2, nearest), dim=3).transpose(1, 2)
        half_width = 0.02 + 0.05 * self._width.sigmoid()[..., None]
        inked = torch.sigmoid((half_width - distance) * side / self.edge_px) * self._presence.sigmoid()[:, None]
        ground = (1 - inked).prod(dim=2).unflatten(1, (side, side))
        return self._backbone.normalize(ground[:, None].expand(-1, 3, -1, -1))

    def after_step(self) -> None:
        """Nothing: the sigmoid keeps the range."""

    @staticmethod
    def finish(pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [0, 1] with sharp edges, which the search cannot have."""
        return torch.sigmoid(14 * (pixels - 0.5))


CANVASES: dict[CanvasName, type[PixelCanvas] | type[SpectrumCanvas] | type[TwoColourCanvas] | type[StrokesCanvas]] = {
    "pixels": PixelCanvas,
    "spectrum": SpectrumCanvas,
    "two-colour": TwoColourCanvas,
    "strokes": StrokesCanvas,
}
