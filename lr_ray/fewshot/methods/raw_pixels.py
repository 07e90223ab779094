"""`raw-pixels`: nearest class centre on the pixels; what the images alone give away."""

from collections.abc import Iterator
from contextlib import contextmanager

from lr_ray.fewshot.methods import Embed, MethodInputs


@contextmanager
def raw_pixels(_inputs: MethodInputs, _argument: str) -> Iterator[Embed]:
    """No backbone at all: (B, 3, H, W) uint8 → (B, 3·H·W) in [0, 1]."""
    yield lambda images: images.flatten(1).float() / 255
