"""LoRA on timm's Vision Transformer: attach, train, extract, merge, average.

A weight update is a low-rank product on a timm module, ΔW = scale · B·A. Query, key and value share timm's fused
`attn.qkv`; an adapter on some of the three is an adapter on the fused module whose B has rows of zeros. What an adapter
changes besides (biases, norms, weights by more than a low rank) is a shift: a tensor added to a parameter.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from lr_ray.errors import AdapterError, ConfigError
from lr_ray.section import Section
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.tokens import Pool

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

Target = Literal["q", "k", "v", "proj", "fc1", "fc2"]
_QKV_PART = {"q": 0, "k": 1, "v": 2}
_MODULE = {"q": "attn.qkv", "k": "attn.qkv", "v": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


class LoRAConfig(Section):
    """Where LoRA sits and how large it is."""

    targets: tuple[Target, ...] = ("q", "v")
    """Which linear maps of every block."""
    rank: int = Field(default=4, gt=0)
    """Rank of each target's update."""
    alpha: float = Field(default=4.0, gt=0)
    """The update is scaled by alpha / rank."""
    rank_pattern: dict[str, int] = {}
    """Other ranks, by target (`v`) or by block and target (`3.v`), the latter first."""
    alpha_pattern: dict[str, float] = {}
    """Other alphas, in the same way."""

    def rank_of(self, block: int, target: str) -> int:
        return self.rank_pattern.get(f"{block}.{target}", self.rank_pattern.get(target, self.rank))

    def alpha_of(self, block: int, target: str) -> float:
        return self.alpha_pattern.get(f"{block}.{target}", self.alpha_pattern.get(target, self.alpha))


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """One module's update, ΔW = scale · b @ a: a (R, D_in), b (D_out, R)."""

    a: Tensor
    b: Tensor
    scale: float

    def delta(self) -> Tensor:
        """(D_out, D_in) the update of the weight."""
        return (self.b @ self.a) * self.scale


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """What is known of an adapter without its weights.

    Attributes:
        backbone_digest, license: "" where unknown.
        image_px: side of the images that it was tuned on, or None where unknown.
    """

    adapter_id: str
    digest: str
    backbone: str
    backbone_digest: str
    class_names: tuple[str, ...]
    license: str = ""
    image_px: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """One LoRA and its head.

    Attributes:
        spec: identity and provenance.
        modules: {timm module name: its update}.
        head_weight, head_bias: (C, D) and (C,), or None for one without classes, such as a meta-LoRA.
        shifts: {timm parameter name: what is added to it besides}.
        pool: what the head reads; (C, 2·D) with `cls+patches`.
        mean, std: the normalisation of images that it was tuned with, per channel of [0, 1] pixels; None: the backbone's.
    """

    spec: AdapterSpec
    modules: dict[str, LowRank]
    head_weight: Tensor | None = None
    head_bias: Tensor | None = None
    shifts: dict[str, Tensor] = field(default_factory=dict)
    pool: Pool = "cls"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def updates(self) -> dict[str, Tensor]:
        """{parameter name: all that is added to it}; what has more than two dimensions is flattened to (D_out, D_in)."""
        found = {f"{name}.weight": low_rank.delta() for name, low_rank in self.modules.items()}
        for name, shift in self.shifts.items():
            flat = shift.flatten(1) if shift.ndim > 2 else shift
            found[name] = found[name] + flat if name in found else flat
        return found

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) features by its `pool` → (B, C).

        Raises:
            AdapterError: it has no head.
        """
        if self.head_weight is None:
            raise AdapterError(f"adapter {self.spec.adapter_id} has no head, so it has no classes; remove it")
        return F.linear(features, self.head_weight, self.head_bias)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a unique name."""
        tensors = {f"{name}.a": low_rank.a for name, low_rank in self.modules.items()}
        tensors |= {f"{name}.b": low_rank.b for name, low_rank in self.modules.items()}
        tensors |= {f"{name}.scale": torch.tensor(low_rank.scale) for name, low_rank in self.modules.items()}
        tensors |= {f"{name}.shift": shift for name, shift in self.shifts.items()}
        head = {"head.weight": self.head_weight, "head.bias": self.head_bias}
        return tensors | {name: value for name, value in head.items() if value is not None}

    def to(self, device: torch.device) -> "Adapter":
        moved = {name: replace(m, a=m.a.to(device), b=m.b.to(device)) for name, m in self.modules.items()}
        head_weight = None if self.head_weight is None else self.head_weight.to(device)
        head_bias = None if self.head_bias is None else self.head_bias.to(device)
        shifts = {name: shift.to(device) for name, shift in self.shifts.items()}
        return replace(self, modules=moved, head_weight=head_weight, head_bias=head_bias, shifts=shifts)


class LoRALinear(nn.Module):
    """A frozen linear layer and a trainable low-rank update of it.

    Each target of the module owns `rank` rows of `lora_a` and columns of `lora_b`; `mask` holds the columns of `lora_b`
    to the rows of their own target (the query's third of qkv, say).
    """

    def __init__(self, base: nn.Linear, slots: list[tuple[slice, int, float]], *, generator: torch.Generator) -> None:
        """Args: base, frozen; slots, per target its rows of the output, rank and scale; generator, seeds `lora_a`."""
        super().__init__()
        total = sum(rank for _, rank, _ in slots)
        self.base = base
        self.slots = slots
        weight = base.weight
        a = torch.empty(total, base.in_features)
        nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
        self.lora_a = nn.Parameter(a.to(weight.device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, total, device=weight.device))
        mask = torch.zeros(base.out_features, total, device=weight.device)
        start = 0
        for rows, rank, scale in slots:
            mask[rows, start : start + rank] = scale
            start += rank
        self.register_buffer("mask", mask, persistent=False)
        self.mask: Tensor

    @property
    def weight(self) -> Tensor:
        """Of the frozen layer: timm asks for it to find the device and dtype."""
        return self.base.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., D_in) → (..., D_out)."""
        output: Tensor = self.base(inputs) + F.linear(F.linear(inputs, self.lora_a), self.lora_b * self.mask)
        return output

    def low_rank(self) -> LowRank:
        """The update with the scales folded into b, unless all targets have the same."""
        scales = {scale for _, _, scale in self.slots}
        scale = scales.pop() if len(scales) == 1 else 1.0
        return LowRank(a=self.lora_a.detach().clone(), b=(self.lora_b * self.mask).detach() / scale, scale=scale)

    @torch.no_grad()
    def load_delta(self, delta: Tensor) -> None:
        """Become the best approximation of `delta` (D_out, D_in) at the targets' ranks (truncated SVD).

        Ranks that `delta` does not fill keep their random `lora_a`, and a zero `lora_b`: with both zero they would never learn.
        """
        start = 0
        for rows, rank, scale in self.slots:
            u, s, vh = torch.linalg.svd(delta[rows].double(), full_matrices=False)
            filled = min(rank, int((s > s[0] * max(delta.shape) * torch.finfo(delta.dtype).eps).sum()))
            root = (s[:filled] / scale).sqrt()
            self.lora_a[start : start + filled].copy_(root[:, None] * vh[:filled])
            self.lora_b[rows, start : start + rank] = 0.0
            self.lora_b[rows, start : start + filled] = (u[:, :filled] * root).to(self.lora_b)
            start += rank


def attach_lora(model: "VisionTransformer", config: LoRAConfig, *, generator: torch.Generator) -> list[LoRALinear]:
    """Put a trainable LoRA, whose update is zero, on the targets of every block; `detach_lora` takes it off.

    Raises:
        ConfigError: no targets, or a rank above the size of its module.
    """
    if not config.targets:
        raise ConfigError("lora.targets is empty; name at least one of q, k, v, proj, fc1, fc2")
    sites = {*config.targets, *(f"{block}.{target}" for block in range(len(model.blocks)) for target in config.targets)}
    if unknown := [key for key in (*config.rank_pattern, *config.alpha_pattern) if key not in sites]:
        raise ConfigError(
            f"lora pattern {unknown[0]!r} names no target; allowed: {', '.join(config.targets)}, or one of them after a "
            f"block, 0 to {len(model.blocks) - 1}, such as 0.{config.targets[0]}"
        )
    attached = []
    for index, block in enumerate(model.blocks):
        for name in dict.fromkeys(_MODULE[target] for target in config.targets):
            parent, attribute = block.get_submodule(name.split(".")[0]), name.split(".")[1]
            base: nn.Linear = getattr(parent, attribute)
            slots = []
            for target in (t for t in dict.fromkeys(config.targets) if _MODULE[t] == name):
                third = base.out_features // 3
                part = _QKV_PART.get(target)
                rows = slice(0, base.out_features) if part is None else slice(part * third, (part + 1) * third)
                rank = config.rank_of(index, target)
                if not 0 < rank <= (limit := min(rows.stop - rows.start, base.in_features)):
                    detach_lora(model)
                    raise ConfigError(f"lora rank {rank} of {index}.{target}: must be 1 to {limit}")
                slots.append((rows, rank, config.alpha_of(index, target) / rank))
            lora = LoRALinear(base, slots, generator=generator)
            setattr(parent, attribute, lora)
            attached.append(lora)
    return attached


def lora_modules(model: nn.Module) -> dict[str, LoRALinear]:
    """{timm module name: the LoRA that sits on it}."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def detach_lora(model: nn.Module) -> None:
    """Put the frozen layers back as they were."""
    for name, module in lora_modules(model).items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module.base)


def extract_lora(model: nn.Module) -> dict[str, LowRank]:
    """{timm module name: update} of the LoRA that is attached."""
    return {name: module.low_rank() for name, module in lora_modules(model).items()}


def merge(model: nn.Module, updates: Mapping[str, Tensor]) -> None:
    """Put W + ΔW in place of W, for good.

    Args:
        model: the backbone.
        updates: {parameter name: what is added to it, of its shape or as (D_out, D_in)}.
    """
    for name, update in updates.items():
        value = model.get_parameter(name)
        _put(model, name, nn.Parameter(value + update.to(value).reshape(value.shape), requires_grad=False))


@contextmanager
def merged(model: nn.Module, updates: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with W + ΔW in place of W; the very same W is put back on leaving, so that nothing drifts.

    Args:
        model: the backbone.
        updates: {parameter name: what is added to it, of its shape or as (D_out, D_in)}.
    """
    originals = {name: model.get_parameter(name) for name in updates}
    try:
        merge(model, updates)
        yield
    finally:
        for name, value in originals.items():
            _put(model, name, value)


def _put(model: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


def as_tuned(adapter: Adapter, backbone: Backbone) -> Backbone:
    """The backbone with the normalisation of images that the adapter was tuned with."""

    def tensor(value: tuple[float, ...] | None, default: Tensor) -> Tensor:
        return default if value is None else torch.tensor(value, device=backbone.device)

    return replace(backbone, mean=tensor(adapter.mean, backbone.mean), std=tensor(adapter.std, backbone.std))


def average_updates(adapters: Iterable[Adapter]) -> dict[str, Tensor]:
    """Mean over adapters of the products B·A, not of A and B apart, and of the shifts; one adapter in memory at a time.

    Raises:
        AdapterError: no adapters.
    """
    total: dict[str, Tensor] = {}
    count = 0
    for adapter in adapters:
        count += 1
        for name, update in adapter.updates().items():
            total[name] = total[name].add_(update) if name in total else update.clone()
    if not count:
        raise AdapterError("no adapters to average; give a folder that holds at least one")
    return {name: value.div_(count) for name, value in total.items()}


def check_adapter(adapter: Adapter, backbone: Backbone) -> None:
    """Raise unless the adapter is sound and made for this backbone.

    Raises:
        AdapterError: another backbone or image size, NaN or infinite weights, modules or shapes that it does not have.
    """
    spec = adapter.spec
    if spec.backbone_digest and spec.backbone_digest != backbone.digest:
        raise AdapterError(
            f"adapter {spec.adapter_id} was tuned on {spec.backbone!r} (digest {spec.backbone_digest[:12]}), not on "
            f"{backbone.name!r} (digest {backbone.digest[:12]}); set backbone.name to the former or remove the adapter"
        )
    for name, tensor in adapter.tensors().items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"adapter {spec.adapter_id} has NaN or infinite weights in {name}; it is damaged: "
                "get it again from its source or remove it"
            )
    layers, parameters = dict(backbone.model.named_modules()), dict(backbone.model.named_parameters())
    for name, low_rank in adapter.modules.items():
        layer = layers.get(name)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise AdapterError(f"adapter {spec.adapter_id} has weights for {name}, which {backbone.name!r} lacks")
        if (low_rank.b.shape[0], low_rank.a.shape[1]) != layer.weight.flatten(1).shape:
            raise AdapterError(
                f"adapter {spec.adapter_id}: {name} is {low_rank.b.shape[0]}×{low_rank.a.shape[1]}, "
                f"but {tuple(layer.weight.shape)} in {backbone.name!r}; it was made for another backbone"
            )
    for name, shift in adapter.shifts.items():
        if name not in parameters or parameters[name].shape != shift.shape:
            raise AdapterError(
                f"adapter {spec.adapter_id}: it changes {name} of shape {tuple(shift.shape)}, "
                f"which {backbone.name!r} lacks; it was made for another backbone"
            )
    expected = backbone.num_features * (2 if adapter.pool == "cls+patches" else 1)
    if adapter.head_weight is not None and adapter.head_weight.shape[1] != expected:
        raise AdapterError(
            f"adapter {spec.adapter_id}: its head reads {adapter.head_weight.shape[1]} features, "
            f"but {backbone.name!r} gives {expected}; it was made for another backbone"
        )
    if spec.image_px is not None and spec.image_px != backbone.image_px:
        raise AdapterError(
            f"adapter {spec.adapter_id} was tuned on images of {spec.image_px} px, not {backbone.image_px} px; set "
            f"backbone.image_px to {spec.image_px} or remove the adapter"
        )
