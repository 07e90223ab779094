"""Raw files of an adapter, whatever tool saved them, to an adapter in timm's names."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from lr_ray.errors import AdapterError
from lr_ray.library.merging import KINDS, read_any
from lr_ray.library.sources import RawAdapter
from lr_ray.storage.adapters import adapter_of
from lr_ray.storage.peft import Parsed, in_fp32, parse_lora
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import Adapter
from lr_ray.vit.naming import find_site, find_underscored

_DOWN_UP = re.compile(r"(?P<module>.+?)[._]lora[._](?P<factor>down|up)\.weight")
_ALPHA = re.compile(r"(?P<module>.+?)(?:[._]lora)?\.alpha")
_FACTORS = {"down": "lora_A", "up": "lora_B"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Converted:
    """An adapter in timm's names and in fp32.

    Attributes:
        format: how it was saved: `lora`, `dora`, `ia3`, …, or `kohya`.
        notes: a line for everything that was left out or assumed.
    """

    adapter: Adapter
    format: str
    notes: tuple[str, ...]


def convert(raw: RawAdapter, backbone: Backbone) -> Converted:
    """The same function on timm's model.

    Args:
        backbone: that the adapter was made for; nothing is checked but what conversion needs.

    Raises:
        AdapterError: damaged, of a kind that is not read, or made for another backbone.
    """
    where = f"adapter {raw.source}"
    try:
        tensors = load_safetensors(raw.weights)
    except SafetensorError as error:
        raise AdapterError(f"{where}: damaged ({error}); get it again from its source or remove it") from error
    tensors = in_fp32(tensors, where)
    base = dict(backbone.model.named_parameters())
    config, notes = raw.config or _config_within(raw.metadata), []
    if any(_DOWN_UP.fullmatch(name) for name in tensors):
        kind, (config, tensors) = "kohya", _as_peft(config, tensors)
        dotted = any("." in name.partition(".lora_")[0] for name in tensors if ".lora_" in name)
        parsed = parse_lora(config, tensors, where, base=base, find=find_site if dotted else find_underscored)
    else:
        if not config:
            config = _config_of_ranks(tensors, where)
            notes.append("no adapter_config.json: lora_alpha is taken to be the rank, which makes the scale 1")
        kind = "dora" if config.get("use_dora") else str(config.get("peft_type")).lower()
        parsed = read_any(config, tensors, where, backbone)
    known = {**_as_seen(raw.preprocessor, backbone, where), "license": _license_of(raw)}
    known["class_names"] = _class_names_of(raw, parsed, notes)
    known |= {name: value for name, value in raw.manifest.items() if name != "adapter_id" and value not in (None, "")}
    content = hashlib.sha256(raw.weights + json.dumps(raw.config, sort_keys=True).encode()).hexdigest()
    adapter_id = adapter_id_of(raw.source)
    adapter = adapter_of(parsed, config, known, adapter_id=f"{adapter_id}-{content[:8]}", where=where)
    adapter = replace(adapter, spec=replace(adapter.spec, adapter_id=adapter_id))
    return Converted(adapter=adapter, format=kind, notes=(*notes, *parsed.notes))


def adapter_id_of(source: str) -> str:
    """The last part of a source's name but a revision, in letters, digits, dots, dashes and underscores."""
    names = [part.partition("@")[0].strip(".") for part in re.split(r"[/!]", source)]
    last = next((name for name in reversed(names) if name), "")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last.removesuffix(".safetensors")).strip("-.")[:60] or "adapter"


def _class_names_of(raw: RawAdapter, parsed: Parsed, notes: list[str]) -> tuple[str, ...] | None:
    """Those that the adapter's author gave, not the LABEL_0, … that transformers fills in; None: none that fit."""
    if parsed.head_weight is None or all(re.fullmatch(r"LABEL_\d+", name) for name in raw.class_names):
        return None
    if len(raw.class_names) != len(parsed.head_weight):
        notes.append(f"id2label names {len(raw.class_names)} classes and is left out: its head has {len(parsed.head_weight)}")
        return None
    return tuple(map(_printable, raw.class_names))


def base_model_of(raw: RawAdapter) -> str:
    """What the adapter says it was tuned from, or ""."""
    stated = raw.config.get("base_model_name_or_path") or raw.card.get("base_model") or ""
    return _printable(str(stated[0] if isinstance(stated, list) and stated else stated))


def _license_of(raw: RawAdapter) -> str:
    return _printable(str(raw.config.get("license") or raw.card.get("license") or ""))


def _printable(text: str) -> str:
    """A stranger's text without what would steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _config_within(metadata: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's config that diffusers keeps in the header of a safetensors file, or {}."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    return {"peft_type": "LORA", **config} if isinstance(config, dict) and config else {}


def _config_of_ranks(tensors: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """A config for a file of LoRA that came without one."""
    ranks = {name.rpartition(".lora_A")[0]: len(value) for name, value in tensors.items() if ".lora_A" in name and value.ndim}
    if not ranks:
        raise AdapterError(
            f"{where}: without an adapter_config.json only LoRA is read (lora_A and lora_B, or lora_down and lora_up); give "
            f"the folder with its config; peft_type may be {', '.join(KINDS)}"
        )
    names = {name.removeprefix("base_model.model."): rank for name, rank in ranks.items()}
    patterns = {re.escape(name): rank for name, rank in names.items()}
    return {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": patterns, "alpha_pattern": patterns}


def _as_peft(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """kohya's and diffusers' lora_down, lora_up and alpha under PEFT's names; an absent alpha is the rank."""
    renamed: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, tensor in tensors.items():
        if (factor := _DOWN_UP.fullmatch(name)) is not None:
            renamed[f"{factor['module']}.{_FACTORS[factor['factor']]}.weight"] = tensor
            if factor["factor"] == "down" and tensor.ndim:
                ranks[factor["module"]] = len(tensor)
        elif (alpha := _ALPHA.fullmatch(name)) is not None and tensor.numel() == 1:
            alphas[alpha["module"]] = float(tensor)
        else:
            renamed[name] = tensor
    patterns = {re.escape(name): rank for name, rank in ranks.items()}
    scales = {re.escape(name): alphas.get(name, float(rank)) for name, rank in ranks.items()}
    as_peft = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": patterns, "alpha_pattern": scales}
    return {**config, **as_peft}, renamed


def _as_seen(preprocessor: Mapping[str, Any], backbone: Backbone, where: str) -> dict[str, Any]:
    """Image size and normalisation of a `preprocessor_config.json`, the latter where it is not the backbone's."""
    seen: dict[str, Any] = {}
    size = preprocessor.get("crop_size") if preprocessor.get("do_center_crop", True) else None
    size = size or preprocessor.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if isinstance(size, int) and not isinstance(size, bool):
        seen["image_px"] = size
    for name, value in _normalisation(preprocessor, where).items():
        own: Tensor = getattr(backbone, name).cpu()
        if not torch.allclose(torch.tensor(value, dtype=torch.float32), own, atol=1e-4):
            seen[name] = value
    return seen


def _normalisation(preprocessor: Mapping[str, Any], where: str) -> dict[str, list[float]]:
    """mean and std of [0, 1] pixels, as far as they are there; the file's are of pixels that it may scale in another way."""
    given = {"mean": preprocessor.get("image_mean"), "std": preprocessor.get("image_std")}
    if preprocessor.get("do_normalize") is False:
        given = {"mean": [0.0] * 3, "std": [1.0] * 3}
    factor = preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1
    checked = {"rescale_factor": [factor]} | {f"image_{name}": value for name, value in given.items() if value is not None}
    for name, value in checked.items():
        least = -1e3 if name == "image_mean" else 1e-6
        numbers = value if isinstance(value, list) and len(value) in (1, 3) else [None]
        if not all(isinstance(number, int | float) and least <= number <= 1e3 for number in numbers):
            raise AdapterError(
                f"{where}: preprocessor_config.json: {name} {value!r} is no number for each of three channels, {least:g} to "
                "1000; correct or remove that file"
            )
    largest = 255 * factor
    scaled = {name: [number / largest for number in value] for name, value in given.items() if value is not None}
    return {name: value * (3 // len(value)) for name, value in scaled.items()}
