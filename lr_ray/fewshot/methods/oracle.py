"""`oracle`: the same meta-training on the real images that the LoRAs were tuned on; what recycling aims at."""

from collections.abc import Iterator
from contextlib import contextmanager

from lr_ray.fewshot.methods import Embed, MethodInputs
from lr_ray.vit.lora import merged


@contextmanager
def oracle(inputs: MethodInputs, _argument: str) -> Iterator[Embed]:
    """The meta-LoRA trained on real images, merged into the backbone."""
    with merged(inputs.backbone.model, inputs.oracle().deltas()):
        yield inputs.embed
