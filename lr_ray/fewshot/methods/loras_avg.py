"""`loras-avg`, `loras-avg:SCALE`: nearest class centre with the average of the LoRAs, times a scale."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from lr_ray.errors import ConfigError
from lr_ray.fewshot.methods import Embed, MethodInputs
from lr_ray.vit.lora import average_deltas, merged


@contextmanager
def loras_avg(inputs: MethodInputs, argument: str) -> Iterator[Embed]:
    """The mean of the products B·A (ranks may differ), not of A and B apart."""
    try:
        scale = float(argument or 1)
        if not math.isfinite(scale):
            raise ValueError
    except ValueError:
        raise ConfigError(f"evaluation.methods: loras-avg:{argument} is not loras-avg:NUMBER, such as loras-avg:3") from None
    deltas = {name: scale * delta for name, delta in average_deltas(inputs.adapters()).items()}
    with merged(inputs.backbone.model, deltas):
        yield inputs.embed
