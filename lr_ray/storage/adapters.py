"""Adapters in PEFT's own format: `adapter_config.json`, `adapter_model.safetensors`, the head under `modules_to_save`."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lr_ray.errors import AdapterError, StorageError
from lr_ray.storage.filesystem import join, list_files, read_bytes, read_many, write_bytes
from lr_ray.storage.manifest import read_manifest, write_manifest
from lr_ray.vit.embedded import digest_tensors
from lr_ray.vit.lora import Adapter, AdapterSpec, LowRank

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"
_PREFIX = "base_model.model."


def write_adapter(
    folder: str,
    adapter: Adapter,
    *,
    inputs: dict[str, Any],
    facts: dict[str, Any],
    card: Callable[[dict[str, Any]], str] | None = None,
) -> None:
    """Commit an adapter: weights, manifest, card if any, and last the PEFT config, which makes it count.

    Args:
        folder: of this adapter alone.
        inputs: everything that determines it.
        facts: what is known of it (accuracy, resolved config).
        card: what makes the model card of the manifest.
    """
    tensors: dict[str, Tensor] = {}
    for name, low_rank in adapter.modules.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = low_rank.a.detach().cpu().float().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = low_rank.b.detach().cpu().float().contiguous()
    if adapter.head_weight is not None:
        tensors[f"{_PREFIX}head.weight"] = adapter.head_weight.detach().cpu().float().contiguous()
    if adapter.head_bias is not None:
        tensors[f"{_PREFIX}head.bias"] = adapter.head_bias.detach().cpu().float().contiguous()
    write_bytes(join(folder, WEIGHTS_NAME), save_safetensors(tensors, metadata={"format": "pt"}))
    spec = adapter.spec
    about = {
        "adapter_id": spec.adapter_id,
        "backbone": spec.backbone,
        "backbone_digest": spec.backbone_digest,
        "class_names": list(spec.class_names),
        "tensors_digest": spec.digest,
    }
    manifest = write_manifest(folder, inputs, about | facts)
    if card is not None:
        write_bytes(join(folder, CARD_NAME), card(manifest).encode())
    write_bytes(join(folder, CONFIG_NAME), json.dumps(_peft_config(adapter), indent=2).encode())


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    ranks = {name: low_rank.a.shape[0] for name, low_rank in adapter.modules.items()}
    alphas = {name: low_rank.scale * ranks[name] for name, low_rank in adapter.modules.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.spec.backbone,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "target_modules": list(adapter.modules),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "modules_to_save": None if adapter.head_weight is None else ["head"],
    }


def read_adapter(folder: str) -> Adapter:
    """An adapter in PEFT's format on a timm model, ours or another's.

    Raises:
        AdapterError: not a LoRA, damaged, or saved in a way that is not read here.
        StorageError: not readable.
    """
    name = folder.rstrip("/").rsplit("/", 1)[-1]
    try:
        config: dict[str, Any] = json.loads(read_bytes(join(folder, CONFIG_NAME)))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG_NAME} holds no JSON object")
        tensors: dict[str, Tensor] = load_safetensors(_read_weights(folder))
    except (ValueError, SafetensorError) as error:
        raise AdapterError(f"adapter {folder}: damaged ({error}); get it again from its source or remove it") from error
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise AdapterError(f"adapter {folder}: peft_type {kind}, but only plain LoRA is read; remove it")
    modules: dict[str, LowRank] = {}
    heads: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, tensor in sorted(tensors.items()):
        module, _, part = key.removeprefix(_PREFIX).rpartition(".lora_")
        if part == "A.weight":
            partner = tensors.get(key.replace(".lora_A.", ".lora_B."))
            if tensor.ndim == 4:
                raise AdapterError(f"adapter {folder}: {module} is LoRA on a convolution, which is not read; remove it")
            if partner is None or partner.ndim != 2 or tensor.ndim != 2 or partner.shape[1] != tensor.shape[0]:
                raise AdapterError(f"adapter {folder}: {module} lacks a lora_B that fits its lora_A; it is damaged")
            modules[module] = LowRank(a=tensor, b=partner, scale=_scale_of(config, module, tensor.shape[0], folder))
        elif (head := re.fullmatch(r"head\.(?:modules_to_save\.)?(weight|bias)", key.removeprefix(_PREFIX))) is not None:
            heads[head[1]] = tensor
        elif part != "B.weight" or key.replace(".lora_B.", ".lora_A.") not in tensors:
            unknown.append(key)
    if unknown or not modules:
        raise AdapterError(
            f"adapter {folder}: {f'weights {unknown[0]!r} are' if unknown else 'no lora_A weights'} not LoRA on a timm "
            "Vision Transformer with its head in `head`; only that is read"
        )
    manifest = read_manifest(folder) or {}
    head_weight, head_bias = heads.get("weight"), heads.get("bias")
    if head_weight is not None and (
        head_weight.ndim != 2 or (head_bias is not None and head_bias.shape != head_weight.shape[:1])
    ):
        shapes = {kind: tuple(value.shape) for kind, value in heads.items()}
        raise AdapterError(f"adapter {folder}: its head has shapes {shapes}, not (classes, features) and (classes,)")
    num_classes = 0 if head_weight is None else head_weight.shape[0]
    class_names = manifest.get("class_names") or [f"{name}/{index}" for index in range(num_classes)]
    if len(class_names) != num_classes:
        raise AdapterError(f"adapter {folder}: {len(class_names)} class names for a head of {num_classes} classes")
    adapter = Adapter(
        spec=AdapterSpec(
            adapter_id=manifest.get("adapter_id", name),
            digest="",
            backbone=str(config.get("base_model_name_or_path") or ""),
            backbone_digest=manifest.get("backbone_digest", ""),
            class_names=tuple(class_names),
            license=str(config.get("license") or ""),
        ),
        modules=modules,
        head_weight=head_weight,
        head_bias=head_bias,
    )
    return with_digest(adapter)


def _read_weights(folder: str) -> bytes:
    try:
        return read_bytes(join(folder, WEIGHTS_NAME))
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise AdapterError(
            f"adapter {folder} has no {WEIGHTS_NAME}; only safetensors are read, never pickles: save it as that or remove it"
        ) from error


def _scale_of(config: dict[str, Any], module: str, num_rows: int, folder: str) -> float:
    """alpha / rank, or alpha / √rank for rsLoRA, by PEFT's own rules for patterns; lora_A has `num_rows`."""

    def value(key: str, patterns: str) -> float:
        for pattern, special in (config.get(patterns) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return float(special)
        return float(config[key])

    try:
        rank, alpha = value("r", "rank_pattern"), value("lora_alpha", "alpha_pattern")
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        raise AdapterError(f"adapter {folder}: {CONFIG_NAME} has no usable r and lora_alpha ({error!r})") from error
    if rank != num_rows:
        raise AdapterError(
            f"adapter {folder}: {module} has rank {rank:g} in {CONFIG_NAME} but {num_rows} in its weights; the two do not "
            "belong together: get both again from their source or remove them"
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def with_digest(adapter: Adapter) -> Adapter:
    """The adapter with its spec's digest set: SHA-256 of its weights and class names."""
    names = torch.frombuffer(bytearray("\n".join(adapter.spec.class_names).encode() or b"-"), dtype=torch.uint8)
    digest = digest_tensors(adapter.tensors() | {"class_names": names})
    return replace(adapter, spec=replace(adapter.spec, digest=digest))


def list_adapters(root: str) -> list[str]:
    """Folders below `root` that hold an adapter, in the order of their names.

    Raises:
        AdapterError: there are none.
    """
    folders = [join(root, *file.split("/")[:-1]) for file in list_files(root, suffix=CONFIG_NAME)]
    if not folders:
        raise AdapterError(f"adapters {root}: no folder with an {CONFIG_NAME} in it; run `lr-ray tune` first")
    return folders


def read_specs(folders: Sequence[str]) -> list[AdapterSpec]:
    """What is known of the adapters in these folders, of which a few at a time are in memory."""
    return read_many(lambda folder: read_adapter(folder).spec, folders)


def read_adapters(root: str) -> Iterator[Adapter]:
    """The adapters below `root`, one in memory at a time."""
    return (read_adapter(folder) for folder in list_adapters(root))
