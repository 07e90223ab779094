"""Many LoRAs of one module side by side, so that a weighted sum of them is one product, whatever their ranks."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lr_ray.errors import AdapterError
from lr_ray.vit.lora import Adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class StackedLoRAs:
    """The updates that A adapters make to one module; R is the sum of their ranks.

    Attributes:
        a: (R, D_in).
        b: (D_out, R), each adapter's scale within.
        owner: (R,) the adapter, in [0, A), that each row of `a` and column of `b` comes from.
    """

    a: Tensor
    b: Tensor
    owner: Tensor

    def delta(self, weights: Tensor) -> Tensor:
        """(A,) weights → (D_out, D_in) the weighted sum of the products."""
        return (self.b * weights[self.owner]) @ self.a


def stack_loras(adapters: Iterable[Adapter], device: torch.device) -> tuple[dict[str, StackedLoRAs], int]:
    """{module name: its updates}, and how many adapters there are.

    Raises:
        AdapterError: no adapters, or none with a low-rank product.
    """
    parts: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
    count = 0
    for adapter in adapters:
        for name, update in adapter.modules.items():
            parts.setdefault(name, []).append((update.a, update.scale * update.b, count))
        count += 1
    if not count:
        raise AdapterError("no adapters to combine; give a folder that holds at least one")
    if not parts:
        raise AdapterError(f"none of {count} adapters has a low-rank product to combine; leave lorahub and mole out")
    return {name: _stack(of_module, device) for name, of_module in parts.items()}, count


def _stack(parts: list[tuple[Tensor, Tensor, int]], device: torch.device) -> StackedLoRAs:
    return StackedLoRAs(
        a=torch.cat([a for a, _, _ in parts]).float().to(device),
        b=torch.cat([b for _, b, _ in parts], dim=1).float().to(device),
        owner=torch.cat([torch.full((len(a),), index) for a, _, index in parts]).to(device),
    )
