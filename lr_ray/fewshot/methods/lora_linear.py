"""`lora-linear`: a new LoRA and a linear head are trained on each episode's support set."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch import Tensor, nn

from lr_ray.fewshot.methods import Adapt, Adaptation, FewShotTask, MethodInputs, TunedMethod
from lr_ray.fewshot.methods.episode_tuning import (
    HeadStart,
    Tuning,
    episodes_at_once,
    replaced,
    tune_with_linear_heads,
    within_memory,
)
from lr_ray.section import Section
from lr_ray.vit.lora import LoRAConfig, LoRALinear, attach_lora, detach_lora, lora_modules

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


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


class LoRAOfEachTask(nn.Module):
    """A frozen linear layer and E trainable low-rank updates of it, each for its own task."""

    def __init__(self, loras: Sequence[LoRALinear]) -> None:
        """Args: loras, of the same layer, that the updates start from."""
        super().__init__()
        self.base, self.mask = loras[0].base, loras[0].mask
        self.lora_a = nn.Parameter(torch.stack([lora.lora_a.detach() for lora in loras]))
        self.lora_b = nn.Parameter(torch.stack([lora.lora_b.detach() for lora in loras]))

    @property
    def weight(self) -> Tensor:
        """Of the frozen layer: timm asks for it to find the device and dtype."""
        return self.base.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """(E·S, T, D_in), task by task → (E·S, T, D_out)."""
        of_tasks = inputs.reshape(len(self.lora_a), -1, inputs.shape[-1])
        update = of_tasks @ self.lora_a.transpose(1, 2) @ (self.lora_b * self.mask).transpose(1, 2)
        output: Tensor = self.base(inputs) + update.reshape(*inputs.shape[:-1], -1)
        return output


def draw_loras(model: "VisionTransformer", config: LoRAConfig, seeds: Sequence[int]) -> dict[str, LoRAOfEachTask]:
    """{module name: what to put in its place}: of each task the LoRA that `attach_lora` draws from its seed."""
    drawn = []
    for seed in seeds:
        attach_lora(model, config, generator=torch.Generator().manual_seed(seed))
        drawn.append(lora_modules(model))
        detach_lora(model)
    return {name: LoRAOfEachTask([of_task[name] for of_task in drawn]) for name in drawn[0]}


@contextmanager
def _adapt(inputs: MethodInputs, settings: LoraLinearSettings) -> Iterator[Adapt]:
    model = inputs.backbone.model
    config = LoRAConfig(rank=settings.rank, alpha=float(settings.rank))
    tuning = Tuning(
        learning_rate=settings.learning_rate,
        head_learning_rate=settings.learning_rate,
        num_steps=settings.num_steps,
        head=settings.head,
    )

    def adapt(tasks: Sequence[FewShotTask], seeds: Sequence[int]) -> list[Adaptation]:
        layers = draw_loras(model, config, seeds)
        weights = [parameter for layer in layers.values() for parameter in (layer.lora_a, layer.lora_b)]
        masked = sum(int((layer.mask == 0).sum()) for layer in layers.values())
        with replaced(model, layers):
            done = tune_with_linear_heads(inputs.embed, tasks, weights, tuning)
        return [replace(found, num_trained=found.num_trained - masked) for found in done]

    yield within_memory(inputs.backbone, adapt)


METHOD = TunedMethod(
    name="lora-linear",
    source="Hu et al., LoRA Recycle, CVPR 2025, arXiv 2412.02220: its LoRA + Linear; fewer steps, from the linear probe",
    settings=LoraLinearSettings,
    adapt=_adapt,
    at_once=episodes_at_once,
)
