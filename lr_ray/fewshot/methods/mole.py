"""`mole`: in every layer a learned gate mixes the LoRAs, trained on each episode's support set with a linear head.

Original: a layer's gate is a softmax of what all LoRAs make of the input, too many weights for a support set. Here its
logits are free weights, zero at the start, where the mixture is the average of the LoRAs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lr_ray.fewshot.methods import Adapt, Adaptation, MethodInputs, TunedMethod
from lr_ray.fewshot.methods.episode_tuning import HeadStart, Tuning, tune_with_linear_head
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
    """A frozen linear layer plus its LoRAs, mixed by a softmax over them."""

    def __init__(self, base: nn.Linear, stack: StackedLoRAs, num_adapters: int) -> None:
        super().__init__()
        self.base = base
        self.stack = stack
        self.logits = nn.Parameter(torch.zeros(num_adapters, device=base.weight.device))

    @property
    def weight(self) -> Tensor:
        """Of the frozen layer: timm asks for it to find the device and dtype."""
        return self.base.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., D_in) → (..., D_out)."""
        gate = self.logits.softmax(dim=0)[self.stack.owner]
        output: Tensor = self.base(inputs) + F.linear(F.linear(inputs, self.stack.a) * gate, self.stack.b)
        return output


def balance_loss(logits: Tensor) -> Tensor:
    """-Σ log of each LoRA's share, averaged over the layers; least when all are used alike: (L, A) → scalar."""
    return -logits.softmax(dim=1).mean(dim=0).log().sum()


@contextmanager
def gated(model: nn.Module, stacks: Mapping[str, StackedLoRAs], num_adapters: int) -> Iterator[list[nn.Parameter]]:
    """The model with a gate on every module that LoRAs update; yields the gates' logits, module by module."""
    originals: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in stacks}  # type: ignore[misc]
    try:
        layers = {name: GatedLinear(base, stacks[name], num_adapters) for name, base in originals.items()}
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield [layer.logits for layer in layers.values()]
    finally:
        for name, base in originals.items():
            model.set_submodule(name, base)


@contextmanager
def _adapt(inputs: MethodInputs, settings: MoleSettings) -> Iterator[Adapt]:
    stacks, count = stack_loras(inputs.adapters(), inputs.backbone.device)
    tuning = Tuning(
        optimizer="adam",
        learning_rate=settings.learning_rate,
        head_learning_rate=settings.head_learning_rate,
        num_steps=settings.num_steps,
        head=settings.head,
    )

    def adapt(support: Tensor, queries: Tensor, _seed: int) -> Adaptation:
        with gated(inputs.backbone.model, stacks, count) as logits:
            return tune_with_linear_head(
                inputs.embed,
                support,
                queries,
                logits,
                tuning,
                penalty=lambda: settings.balance * balance_loss(torch.stack([*logits])),
            )

    yield adapt


METHOD = TunedMethod(
    name="mole",
    source="Wu et al., Mixture of LoRA Experts, ICLR 2024, arXiv 2404.13628; the gates are free weights of each layer, "
    "not functions of its input",
    settings=MoleSettings,
    needs=lambda _settings: ("adapters",),
    adapt=_adapt,
)
