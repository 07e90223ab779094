"""LoRA as PEFT saves it, on a model of timm or of Hugging Face's, as updates of timm's fused modules."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lr_ray.errors import AdapterError
from lr_ray.vit.lora import LowRank
from lr_ray.vit.naming import Family, Site, Version, find_site, foreign_names
from lr_ray.vit.tokens import Pool

Find = Callable[[str], tuple[Family, Site] | None]
PREFIX = "base_model.model."
SHIFT = "lr_ray.shift."
"""Begins the name of a tensor that is added to a parameter of timm's."""
_REMEDY = "`lr-ray library add` converts it"
UNUSED = re.compile(r"(?:^|[._])(?:text_model|text_projection|visual_projection|logit_scale|pooler)(?:[._]|$)")
"""In the names of modules that no feature of an image passes through."""
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<factor>A|B)(?:\.default)?\.(?P<kind>weight|bias)")
_SAVED = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.default)?|\.base_layer|\.original_module)?\.(?P<kind>[a-z_0-9]+)")
_DAMAGED = "it is damaged: get it again from its source or remove it"
_MOST_PATTERNS = 1000
"""Of a config: those of six modules in each of 40 blocks are a quarter of it."""
SLOW_PATTERN = re.compile(r"\)[*+?{]|(?:[*+?}].*){3}", re.DOTALL)
"""What may keep a regular expression busy for ever."""
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take something away from the base model's weights, which a file of LoRA does not tell."""
_OTHER_FUNCTION = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
"""Options by which LoRA is not ΔW = scale · B·A."""


@dataclass(kw_only=True, slots=True)
class Parsed:
    """What the files of an adapter say, in timm's names.

    Attributes:
        modules, shifts, head_weight, head_bias, pool: as of an `Adapter`.
        notes: a line for everything that was left out or assumed.
    """

    modules: dict[str, LowRank] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    head_weight: Tensor | None = None
    head_bias: Tensor | None = None
    pool: Pool = "cls"
    notes: list[str] = field(default_factory=list)


def parse_lora(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    base: Mapping[str, Tensor] | None = None,
    find: Find = find_site,
) -> Parsed:
    """Plain LoRA, by PEFT's own rules for scales and patterns; query, key and value of their own are fused.

    Args:
        config: `adapter_config.json`.
        tensors: of the weights' file.
        where: how messages call the adapter.
        base: {timm parameter name: its value}; needed where the file holds new values of parameters (biases, norms), which
            become differences from these.
        find: what modules' names stand for.

    Raises:
        AdapterError: another kind of adapter, damaged, or of a model that is not a Vision Transformer known here.
    """
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise AdapterError(f"{where}: peft_type {kind}, but only plain LoRA is read as it is; {_REMEDY}")
    if unread := [name for name in _OTHER_FUNCTION if config.get(name)]:
        raise AdapterError(
            f"{where}: {unread[0]} in adapter_config.json makes it more than plain LoRA, which is not read; remove it"
        )
    if str(config.get("init_lora_weights")).lower().startswith(_OTHER_BASE):
        raise AdapterError(
            f"{where}: it was started by {config['init_lora_weights']}, which changes the base model's weights; convert it by "
            "peft's path_initial_model_for_weight_conversion, which gives plain LoRA"
        )
    found = Parsed()
    factors: dict[str, dict[str, Tensor]] = {}
    values: dict[str, Tensor] = {}
    num_unused = 0
    for key, tensor in sorted(tensors.items()):
        name = key.removeprefix(PREFIX)
        if name.startswith(SHIFT):
            found.shifts[name.removeprefix(SHIFT)] = tensor
        elif UNUSED.search(name):
            num_unused += 1
        elif (lora := _LORA.fullmatch(name)) is not None:
            factors.setdefault(lora["module"], {})[f"{lora['factor']}.{lora['kind']}"] = tensor
        else:
            values[name] = tensor
    note_unused(found, num_unused)
    heads = take_values(found, values, where, base)
    families = _take_factors(found, factors, config, heads, where, find)
    take_head(found, heads, families, where, base)
    if not found.modules and not found.shifts:
        raise AdapterError(
            f"{where}: no lora_A weights are of a Vision Transformer of timm or of Hugging Face (ViT, DeiT, CLIP, DINOv2); "
            "only those are read"
        )
    return found


def note_unused(found: Parsed, num_weights: int) -> None:
    if num_weights:
        found.notes.append(
            f"{num_weights} weights of a text tower, projection or pooler are left out: no feature depends on them"
        )


def take_values(
    found: Parsed, values: Mapping[str, Tensor], where: str, base: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Put the new values of parameters into `shifts`; returns those of the head.

    Raises:
        AdapterError: one is of no module of a Vision Transformer, does not fit `base`, or is not the head's and `base` is None.
    """
    heads: dict[str, Tensor] = {}
    for name, tensor in values.items():
        if ".original_module." in name:  # bias="all" saves the base model's own beside the new one
            continue
        saved = _SAVED.fullmatch(name)
        known = find_site(saved["module"]) if saved is not None else None
        if saved is None or known is None:
            raise AdapterError(
                f"{where}: weights {name!r} are not LoRA on a Vision Transformer of timm or of Hugging Face (ViT, DeiT, CLIP, "
                "DINOv2), nor its head; only those are read"
            )
        site, kind = known[1], saved["kind"]
        if site.module == "head":
            heads[kind] = tensor
        elif base is None:
            raise AdapterError(f"{where}: {name!r} is the new value of a parameter of the base model; {_REMEDY}")
        else:
            _shift(found, site, kind, tensor, where, base)
    return heads


def _shift(found: Parsed, site: Site, kind: str, value: Tensor, where: str, base: Mapping[str, Tensor]) -> None:
    """Note the difference of a parameter's new value from its old one; bias="all" may save the same value twice."""
    parameter = f"{site.module}.{kind}"
    old = base.get(parameter)
    rows = slice(None) if old is None else rows_of(site, len(old))
    if old is None or old[rows].shape != value.shape:
        raise AdapterError(
            f"{where}: it saves a {parameter} of shape {tuple(value.shape)}, which the backbone lacks; it was made for another"
        )
    shift = found.shifts.setdefault(parameter, torch.zeros_like(old, dtype=torch.float32))
    shift[rows] = value.float() - old[rows].float()


def rows_of(site: Site, num_rows: int) -> slice:
    """Of timm's module with `num_rows` outputs, those that are the foreign module's."""
    third = num_rows // 3
    return slice(0, num_rows) if site.part is None else slice(site.part * third, (site.part + 1) * third)


def _take_factors(
    found: Parsed,
    factors: Mapping[str, dict[str, Tensor]],
    config: Mapping[str, Any],
    heads: dict[str, Tensor],
    where: str,
    find: Find,
) -> set[Family]:
    """Put low-rank updates into `modules`; returns whose names they bear."""
    families: set[Family] = set()
    parts: dict[str, list[tuple[Site, LowRank]]] = {}
    for name, given in factors.items():
        known = find(name)
        if known is None:
            raise AdapterError(
                f"{where}: {name} is no module of a Vision Transformer of timm or of Hugging Face (ViT, DeiT, CLIP, DINOv2); "
                "only those are read"
            )
        families.add(known[0])
        site, low_rank = known[1], _low_rank(name, given, config, where)
        bias = given.get("B.bias")
        if bias is not None and bias.shape != low_rank.b.shape[:1]:
            raise AdapterError(
                f"{where}: {name} has a lora_B of {len(low_rank.b)} rows, but a bias of {tuple(bias.shape)}; {_DAMAGED}"
            )
        if site.module == "head":
            _add_to_head(found, heads, low_rank, bias, where)
            continue
        if any(site.part in (None, other.part) or other.part is None for other, _ in parts.get(site.module, [])):
            raise AdapterError(
                f"{where}: two of its modules are timm's {site.module}, {name} the second; it is of no one model"
            )
        parts.setdefault(site.module, []).append((site, low_rank))
        if bias is not None:
            size = len(bias) * (1 if site.part is None else 3)
            shift = found.shifts.setdefault(f"{site.module}.bias", torch.zeros(size))
            shift[rows_of(site, size)] += low_rank.scale * bias.float()
    found.modules |= {module: _fused(module, given, where) for module, given in parts.items()}
    return families


def _low_rank(name: str, given: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> LowRank:
    a, b = given.get("A.weight"), given.get("B.weight")
    if a is None or b is None:
        absent = "lora_B that fits its lora_A" if b is None else "lora_A"
        raise AdapterError(f"{where}: {name} lacks a {absent}; {_DAMAGED}")
    if a.ndim == 4 and b.ndim == 4 and b.shape[2:] == (1, 1):  # on the convolution that cuts the patches
        a, b = a.flatten(1), b.flatten(1)
    if a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0] or not a.numel() or not b.numel():
        raise AdapterError(
            f"{where}: {name} lacks a lora_B that fits its lora_A ({tuple(b.shape)} and {tuple(a.shape)}); {_DAMAGED}"
        )
    return LowRank(a=a, b=b, scale=_scale_of(config, name, a.shape[0], where))


def _fused(module: str, parts: Sequence[tuple[Site, LowRank]], where: str) -> LowRank:
    """One update of timm's module from those of its parts."""
    if parts[0][0].part is None:
        return parts[0][1]
    if len(sizes := {(len(low_rank.b), low_rank.a.shape[1]) for _, low_rank in parts}) > 1:
        raise AdapterError(f"{where}: query, key and value of {module} are of sizes {sorted(sizes)}, not of one; {_DAMAGED}")
    scales = {low_rank.scale for _, low_rank in parts}
    columns = []
    for site, low_rank in parts:
        size = 3 * len(low_rank.b)
        column = low_rank.b.new_zeros(size, low_rank.b.shape[1])
        column[rows_of(site, size)] = low_rank.b if len(scales) == 1 else low_rank.scale * low_rank.b
        columns.append(column)
    scale = scales.pop() if len(scales) == 1 else 1.0
    return LowRank(a=torch.cat([low_rank.a for _, low_rank in parts]), b=torch.cat(columns, dim=1), scale=scale)


def _add_to_head(found: Parsed, heads: dict[str, Tensor], low_rank: LowRank, bias: Tensor | None, where: str) -> None:
    weight = heads.get("weight")
    if weight is None:
        found.notes.append("its LoRA on the head is left out: the head's own weights are not in the file")
        return
    if weight.shape != (shape := (low_rank.b.shape[0], low_rank.a.shape[1])):
        raise AdapterError(
            f"{where}: its LoRA on the head is of shape {shape}, but the head of shape {tuple(weight.shape)}; {_DAMAGED}"
        )
    heads["weight"] = weight + low_rank.delta().to(weight)
    if bias is not None:
        heads["bias"] = heads.get("bias", torch.zeros_like(bias)) + low_rank.scale * bias


def take_head(
    found: Parsed, heads: Mapping[str, Tensor], families: set[Family], where: str, base: Mapping[str, Tensor] | None
) -> None:
    """Put weight and bias of the head, if there is one, and what it reads into `found`.

    Args:
        families: whose names the modules bear.
        base: as of `parse_lora`.

    Raises:
        AdapterError: it is not linear.
    """
    weight, bias = heads.get("weight"), heads.get("bias")
    if weight is None:
        if bias is not None:
            found.notes.append("its bias of the head is left out: the head's own weights are not in the file")
        return
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = {kind: tuple(value.shape) for kind, value in heads.items()}
        raise AdapterError(f"{where}: its head has shapes {shapes}, not (classes, features) and (classes,)")
    found.head_weight, found.head_bias = weight, bias
    if weight.shape[1] in {2 * width for width in _widths(found, base)}:
        found.pool = "cls+patches"
    elif "clip" in families:
        found.pool = "patches"
        found.notes.append("its head is taken to read the mean of the patch tokens, as CLIPForImageClassification's does")


def _widths(found: Parsed, base: Mapping[str, Tensor] | None) -> set[int]:
    """That of the backbone, or what the updated modules say of it; one unless they do not fit together."""
    if base is not None:
        return {base["cls_token"].shape[-1]}
    widths = {low.a.shape[1] for name, low in found.modules.items() if name.endswith(("attn.qkv", "attn.proj", "mlp.fc1"))}
    return widths | {low.b.shape[0] for name, low in found.modules.items() if name.endswith(("mlp.fc2", "patch_embed.proj"))}


def _scale_of(config: Mapping[str, Any], module: str, num_rows: int, where: str) -> float:
    """alpha / rank, or alpha / √rank for rsLoRA, by PEFT's own rules for patterns; lora_A has `num_rows`."""

    def value(key: str, patterns: str) -> float:
        if len(config.get(patterns) or {}) > _MOST_PATTERNS:
            raise ValueError(f"more than {_MOST_PATTERNS:,} {patterns}")
        for pattern, special in (config.get(patterns) or {}).items():
            if SLOW_PATTERN.search(pattern):
                raise ValueError(f"{patterns} {pattern!r} repeats a group")
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return float(special)
        return float(config[key])

    try:
        rank, alpha = value("r", "rank_pattern"), value("lora_alpha", "alpha_pattern")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, re.error) as error:
        raise AdapterError(f"{where}: adapter_config.json has no usable r and lora_alpha ({error!r})") from error
    if rank != num_rows:
        raise AdapterError(
            f"{where}: {module} has rank {rank:g} in adapter_config.json but {num_rows} in its weights; the two do not "
            "belong together: get both again from their source or remove them"
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def in_fp32(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Weights as they are computed with, whatever they were saved as.

    Raises:
        AdapterError: complex ones.
    """
    if complex_ones := [name for name, value in tensors.items() if value.is_complex()]:
        raise AdapterError(
            f"{where}: {complex_ones[0]} is of type {tensors[complex_ones[0]].dtype}; no adapter has such weights"
        )
    return {name: value.float() for name, value in tensors.items()}


def foreign_modules(
    modules: Mapping[str, LowRank], family: Family, *, num_blocks: int, version: Version = 4, prefix: str = ""
) -> dict[str, LowRank]:
    """The same updates under the names of another library's modules; the fused qkv is split into those of its parts.

    Args:
        family, version, prefix: as of `foreign_names`.

    Raises:
        AdapterError: the family has no such module.
    """
    names: dict[str, list[tuple[str, Site]]] = {}
    for name, site in foreign_names(family, num_blocks=num_blocks, version=version, prefix=prefix).items():
        names.setdefault(site.module, []).append((name, site))
    found: dict[str, LowRank] = {}
    for module, low_rank in modules.items():
        if module not in names:
            raise AdapterError(f"{module}: models of the family {family!r} have no such module")
        for name, site in names[module]:
            rows = low_rank.b[rows_of(site, len(low_rank.b))]
            used = torch.ones_like(rows[0], dtype=torch.bool) if site.part is None else rows.any(dim=0)
            if used.any():
                found[name] = LowRank(a=low_rank.a[used], b=rows[:, used], scale=low_rank.scale)
    return found


def peft_config(modules: Mapping[str, LowRank], *, base_model: str, modules_to_save: Iterable[str] = ()) -> dict[str, Any]:
    """`adapter_config.json` of plain LoRA on these modules, each with its own rank and scale."""
    ranks = {name: low_rank.a.shape[0] for name, low_rank in modules.items()}
    alphas = {name: low_rank.scale * ranks[name] for name, low_rank in modules.items()}
    rank, alpha = next(iter(ranks.values()), 1), next(iter(alphas.values()), 1.0)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "target_modules": list(modules),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "modules_to_save": list(modules_to_save) or None,
    }


def peft_tensors(modules: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The two factors of every module under PEFT's names, fp32 on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, low_rank in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = low_rank.a.detach().cpu().float().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = low_rank.b.detach().cpu().float().contiguous()
    return tensors
