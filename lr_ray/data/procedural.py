"""Images that nothing was learnt for: what inverted images have to beat."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

ProceduralName = Literal["noise", "dead-leaves", "strokes"]
_OVERSAMPLING = 4


def noise(rng: np.random.Generator, side: int) -> Image.Image:
    """Gaussian noise around grey, a standard deviation of a quarter of the range."""
    pixels = 0.5 + 0.25 * rng.standard_normal((side, side, 3))
    return Image.fromarray((255 * pixels.clip(0, 1)).round().astype(np.uint8))


def dead_leaves(rng: np.random.Generator, side: int) -> Image.Image:
    """Discs of random colours, each over those before it, radii with a density of r^-3: the statistics of natural images."""
    large = side * _OVERSAMPLING
    image = Image.new("RGB", (large, large), _colour(rng))
    draw = ImageDraw.Draw(image)
    smallest, largest = 0.03 * large, 0.5 * large
    for _ in range(150):
        radius = (smallest**-2 + rng.random() * (largest**-2 - smallest**-2)) ** -0.5
        x, y = rng.uniform(0, large, 2)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=_colour(rng))
    return image.resize((side, side), Image.Resampling.BOX)


def strokes(rng: np.random.Generator, side: int) -> Image.Image:
    """One to three black Bézier curves of one width on white."""
    large = side * _OVERSAMPLING
    image = Image.new("RGB", (large, large), "white")
    draw = ImageDraw.Draw(image)
    width = rng.uniform(0.05, 0.14) * large
    t = np.linspace(0, 1, 30)[:, None]
    for _ in range(rng.integers(1, 4)):
        p = rng.uniform(0.18 * large, 0.82 * large, (4, 2))
        curve = (1 - t) ** 3 * p[0] + 3 * t * (1 - t) ** 2 * p[1] + 3 * t**2 * (1 - t) * p[2] + t**3 * p[3]
        draw.line([(float(x), float(y)) for x, y in curve], fill="black", width=round(width))
        for x, y in curve:
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill="black")
    return image.resize((side, side), Image.Resampling.BOX)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


PROCEDURAL: dict[ProceduralName, Callable[[np.random.Generator, int], Image.Image]] = {
    "noise": noise,
    "dead-leaves": dead_leaves,
    "strokes": strokes,
}
"""Name → generator and side in pixels → an RGB image."""
