"""Adapters other than plain LoRA (DoRA, IA³, AdaLoRA, VeRA, LoHa, LoKr, OFT), as updates of timm's model.

Inversion needs an adapter as a function only. peft puts the adapter on a skeleton: the backbone's own layers, under the names
that the adapter knows them by, in double precision. The difference between merged and own weights is the update.
"""

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lr_ray.errors import AdapterError
from lr_ray.storage.peft import PREFIX, SLOW_PATTERN, UNUSED, Parsed, note_unused, parse_lora, rows_of, take_head, take_values
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import LowRank
from lr_ray.vit.naming import Family, Site, find_site

_OPTIONS: dict[str, tuple[str, ...]] = {
    "LORA": ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias"),
    "IA3": (),
    "ADALORA": ("target_r", "init_r", "lora_alpha", "rank_pattern"),
    "VERA": ("r", "projection_prng_key", "save_projection", "d_initial"),
    "LOHA": ("r", "alpha", "rank_pattern", "alpha_pattern", "use_effective_conv2d"),
    "LOKR": (
        "r",
        "alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_effective_conv2d",
        "decompose_both",
        "decompose_factor",
    ),
    "OFT": ("r", "oft_block_size", "block_share", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms"),
}
"""By peft_type, what of its config a merged weight depends on; the rest is not handed to peft."""
KINDS = tuple(_OPTIONS)
_RANKS = ("r", "init_r", "target_r", "oft_block_size", "num_cayley_neumann_terms", "decompose_factor")
_PARAMETER = re.compile(
    r"(?P<module>.+)\.(?:lora_(?:A|B|E|magnitude_vector)|ranknum|ia3_l|vera_lambda_[bd]|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|oft_[rR])"
    r"(?:\.default)?(?:\.weight|\.bias)?"
)
_NOT_SAVED = (".base_layer.", ".ranknum.", "vera_A", "vera_B")
"""In the names of what the skeleton has but a file need not: what peft knows without it."""
_SHARED = ("base_model.vera_A", "base_model.vera_B")
_RANK_TOLERANCE = 1e-7
"""Singular values below this share of the largest are rounding."""


def read_any(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, backbone: Backbone) -> Parsed:
    """Plain LoRA as it is, any other adapter through peft.

    Args:
        config: `adapter_config.json`.
        tensors: of the weights' file.
        where: how messages call the adapter.
        backbone: that it was made for.

    Raises:
        AdapterError: damaged, of a kind that is not read, or made for another backbone.
    """
    base = dict(backbone.model.named_parameters())
    if config.get("peft_type") == "LORA" and not config.get("use_dora"):
        return parse_lora(config, tensors, where, base=base)
    if config.get("peft_type") not in KINDS:
        raise AdapterError(
            f"{where}: peft_type {config.get('peft_type')!r} is not read; there are {', '.join(_OPTIONS)} (with DoRA)"
        )
    found = Parsed()
    own: dict[str, Tensor] = {}
    modules: dict[str, Site] = {}
    values: dict[str, Tensor] = {}
    families: set[Family] = set()
    num_unused, tunes_head = 0, False
    for key, tensor in sorted(tensors.items()):
        parameter = _PARAMETER.fullmatch(key)
        if key.startswith(_SHARED):
            own[key] = tensor
            continue
        if UNUSED.search(key):
            num_unused += 1
            continue
        known = None if parameter is None else find_site(parameter["module"].removeprefix(PREFIX))
        if parameter is None or known is None:
            values[key.removeprefix(PREFIX)] = tensor
        elif known[1].module == "head":
            tunes_head = True
        else:
            families.add(known[0])
            own[key], modules[parameter["module"].removeprefix(PREFIX)] = tensor, known[1]
    if not modules:
        raise AdapterError(f"{where}: no weights of {config['peft_type']} on a Vision Transformer's modules; it is not read")
    note_unused(found, num_unused)
    heads = take_values(found, values, where, base)
    if tunes_head:
        heads = {}
        found.notes.append(f"its head is left out: it is tuned by {config['peft_type']}, which is read on the backbone alone")
    _take_merged(found, config, own, modules, base, where)
    take_head(found, heads, families, where, base)
    return found


def _take_merged(
    found: Parsed,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, Site],
    base: Mapping[str, Tensor],
    where: str,
) -> None:
    """Put the differences that peft's merge makes into `modules` and `shifts`."""
    skeleton = _skeleton(modules, base, where)
    before = {name: value.clone() for name, value in skeleton.named_parameters()}
    options = _options(config, tensors, skeleton, where)
    merged = _merge(skeleton, options, tensors, where)
    after = dict(merged.named_parameters())
    deltas: dict[str, Tensor] = {}
    for name, value in before.items():
        foreign, _, kind = name.rpartition(".")
        parameter = f"{modules[foreign].module}.{kind}"
        delta = deltas.setdefault(parameter, torch.zeros_like(base[parameter], dtype=torch.float64))
        delta[rows_of(modules[foreign], len(delta))] += after[name].detach() - value
    for parameter, delta in deltas.items():
        if not torch.isfinite(delta).all():
            raise AdapterError(f"{where}: its merged {parameter} is NaN or infinite; it is damaged: get it again or remove it")
        low_rank = _low_rank(delta.flatten(1)) if delta.ndim > 1 else None
        if low_rank is not None:
            found.modules[parameter.removesuffix(".weight")] = low_rank
        elif delta.any():
            found.shifts[parameter] = found.shifts.get(parameter, 0.0) + delta.float()


def _low_rank(delta: Tensor) -> LowRank | None:
    """The update as a product where that is the smaller of the two, else None; (D_out, D_in) in double precision."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    rank = max(1, int((s > _RANK_TOLERANCE * s[0]).sum()))
    if rank * (delta.shape[0] + delta.shape[1]) >= delta.numel():
        return None
    root = s[:rank].sqrt()
    return LowRank(a=(root[:, None] * vh[:rank]).float(), b=(u[:, :rank] * root).float(), scale=1.0)


def _skeleton(modules: Mapping[str, Site], base: Mapping[str, Tensor], where: str) -> nn.Module:
    """The backbone's layers under the adapter's names, in double precision."""
    root = nn.Module()
    for name, site in modules.items():
        weight, bias = base.get(f"{site.module}.weight"), base.get(f"{site.module}.bias")
        if weight is None or weight.ndim not in (2, 4):
            raise AdapterError(f"{where}: it changes {name}, which the backbone lacks; it was made for another")
        rows = rows_of(site, len(weight))
        weight = weight[rows]
        layer: nn.Module
        if weight.ndim == 2:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float64)
        else:
            size = (weight.shape[2], weight.shape[3])
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], size, stride=size, bias=bias is not None, dtype=torch.float64)
        state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias[rows]}
        layer.load_state_dict(state)
        *path, last = name.split(".")
        parent = root
        for step in path:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(last, layer)
    return root.requires_grad_(False)


def _options(config: Mapping[str, Any], tensors: Mapping[str, Tensor], skeleton: nn.Module, where: str) -> dict[str, Any]:
    """Of peft's config, checked: what is declared must be there, so that nothing larger is allocated."""
    kind = config["peft_type"]
    options = {name: config[name] for name in _OPTIONS[kind] if config.get(name) is not None}
    largest = max([1, *(size for tensor in tensors.values() if tensor.numel() for size in tensor.shape)])
    for name, value in options.items():
        if isinstance(value, dict) and (slow := [pattern for pattern in value if SLOW_PATTERN.search(pattern)]):
            raise AdapterError(
                f"{where}: {name} {slow[0]!r} in adapter_config.json repeats a group; name the modules one by one"
            )
        ranks = value.values() if name == "rank_pattern" and isinstance(value, dict) and kind != "ADALORA" else [value]
        sizes = [size for size in ranks if name in (*_RANKS, "rank_pattern") and not isinstance(size, dict)]
        if any(not isinstance(size, int) or not -1 <= size <= largest for size in sizes):
            raise AdapterError(
                f"{where}: {name} {value!r} in adapter_config.json, but no tensor of its file is larger than {largest}; it is "
                "damaged: get it again from its source or remove it"
            )
    layers = {name: layer for name, layer in skeleton.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    if kind == "IA3":
        options["feedforward_modules"] = [
            name for name, layer in layers.items() if _scales_inputs(layer, tensors.get(f"{PREFIX}{name}.ia3_l"))
        ]
    if kind == "ADALORA":
        options |= {"total_step": 1, "tinit": 0, "tfinal": 0}  # of training alone
        ranks = options.get("rank_pattern", {})
        if isinstance(ranks, dict):  # peft looks up every layer that it names, also a text tower's or a head's
            options["rank_pattern"] = {name: kept for name, kept in ranks.items() if name.partition(".lora_E")[0] in layers}
    return options | {"peft_type": kind, "target_modules": list(layers)}


def _scales_inputs(layer: nn.Linear | nn.Conv2d, vector: Tensor | None) -> bool:
    """Whether IA³'s vector is of what goes in: it lies in a row, and has as many numbers."""
    return vector is not None and vector.shape[:1] == (1,) and vector.numel() == layer.weight.shape[1]


def _merge(skeleton: nn.Module, options: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    try:
        peft = import_module("peft")
    except ImportError as error:
        raise AdapterError(
            f"{where}: peft merges {options['peft_type']}, and cannot be imported ({error}); pip install 'lr-ray[peft]'"
        ) from error
    kind = "DoRA" if options.get("use_dora") else options["peft_type"]
    try:
        model = peft.get_peft_model(skeleton, peft.get_peft_config(dict(options)), autocast_adapter_dtype=False)
        outcome = peft.set_peft_model_state_dict(model, dict(tensors))
        absent = [key for key in outcome.missing_keys if not any(name in key for name in _NOT_SAVED)]
        if outcome.unexpected_keys or absent:
            raise ValueError(f"weights {(outcome.unexpected_keys or absent)[0]!r} do not fit its config")
        merged: nn.Module = model.double().merge_and_unload()
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, re.error) as error:
        raise AdapterError(
            f"{where}: peft cannot merge it as {kind} ({error}); it is damaged, or not of this backbone"
        ) from error
    return merged
