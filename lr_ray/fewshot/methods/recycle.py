"""`recycle`: nearest class centre on the features of backbone + meta-LoRA, the method of this project."""

from collections.abc import Iterator
from contextlib import contextmanager

from lr_ray.fewshot.methods import Embed, MethodInputs
from lr_ray.vit.lora import merged


@contextmanager
def recycle(inputs: MethodInputs, _argument: str) -> Iterator[Embed]:
    """The meta-LoRA trained on synthetic images, merged into the backbone."""
    with merged(inputs.backbone.model, inputs.meta_lora().deltas()):
        yield inputs.embed
