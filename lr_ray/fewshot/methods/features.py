"""What features are of: the pixels, or the backbone with some update of its weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from pydantic import AfterValidator

from lr_ray.fewshot.methods import Embed, Ingredient, MethodInputs
from lr_ray.vit.lora import average_updates, merged

RAW_PIXELS, BACKBONE, LORAS_AVG, RECYCLE, JOINT, ORACLE = "raw-pixels", "backbone", "loras-avg", "recycle", "joint", "oracle"
_NEEDS: dict[str, tuple[Ingredient, ...]] = {
    RAW_PIXELS: (),
    BACKBONE: (),
    LORAS_AVG: ("adapters",),
    RECYCLE: ("meta_lora",),
    JOINT: ("joint",),
    ORACLE: ("oracle",),
}


def _check(name: str) -> str:
    base, colon, scale = name.partition(":")
    if base not in _NEEDS or (colon and base != LORAS_AVG):
        raise ValueError(f"no such features; there are {', '.join(_NEEDS)}, loras-avg:SCALE")
    if colon and not _is_number(scale):
        raise ValueError("the scale of loras-avg:SCALE is a number, such as loras-avg:3")
    return name


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


FeaturesName = Annotated[str, AfterValidator(_check)]
"""In a method's settings."""


def needs_of(features: str) -> tuple[Ingredient, ...]:
    """What must be there for these features."""
    return _NEEDS[features.partition(":")[0]]


@contextmanager
def embedder(inputs: MethodInputs, features: str) -> Iterator[Embed]:
    """These features of any images, for as long as the context lasts."""
    base, _, scale = features.partition(":")
    if base == RAW_PIXELS:
        yield lambda images: images.flatten(1).float() / 255
        return
    if base == BACKBONE:
        yield inputs.embed
        return
    if base == LORAS_AVG:  # the mean of the products B·A, whose ranks may differ, not of A and B apart
        updates = {name: float(scale or 1) * update for name, update in average_updates(inputs.adapters()).items()}
    else:
        updates = {RECYCLE: inputs.meta_lora, JOINT: inputs.joint, ORACLE: inputs.oracle}[base]().updates()
    with merged(inputs.backbone.model, updates):
        yield inputs.embed
