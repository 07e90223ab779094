"""Adapters saved as strangers share them: in five formats, some of them damaged. For `lr-ray library sample` and tests."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lr_ray.storage.filesystem import join, write_bytes
from lr_ray.storage.manifest import CONFIG_NAME, WEIGHTS_NAME
from lr_ray.storage.peft import PREFIX, foreign_modules, peft_config, peft_tensors
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import Adapter
from lr_ray.vit.naming import Version

Files = dict[str, bytes]
"""{name in the adapter's folder: content}."""


def save_as_stranger(folder: str, name: str, adapter: Adapter, backbone: Backbone, *, format_: str, damage: str = "") -> str:
    """Write an adapter below `folder`.

    Args:
        name: of its own folder or file.
        format_: a key of FORMATS.
        damage: a key of DAMAGES, or "".

    Returns:
        Where it is.
    """
    if damage:
        adapter = DAMAGES[damage](adapter)
    files = FORMATS[format_](adapter, backbone)
    if damage == "cut off":
        files = {
            file: content[: len(content) // 2] if file.endswith(".safetensors") else content for file, content in files.items()
        }
    if damage == "pickle":
        files = {file.replace("adapter_model.safetensors", "adapter_model.bin"): content for file, content in files.items()}
    if format_ == "archive":
        write_bytes(uri := join(folder, f"{name}.tar.gz"), _tar(name, files))
        return uri
    if format_ == "kohya":
        write_bytes(uri := join(folder, f"{name}.safetensors"), files[WEIGHTS_NAME])
        return uri
    for file in sorted(files, key=lambda file: file == CONFIG_NAME):
        write_bytes(join(folder, name, file), files[file])
    return join(folder, name)


def _timm(adapter: Adapter, _backbone: Backbone) -> Files:
    tensors = peft_tensors(adapter.modules) | _head(adapter, f"{PREFIX}head")
    return _folder(adapter, peft_config(adapter.modules, base_model=adapter.spec.backbone, modules_to_save=["head"]), tensors)


def _vit(adapter: Adapter, backbone: Backbone, *, version: Version, use_rslora: bool) -> Files:
    """On ViTForImageClassification, query and key and value apart; with the processor's config."""
    modules = foreign_modules(adapter.modules, "vit", num_blocks=len(backbone.model.blocks), version=version, prefix="vit.")
    config = peft_config(modules, base_model=adapter.spec.backbone, modules_to_save=["classifier"])
    if use_rslora:
        roots = {name: low.scale * len(low.a) ** 0.5 for name, low in modules.items()}
        config |= {"use_rslora": True, "lora_alpha": next(iter(roots.values())), "alpha_pattern": roots}
    side = backbone.image_px
    seen = {"size": {"height": side, "width": side}, "image_mean": backbone.mean.tolist(), "image_std": backbone.std.tolist()}
    files = _folder(adapter, config, peft_tensors(modules) | _head(adapter, f"{PREFIX}classifier"))
    return files | {"preprocessor_config.json": _json(seen)}


def _kohya(adapter: Adapter, backbone: Backbone) -> Files:
    """One file of lora_down, lora_up and alpha; the names of the classes are lost."""
    modules = foreign_modules(adapter.modules, "vit", num_blocks=len(backbone.model.blocks), prefix="vit.")
    tensors: dict[str, Tensor] = {}
    for name, low_rank in modules.items():
        flat = f"lora_{name.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"] = low_rank.a.contiguous()
        tensors[f"{flat}.lora_up.weight"] = low_rank.b.contiguous()
        tensors[f"{flat}.alpha"] = torch.tensor(low_rank.scale * len(low_rank.a))
    return {WEIGHTS_NAME: save_safetensors(tensors | _head(adapter, "classifier"))}


def _archive(adapter: Adapter, _backbone: Backbone) -> Files:
    tensors = peft_tensors(adapter.modules) | _head(adapter, f"{PREFIX}head")
    halves = {name: value.half() for name, value in tensors.items()}
    return _folder(adapter, peft_config(adapter.modules, base_model=adapter.spec.backbone, modules_to_save=["head"]), halves)


def _folder(adapter: Adapter, config: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    labels = {str(index): name for index, name in enumerate(adapter.spec.class_names)}
    weights = save_safetensors(tensors, metadata={"format": "pt"})
    return {WEIGHTS_NAME: weights, "config.json": _json({"id2label": labels}), CONFIG_NAME: _json(config)}


def _head(adapter: Adapter, name: str) -> dict[str, Tensor]:
    found = {f"{name}.weight": adapter.head_weight, f"{name}.bias": adapter.head_bias}
    return {key: value.contiguous() for key, value in found.items() if value is not None}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode()


def _tar(name: str, files: Files) -> bytes:
    """The same bytes from the same files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for file, content in files.items():
            member = tarfile.TarInfo(f"{name}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), mtime=0)


FORMATS: dict[str, Callable[[Adapter, Backbone], Files]] = {
    "timm": _timm,
    "transformers 4": lambda adapter, backbone: _vit(adapter, backbone, version=4, use_rslora=False),
    "transformers 5, rsLoRA": lambda adapter, backbone: _vit(adapter, backbone, version=5, use_rslora=True),
    "kohya": _kohya,
    "archive": _archive,
}
"""PEFT on timm; PEFT on Hugging Face's ViT under the names of two versions; kohya's; PEFT on timm in half precision, packed."""


def _untrained(adapter: Adapter) -> Adapter:
    return replace(adapter, modules={name: replace(low, b=torch.zeros_like(low.b)) for name, low in adapter.modules.items()})


def _not_a_number(adapter: Adapter) -> Adapter:
    name, low_rank = next(iter(adapter.modules.items()))
    return replace(adapter, modules={**adapter.modules, name: replace(low_rank, a=torch.full_like(low_rank.a, torch.nan))})


def _of_another(adapter: Adapter) -> Adapter:
    wider = {name: replace(low, a=torch.cat([low.a, low.a[:, :8]], dim=1)) for name, low in adapter.modules.items()}
    return replace(adapter, modules=wider)


DAMAGES: dict[str, Callable[[Adapter], Adapter]] = {
    "cut off": lambda adapter: adapter,
    "untrained": _untrained,
    "NaN": _not_a_number,
    "pickle": lambda adapter: adapter,
    "another backbone": _of_another,
}
"""What makes an adapter that no library should take; `cut off` and `pickle` are of its file."""
