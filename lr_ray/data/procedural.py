"""Images that nothing was learnt for: what inverted images have to beat."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

ProceduralName = Literal["noise", "dead-leaves", "strokes", "fractals", "gradients"]
_OVERSAMPLING = 4
_ITERATIONS = 20


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


def fractals(rng: np.random.Generator, side: int) -> Image.Image:
    """The attractor of two to six random contractions (FractalDB, Kataoka et al., ACCV 2020), a colour each, on a ground."""
    count = int(rng.integers(2, 7))
    turns = [_rotations(rng.uniform(0, 2 * np.pi, count)) for _ in range(2)]
    stretches = rng.uniform(0.3, 0.85, (count, 2)) * rng.choice([-1.0, 1.0], (count, 2))
    maps = turns[0] @ (stretches[:, :, None] * turns[1])
    shifts = rng.uniform(-1, 1, (count, 2))
    likely = np.abs(np.linalg.det(maps)) + 0.01  # a map that shrinks less covers more
    points = rng.uniform(-1, 1, (4 * side**2, 2))
    for _ in range(_ITERATIONS):
        chosen = rng.choice(count, len(points), p=likely / likely.sum())
        points = np.einsum("nij,nj->ni", maps[chosen], points) + shifts[chosen]
    low, high = np.percentile(points, (1, 99), axis=0)
    cells = ((points - low) / (high - low) * (side - 1)).round().astype(int)
    inside = ((cells >= 0) & (cells < side)).all(axis=1)
    place = cells[inside, 0] * side + cells[inside, 1]
    colours = np.array([_colour(rng) for _ in range(count)], dtype=float)[chosen[inside]]
    hits = np.bincount(place, minlength=side**2)[:, None]
    drawn = np.stack([np.bincount(place, channel, minlength=side**2) for channel in colours.T], axis=1)
    ground = np.array(_colour(rng), dtype=float)
    pixels = (ground + drawn) / (1 + hits)
    return Image.fromarray(pixels.reshape(side, side, 3).round().astype(np.uint8))


def gradients(rng: np.random.Generator, side: int) -> Image.Image:
    """Two to five random colours at random places, each pixel a blend by its distances to them."""
    count = int(rng.integers(2, 6))
    places, width = rng.uniform(0, 1, (count, 2)), rng.uniform(0.25, 0.6)
    colours = np.array([_colour(rng) for _ in range(count)], dtype=float)
    axis = (np.arange(side) + 0.5) / side
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    squared = np.square(grid[:, :, None] - places).sum(axis=-1)
    weights = np.exp((squared.min(axis=-1, keepdims=True) - squared) / (2 * width**2))
    pixels = (weights / weights.sum(axis=-1, keepdims=True)) @ colours
    return Image.fromarray(pixels.round().astype(np.uint8))


def _rotations(angles: np.ndarray) -> np.ndarray:
    """(N,) radians → (N, 2, 2)."""
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cosine, -sine], axis=-1), np.stack([sine, cosine], axis=-1)], axis=-2)


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


PROCEDURAL: dict[ProceduralName, Callable[[np.random.Generator, int], Image.Image]] = {
    "noise": noise,
    "dead-leaves": dead_leaves,
    "strokes": strokes,
    "fractals": fractals,
    "gradients": gradients,
}
"""Name → generator and side in pixels → an RGB image."""
