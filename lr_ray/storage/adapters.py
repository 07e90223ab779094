"""Adapters in PEFT's own format: `adapter_config.json`, `adapter_model.safetensors`, the head under `modules_to_save`."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveFloat, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lr_ray.errors import AdapterError, StorageError
from lr_ray.storage.filesystem import join, list_files, read_bytes, read_many, write_bytes
from lr_ray.storage.manifest import CARD_NAME, CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, read_manifest, write_manifest
from lr_ray.storage.peft import PREFIX, SHIFT, Parsed, in_fp32, parse_lora, peft_config, peft_tensors
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.embedded import digest_tensors
from lr_ray.vit.lora import Adapter, AdapterSpec, check_adapter
from lr_ray.vit.tokens import Pool


class _Known(BaseModel):
    """What of `lr_ray.json` an adapter is made of; the rest is for people."""

    model_config = ConfigDict(extra="ignore")

    adapter_id: Annotated[str, Field(pattern=r"^([^./\\\x00][^/\\\x00]*)?$")] | None = None
    """Of which files are named."""
    class_names: tuple[str, ...] | None = None
    backbone_digest: str = ""
    license: str = ""
    image_px: Annotated[int, Field(gt=0, le=4096)] | None = None
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    pool: Pool | None = None


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
    tensors = peft_tensors(adapter.modules)
    tensors |= {f"{SHIFT}{name}": shift.detach().cpu().float().contiguous() for name, shift in adapter.shifts.items()}
    if adapter.head_weight is not None:
        tensors[f"{PREFIX}head.weight"] = adapter.head_weight.detach().cpu().float().contiguous()
    if adapter.head_bias is not None:
        tensors[f"{PREFIX}head.bias"] = adapter.head_bias.detach().cpu().float().contiguous()
    write_bytes(join(folder, WEIGHTS_NAME), save_safetensors(tensors, metadata={"format": "pt"}))
    spec = adapter.spec
    about = {
        "adapter_id": spec.adapter_id,
        "backbone": spec.backbone,
        "backbone_digest": spec.backbone_digest,
        "class_names": list(spec.class_names),
        "tensors_digest": spec.digest,
        **_seen_as(adapter),
    }
    manifest = write_manifest(folder, inputs, about | facts)
    if card is not None:
        write_bytes(join(folder, CARD_NAME), card(manifest).encode())
    config = peft_config(
        adapter.modules, base_model=spec.backbone, modules_to_save=() if adapter.head_weight is None else ["head"]
    )
    write_bytes(join(folder, CONFIG_NAME), json.dumps(config, indent=2).encode())


def _seen_as(adapter: Adapter) -> dict[str, Any]:
    """How the adapter sees images, as far as it is not as the backbone does."""
    seen = {"image_px": adapter.spec.image_px, "mean": adapter.mean, "std": adapter.std}
    return {name: value for name, value in seen.items() if value is not None} | (
        {} if adapter.pool == "cls" else {"pool": adapter.pool}
    )


def read_adapter(folder: str) -> Adapter:
    """Plain LoRA in PEFT's format on a model of timm or Hugging Face, ours or another's.

    Raises:
        AdapterError: not a LoRA, damaged, or saved in a way that only `lr-ray library add` reads.
        StorageError: not readable.
    """
    name, where = folder.rstrip("/").rsplit("/", 1)[-1], f"adapter {folder}"
    try:
        config: dict[str, Any] = json.loads(read_bytes(join(folder, CONFIG_NAME)))
        if not isinstance(config, dict):
            raise ValueError(f"{CONFIG_NAME} holds no JSON object")
        tensors: dict[str, Tensor] = load_safetensors(_read_weights(folder))
    except (ValueError, RecursionError, SafetensorError) as error:
        raise AdapterError(f"{where}: damaged ({error}); get it again from its source or remove it") from error
    try:
        manifest = read_manifest(folder) or {}
    except StorageError as error:
        if not isinstance(error.__cause__, (ValueError, RecursionError)):
            raise
        raise AdapterError(f"{where}: {MANIFEST_NAME} is damaged ({error.__cause__}); correct or remove that file") from error
    return adapter_of(parse_lora(config, in_fp32(tensors, where), where), config, manifest, adapter_id=name, where=where)


def adapter_of(
    parsed: Parsed, config: Mapping[str, Any], manifest: Mapping[str, Any], *, adapter_id: str, where: str
) -> Adapter:
    """The adapter of what its files say.

    Args:
        config: `adapter_config.json`.
        manifest: `lr_ray.json`, or what else is known: adapter_id, class_names, backbone_digest, image_px, mean, std, pool.
        adapter_id: if the manifest has none.
        where: how messages call the adapter.

    Raises:
        AdapterError: the manifest is not one, or does not fit the weights.
    """
    try:
        known = _Known.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterError(
            f"{where}: {'.'.join(map(str, (MANIFEST_NAME, *first['loc'])))}: {first['msg']}; correct or remove that file"
        ) from error
    adapter_id = known.adapter_id or adapter_id
    num_classes = 0 if parsed.head_weight is None else parsed.head_weight.shape[0]
    class_names = known.class_names or tuple(f"{adapter_id}/{index}" for index in range(num_classes))
    if len(class_names) != num_classes:
        raise AdapterError(
            f"{where}: {len(class_names)} class names for a head of {num_classes} classes; correct {MANIFEST_NAME}"
        )
    adapter = Adapter(
        spec=AdapterSpec(
            adapter_id=adapter_id,
            digest="",
            backbone=str(config.get("base_model_name_or_path") or ""),
            backbone_digest=known.backbone_digest,
            class_names=class_names,
            license=str(config.get("license") or known.license),
            image_px=known.image_px,
        ),
        modules=parsed.modules,
        head_weight=parsed.head_weight,
        head_bias=parsed.head_bias,
        shifts=parsed.shifts,
        pool=known.pool or parsed.pool,
        mean=known.mean,
        std=known.std,
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


def with_digest(adapter: Adapter) -> Adapter:
    """The adapter with its spec's digest set: SHA-256 of its weights, class names and how it sees images."""
    names = {"class_names": "\n".join(adapter.spec.class_names).encode() or b"-"}
    if seen := _seen_as(replace(adapter, spec=replace(adapter.spec, image_px=None))):
        names["seen_as"] = json.dumps(seen).encode()
    texts = {name: torch.frombuffer(bytearray(text), dtype=torch.uint8) for name, text in names.items()}
    digest = digest_tensors(adapter.tensors() | texts)
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


def read_specs(folders: Sequence[str], *, on: Backbone | None = None) -> list[AdapterSpec]:
    """What is known of the adapters in these folders, of which a few at a time are in memory.

    Args:
        on: a backbone that they must be made for; default any.

    Raises:
        AdapterError: see `read_adapter` and `check_adapter`.
    """

    def spec_of(folder: str) -> AdapterSpec:
        adapter = read_adapter(folder)
        if on is not None:
            check_adapter(adapter, on)
        return adapter.spec

    return read_many(spec_of, folders)


def read_adapters(root: str) -> Iterator[Adapter]:
    """The adapters below `root`, one in memory at a time."""
    return (read_adapter(folder) for folder in list_adapters(root))
