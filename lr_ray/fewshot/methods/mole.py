"""`mole`: in every layer a learned gate mixes the LoRAs, trained on each episode's support set with a linear head.

Original: a layer's gate is a softmax of what all LoRAs make of the input, too many weights for a support set. Here its
logits are free weights, zero at the start, where the mixture is the average of the LoRAs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lr_ray.errors import AdapterError
from lr_ray.fewshot.methods import Adapt, Adaptation, FewShotTask, MethodInputs, TunedMethod
from lr_ray.fewshot.methods.episode_tuning import (
    HeadStart,
    Tuning,
    episodes_at_once,
    replaced,
    tune_with_linear_heads,
    within_memory,
)
from lr_ray.fewshot.methods.stacked_loras import StackedLoRAs, stack_loras
from lr_ray.section import Section


class MoleSettings(Section):
    """Of `mole`."""

    num_steps: int = Field(default=5, ge=0)
    """Of Adam on the whole support set (the authors: 400; 5 keep an episode to two seconds of a processor)."""
    learning_rate: float = Field(default=0.1, gt=0)
    """Of the gates' logits (the authors: 1e-5, of a gate that reads the input)."""
    head_learning_rate: float = Field(default=1e-3, gt=0)
    """Of the linear head."""
    balance: float = Field(default=0.5, ge=0)
    """Of the loss that keeps all LoRAs in use (the authors)."""
    head: HeadStart = "probe"
    """What the head starts from."""


class GatedLinear(nn.Module):
    """A frozen linear layer plus its LoRAs, which each of E tasks mixes by its own softmax over them."""

    def __init__(self, base: nn.Linear, stack: StackedLoRAs, num_adapters: int, num_tasks: int) -> None:
        super().__init__()
        self.base = base
        self.stack = stack
        self.logits = nn.Parameter(torch.zeros(num_tasks, num_adapters, device=base.weight.device))

    @property
    def weight(self) -> Tensor:
        """Of the frozen layer: timm asks for it to find the device and dtype."""
        return self.base.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """(E·S, T, D_in), task by task → (E·S, T, D_out)."""
        gates = self.logits.softmax(dim=1)[:, None, None, self.stack.owner]
        gated = F.linear(inputs, self.stack.a).unflatten(0, (len(gates), -1)) * gates
        output: Tensor = self.base(inputs) + F.linear(gated.flatten(0, 1), self.stack.b)
        return output


def balance_loss(logits: Tensor) -> Tensor:
    """-Σ log of each LoRA's share, averaged over the layers; least when all are used alike: (..., L, A) → their sum."""
    return -logits.softmax(dim=-1).mean(dim=-2).log().sum()


@contextmanager
def gated(
    model: nn.Module, stacks: Mapping[str, StackedLoRAs], num_adapters: int, num_tasks: int = 1
) -> Iterator[list[nn.Parameter]]:
    """The model with a gate on every linear module that LoRAs update; yields the gates' (E, A) logits, module by module.

    Raises:
        AdapterError: they update none.
    """
    bases = {name: model.get_submodule(name) for name in stacks}
    layers = {
        name: GatedLinear(base, stacks[name], num_adapters, num_tasks)
        for name, base in bases.items()
        if isinstance(base, nn.Linear)
    }
    if not layers:
        raise AdapterError(
            f"none of {num_adapters} adapters updates a linear module, on which mole puts its gates; leave it out"
        )
    with replaced(model, layers):
        yield [layer.logits for layer in layers.values()]


@contextmanager
def _adapt(inputs: MethodInputs, settings: MoleSettings) -> Iterator[Adapt]:
    stacks, count = stack_loras(inputs.adapters(), inputs.backbone.device)
    tuning = Tuning(
        learning_rate=settings.learning_rate,
        head_learning_rate=settings.head_learning_rate,
        num_steps=settings.num_steps,
        head=settings.head,
    )

    def adapt(tasks: Sequence[FewShotTask], _seeds: Sequence[int]) -> list[Adaptation]:
        with gated(inputs.backbone.model, stacks, count, len(tasks)) as logits:

            def penalty() -> Tensor:
                return settings.balance * balance_loss(torch.stack([*logits], dim=1))

            return tune_with_linear_heads(inputs.embed, tasks, logits, tuning, penalty=penalty)

    yield within_memory(inputs.backbone, adapt)


METHOD = TunedMethod(
    name="mole",
    source="Wu et al., Mixture of LoRA Experts, ICLR 2024, arXiv 2404.13628; the gates are free weights of each layer, "
    "not functions of its input",
    settings=MoleSettings,
    needs=lambda _settings: ("adapters",),
    adapt=_adapt,
    at_once=episodes_at_once,
)
