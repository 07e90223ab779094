"""`lora-linear`: a new LoRA and a linear head are trained on each episode's support set."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor

from lr_ray.fewshot.methods import Adapt, Adaptation, MethodInputs, TunedMethod
from lr_ray.fewshot.methods.episode_tuning import HeadStart, Tuning, tune_with_linear_head
from lr_ray.section import Section
from lr_ray.vit.lora import LoRAConfig, attach_lora, detach_lora


class LoraLinearSettings(Section):
    """Of `lora-linear`."""

    num_steps: int = Field(default=5, ge=0)
    """Of Adam on the whole support set (the paper: 50; 5 keep an episode to two seconds of a processor)."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of LoRA and head (the paper)."""
    rank: int = Field(default=4, gt=0)
    """Of the update of query and of value, whose alpha is the same (the paper)."""
    head: HeadStart = "probe"
    """What the head starts from."""


@contextmanager
def _adapt(inputs: MethodInputs, settings: LoraLinearSettings) -> Iterator[Adapt]:
    model = inputs.backbone.model
    config = LoRAConfig(rank=settings.rank, alpha=float(settings.rank))
    tuning = Tuning(
        optimizer="adam",
        learning_rate=settings.learning_rate,
        head_learning_rate=settings.learning_rate,
        num_steps=settings.num_steps,
        head=settings.head,
    )

    def adapt(support: Tensor, queries: Tensor, seed: int) -> Adaptation:
        try:
            loras = attach_lora(model, config, generator=torch.Generator().manual_seed(seed))
            weights = [parameter for lora in loras for parameter in (lora.lora_a, lora.lora_b)]
            done = tune_with_linear_head(inputs.embed, support, queries, weights, tuning)
            masked = sum(int((lora.mask == 0).sum()) for lora in loras)
            return Adaptation(scores=done.scores, num_trained=done.num_trained - masked)
        finally:
            detach_lora(model)

    yield adapt


METHOD = TunedMethod(
    name="lora-linear",
    source="Hu et al., LoRA Recycle, CVPR 2025, arXiv 2412.02220: its LoRA + Linear; fewer steps, from the linear probe",
    settings=LoraLinearSettings,
    adapt=_adapt,
)
