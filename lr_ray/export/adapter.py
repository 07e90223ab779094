"""The meta-LoRA itself as a PEFT folder, for timm's model (`peft`) or that of Hugging Face (`peft-hf`).

A folder is loaded again, by PEFT onto the model that it is for where PEFT (and transformers) are installed, else by LR-Ray
onto timm's.
"""

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lr_ray.errors import ExportError
from lr_ray.export.files import Features
from lr_ray.export.hugging_face import ForeignModel, counterpart_of, make_foreign
from lr_ray.library.names import hugging_face_id
from lr_ray.model import Parts
from lr_ray.report.card import hub_backbone
from lr_ray.storage.manifest import CONFIG_NAME, METRIC_NAME, WEIGHTS_NAME
from lr_ray.storage.peft import foreign_modules, parse_lora, peft_config, peft_tensors
from lr_ray.vit.embedded import EMBEDDED_BACKBONE
from lr_ray.vit.lora import LowRank, merge
from lr_ray.vit.tokens import encode


def hub_id_of(parts: Parts, *, foreign: bool) -> str | None:
    """The backbone's id on the hub, of timm's model or of the `foreign` one; None where its weights are not known there."""
    timm_id = hub_backbone(parts.manifest["config"]["backbone"])
    return hugging_face_id(hub_name_of(parts)) if foreign and timm_id is not None else timm_id


def hub_name_of(parts: Parts) -> str:
    """timm's name of the hub's weights."""
    return EMBEDDED_BACKBONE.hub_name if parts.backbone.name == "embedded" else parts.backbone.name


def make_peft(parts: Parts) -> dict[str, bytes]:
    """Config and weights for timm's model."""
    return _folder(parts, parts.adapter.modules, hub_id_of(parts, foreign=False))


def make_peft_hf(parts: Parts) -> dict[str, bytes]:
    """Config and weights for the model of the installed transformers.

    Raises:
        ExportError: there is no such model, or the update is zero.
    """
    counterpart = counterpart_of(parts.backbone)
    modules = foreign_modules(
        parts.adapter.modules,
        counterpart.family,
        num_blocks=len(parts.backbone.model.blocks),
        version=counterpart.version,
        prefix=counterpart.prefix,
    )
    return _folder(parts, modules, hub_id_of(parts, foreign=True))


def metric_file(parts: Parts) -> dict[str, bytes]:
    """The metric as a file of its own; none without one."""
    return {} if parts.metric is None else {METRIC_NAME: save_safetensors(parts.metric.tensors())}


def _folder(parts: Parts, modules: Mapping[str, LowRank], base_model: str | None) -> dict[str, bytes]:
    """The metric is beside the adapter; the config comes last: it makes the folder count."""
    if not modules:
        raise ExportError("the meta-LoRA changes nothing (all its updates are zero), so there is nothing to export; train it")
    weights = save_safetensors(peft_tensors(modules), metadata={"format": "pt"})
    config = peft_config(modules, base_model=base_model or parts.backbone.name)
    return {**metric_file(parts), WEIGHTS_NAME: weights, CONFIG_NAME: json.dumps(config, indent=2).encode()}


def read_peft(parts: Parts, files: Mapping[str, bytes]) -> Features:
    """The features of timm's model with the folder's adapter."""
    if find_spec("peft") is None:
        return _read_ours(parts, files)
    wrapped = _wrap(copy.deepcopy(parts.backbone.model), files)
    network = wrapped.get_base_model()

    def features(images: Tensor) -> Tensor:
        return encode(network, parts.backbone.normalize(images)).features

    return features


def read_peft_hf(parts: Parts, files: Mapping[str, bytes]) -> Features:
    """The features of transformers' model with the folder's adapter."""
    if find_spec("peft") is None or find_spec("transformers") is None:
        return _read_ours(parts, files)
    counterpart = counterpart_of(parts.backbone)
    return ForeignModel(_wrap(make_foreign(parts.backbone, counterpart), files), parts.backbone, counterpart.features)


def _wrap(model: Any, files: Mapping[str, bytes]) -> Any:
    """PEFT's own loading."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return import_module("peft").PeftModel.from_pretrained(model, folder).eval()


def _read_ours(parts: Parts, files: Mapping[str, bytes]) -> Features:
    found = parse_lora(json.loads(files[CONFIG_NAME]), load_safetensors(files[WEIGHTS_NAME]), "the exported adapter")
    network = copy.deepcopy(parts.backbone.model)
    merge(network, replace(parts.adapter, modules=found.modules, shifts=found.shifts).updates())
    return lambda images: encode(network, parts.backbone.normalize(images)).features
