"""Few-shot methods, a file each, behind one signature.

A method turns the frozen backbone into a function from images to features for as long as its context lasts; queries
then go to the nearest class centre. A method's name may carry an argument after a colon, such as `loras-avg:3`.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from lr_ray.errors import ConfigError
from lr_ray.vit.backbone import Backbone, Precision
from lr_ray.vit.lora import Adapter
from lr_ray.vit.tokens import encode_pixels

Embed = Callable[[Tensor], Tensor]
"""(B, 3, H, W) uint8 → (B, D) features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodInputs:
    """What a method may draw on; each is read only by the methods that need it."""

    backbone: Backbone
    precision: Precision
    adapters: Callable[[], Iterable[Adapter]]
    meta_lora: Callable[[], Adapter]
    oracle: Callable[[], Adapter]

    def embed(self, images: Tensor) -> Tensor:
        """The backbone as it is now."""
        return encode_pixels(self.backbone, images, precision=self.precision)


Method = Callable[[MethodInputs, str], AbstractContextManager[Embed]]


def find_method(name: str) -> tuple[Method, str]:
    """The method called `name` and the argument after its colon, if any.

    Raises:
        ConfigError: no such method.
    """
    from lr_ray.fewshot.methods.loras_avg import loras_avg
    from lr_ray.fewshot.methods.nn import nn
    from lr_ray.fewshot.methods.oracle import oracle
    from lr_ray.fewshot.methods.raw_pixels import raw_pixels
    from lr_ray.fewshot.methods.recycle import recycle

    known: dict[str, Method] = {
        "raw-pixels": raw_pixels,
        "nn": nn,
        "loras-avg": loras_avg,
        "recycle": recycle,
        "oracle": oracle,
    }
    base, _, argument = name.partition(":")
    if base not in known:
        raise ConfigError(f"evaluation.methods: {name!r} is not a method; there are {', '.join(known)}")
    if argument and base != "loras-avg":
        raise ConfigError(f"evaluation.methods: {name!r}: {base} takes no argument; only loras-avg:SCALE does")
    return known[base], argument
