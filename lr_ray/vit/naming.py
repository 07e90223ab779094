"""The names that Hugging Face's Vision Transformers give to their modules and weights, mapped to timm's both ways.

A table of templates for every family and version of names says which timm module each foreign one is; all functions here
look names up in them. Templates hold `{i}` where a block's number stands, and a target may end in `/0`, `/1` or `/2`: the
query's, key's or value's third of the rows of timm's fused qkv.

A name may stand behind the wrappers in `_WRAPPERS`, in any order and number; whatever else stands before it (`text_model`,
`bert`, ...) makes it unknown. A name says nothing of sizes: that the tensors fit the backbone is for the caller to check.
Unknown are DINOv2's SwiGLU and registers, SigLIP's head, and the further families that share some of these names.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lr_ray.errors import BackboneError

Family = Literal["timm", "vit", "deit", "clip", "dinov2"]
Version = Literal[4, 5]
"""Of transformers. Checkpoints and nearly all shared adapters have the names of 4, which 5 still reads."""
_Naming = tuple[Family, Version]
_Target = tuple[str, int | None]

_WRAPPERS = (
    "backbone",
    "base_model",
    "clip",
    "deit",
    "dinov2",
    "encoder",
    "feature_extractor",
    "features",
    "image_encoder",
    "image_model",
    "model",
    "module",
    "net",
    "network",
    "_orig_mod",
    "student",
    "teacher",
    "trunk",
    "vision_backbone",
    "vision_encoder",
    "vision_model",
    "vision_tower",
    "visual",
    "vit",
)

_TIMM = {
    name: name
    for name in (
        "patch_embed.proj",
        "norm_pre",
        "blocks.{i}.norm1",
        "blocks.{i}.attn.qkv",
        "blocks.{i}.attn.proj",
        "blocks.{i}.ls1",
        "blocks.{i}.norm2",
        "blocks.{i}.mlp.fc1",
        "blocks.{i}.mlp.fc2",
        "blocks.{i}.ls2",
        "norm",
    )
}
_VIT_4 = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.{i}.layernorm_before": "blocks.{i}.norm1",
    "encoder.layer.{i}.attention.attention.query": "blocks.{i}.attn.qkv/0",
    "encoder.layer.{i}.attention.attention.key": "blocks.{i}.attn.qkv/1",
    "encoder.layer.{i}.attention.attention.value": "blocks.{i}.attn.qkv/2",
    "encoder.layer.{i}.attention.output.dense": "blocks.{i}.attn.proj",
    "encoder.layer.{i}.layernorm_after": "blocks.{i}.norm2",
    "encoder.layer.{i}.intermediate.dense": "blocks.{i}.mlp.fc1",
    "encoder.layer.{i}.output.dense": "blocks.{i}.mlp.fc2",
    "layernorm": "norm",
}
_VIT_5 = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layers.{i}.layernorm_before": "blocks.{i}.norm1",
    "layers.{i}.attention.q_proj": "blocks.{i}.attn.qkv/0",
    "layers.{i}.attention.k_proj": "blocks.{i}.attn.qkv/1",
    "layers.{i}.attention.v_proj": "blocks.{i}.attn.qkv/2",
    "layers.{i}.attention.o_proj": "blocks.{i}.attn.proj",
    "layers.{i}.layernorm_after": "blocks.{i}.norm2",
    "layers.{i}.mlp.fc1": "blocks.{i}.mlp.fc1",
    "layers.{i}.mlp.fc2": "blocks.{i}.mlp.fc2",
    "layernorm": "norm",
}
_CLIP = {
    "embeddings.patch_embedding": "patch_embed.proj",
    "pre_layrnorm": "norm_pre",
    "encoder.layers.{i}.layer_norm1": "blocks.{i}.norm1",
    "encoder.layers.{i}.self_attn.q_proj": "blocks.{i}.attn.qkv/0",
    "encoder.layers.{i}.self_attn.k_proj": "blocks.{i}.attn.qkv/1",
    "encoder.layers.{i}.self_attn.v_proj": "blocks.{i}.attn.qkv/2",
    "encoder.layers.{i}.self_attn.out_proj": "blocks.{i}.attn.proj",
    "encoder.layers.{i}.layer_norm2": "blocks.{i}.norm2",
    "encoder.layers.{i}.mlp.fc1": "blocks.{i}.mlp.fc1",
    "encoder.layers.{i}.mlp.fc2": "blocks.{i}.mlp.fc2",
    "post_layernorm": "norm",
}
_DINOV2 = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.{i}.norm1": "blocks.{i}.norm1",
    "encoder.layer.{i}.layer_scale1": "blocks.{i}.ls1",
    "encoder.layer.{i}.norm2": "blocks.{i}.norm2",
    "encoder.layer.{i}.mlp.fc1": "blocks.{i}.mlp.fc1",
    "encoder.layer.{i}.mlp.fc2": "blocks.{i}.mlp.fc2",
    "encoder.layer.{i}.layer_scale2": "blocks.{i}.ls2",
    "layernorm": "norm",
}
_DINOV2_4 = _DINOV2 | {
    "encoder.layer.{i}.attention.attention.query": "blocks.{i}.attn.qkv/0",
    "encoder.layer.{i}.attention.attention.key": "blocks.{i}.attn.qkv/1",
    "encoder.layer.{i}.attention.attention.value": "blocks.{i}.attn.qkv/2",
    "encoder.layer.{i}.attention.output.dense": "blocks.{i}.attn.proj",
}
_DINOV2_5 = _DINOV2 | {
    "encoder.layer.{i}.attention.q_proj": "blocks.{i}.attn.qkv/0",
    "encoder.layer.{i}.attention.k_proj": "blocks.{i}.attn.qkv/1",
    "encoder.layer.{i}.attention.v_proj": "blocks.{i}.attn.qkv/2",
    "encoder.layer.{i}.attention.o_proj": "blocks.{i}.attn.proj",
}
_MODULES: dict[_Naming, dict[str, str]] = {
    ("timm", 4): _TIMM,
    ("timm", 5): _TIMM,
    ("vit", 4): _VIT_4,
    ("vit", 5): _VIT_5,
    ("deit", 4): _VIT_4,
    ("deit", 5): _VIT_5,
    ("clip", 4): _CLIP,
    ("clip", 5): _CLIP,
    ("dinov2", 4): _DINOV2_4,
    ("dinov2", 5): _DINOV2_5,
}
"""In the order of preference where a name alone does not tell the family."""
_HEADS: dict[Family, dict[str, str]] = {
    "timm": {"head": "head", "head_dist": "head_dist"},
    "vit": {"classifier": "head"},
    "deit": {"classifier": "head", "cls_classifier": "head", "distillation_classifier": "head_dist"},
    "clip": {"classifier": "head"},
    "dinov2": {"classifier": "head"},
}
_BARE: dict[Family, dict[str, str]] = {
    "timm": {
        "cls_token": "cls_token",
        "dist_token": "dist_token",
        "pos_embed": "pos_embed",
        "blocks.{i}.ls1.gamma": "blocks.{i}.ls1.gamma",
        "blocks.{i}.ls2.gamma": "blocks.{i}.ls2.gamma",
    },
    "vit": {"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed"},
    "deit": {
        "embeddings.cls_token": "cls_token",
        "embeddings.distillation_token": "dist_token",
        "embeddings.position_embeddings": "pos_embed",
    },
    "clip": {"embeddings.class_embedding": "cls_token", "embeddings.position_embedding.weight": "pos_embed"},
    "dinov2": {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "encoder.layer.{i}.layer_scale1.lambda1": "blocks.{i}.ls1.gamma",
        "encoder.layer.{i}.layer_scale2.lambda1": "blocks.{i}.ls2.gamma",
    },
}
"""Tensors that are not the weight or bias of a module."""
_WITHOUT_WEIGHT = {"blocks.{i}.ls1", "blocks.{i}.ls2"}
_ABSENT: dict[Family, set[str]] = {"clip": {"patch_embed.proj.bias"}}
_OPTIONAL: dict[Family, set[str]] = {
    "timm": {
        "dist_token",
        "patch_embed.proj.bias",
        "norm_pre.weight",
        "norm_pre.bias",
        "blocks.{i}.attn.qkv.bias",
        "blocks.{i}.ls1.gamma",
        "blocks.{i}.ls2.gamma",
    },
    "vit": {"blocks.{i}.attn.qkv.bias"},
    "deit": {"blocks.{i}.attn.qkv.bias"},
    "dinov2": {"blocks.{i}.attn.qkv.bias"},
}
"""Tensors, by timm's names, that all blocks of a model may lack, but not some."""
_RANK = {"embeddings.class_embedding": 1, "embeddings.position_embedding.weight": 2}
"""Dimensions of tensors that have leading ones in timm."""
_LEFT_OUT = "|".join(
    (
        r"text_model\..+|logit_scale|(?:text|visual)_projection\.weight",
        r"embeddings\.(?:mask_token|position_ids)",
        r"(?:pooler\.dense|classifier|cls_classifier|distillation_classifier|head|head_dist)\.(?:weight|bias)",
    )
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """A module of timm's Vision Transformer, or a third of one.

    Attributes:
        module: timm's name of it, such as `blocks.3.attn.qkv`, `patch_embed.proj`, `norm`, `head`.
        part: 0 query, 1 key, 2 value third of the rows of the fused qkv; None for the whole module.
    """

    module: str
    part: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Match:
    """A name taken apart: wrappers, template, number of the block ("" where it has none), meanings by naming."""

    wrappers: list[str]
    template: str
    index: str
    targets: dict[_Naming, _Target]


def _target(text: str) -> _Target:
    name, _, part = text.partition("/")
    return name, int(part) if part else None


def _parameters_of(naming: _Naming) -> dict[str, _Target]:
    parameters = {name: _target(text) for name, text in _BARE[naming[0]].items()}
    for name, text in _MODULES[naming].items():
        module, part = _target(text)
        if module not in _WITHOUT_WEIGHT:
            parameters |= {f"{name}.{kind}": (f"{module}.{kind}", part) for kind in ("weight", "bias")}
    absent = _ABSENT.get(naming[0], set())
    return {name: target for name, target in parameters.items() if target[0] not in absent}


def _lookup(tables: Mapping[_Naming, Mapping[str, _Target]], separator: str) -> dict[str, dict[_Naming, _Target]]:
    lookup: dict[str, dict[_Naming, _Target]] = {}
    for naming, table in tables.items():
        for template, target in table.items():
            lookup.setdefault(template.replace(".", separator), {})[naming] = target
    return lookup


_SITES: dict[_Naming, dict[str, _Target]] = {
    naming: {name: _target(text) for name, text in (table | _HEADS[naming[0]]).items()} for naming, table in _MODULES.items()
}
_PARAMETERS: dict[_Naming, dict[str, _Target]] = {naming: _parameters_of(naming) for naming in _MODULES}
_BY_MODULE = _lookup(_SITES, ".")
_BY_UNDERSCORED = _lookup(_SITES, "_")
_BY_PARAMETER = _lookup(_PARAMETERS, ".")
_DOTTED_WRAPPERS = re.compile(rf"(?:(?:{'|'.join(_WRAPPERS)})\.)*")
_UNDERSCORED_WRAPPERS = re.compile(rf"(?:(?:{'|'.join(_WRAPPERS)}|lora|lycoris)_)*")
_LEFT_OUT_KEY = re.compile(rf"{_DOTTED_WRAPPERS.pattern}(?:{_LEFT_OUT})")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,3}")


def find_site(name: str) -> tuple[Family, Site] | None:
    """Which of timm's modules a module's dotted name means, or None where it is no module of any family.

    Where the name alone does not tell the family, the site is the same in all: the family is then one that a wrapper
    names (`deit.`), or else the first of vit, deit, clip, dinov2. Classifiers are `head` in every family, although CLIP's
    reads the mean of the patches and DINOv2's reads [CLS] and that mean, (C, 2·D).
    """
    return _find(_match(name, ".", _BY_MODULE, _DOTTED_WRAPPERS))


def find_underscored(name: str) -> tuple[Family, Site] | None:
    """`find_site` for kohya's names, underscores for dots, with or without `lora_` in front."""
    return _find(_match(name, "_", _BY_UNDERSCORED, _UNDERSCORED_WRAPPERS))


def foreign_names(family: Family, *, num_blocks: int, version: Version = 4, prefix: str = "") -> dict[str, Site]:
    """{module name: site} of every module with weights that a family may have, heads aside.

    Args:
        family: whose names.
        num_blocks: of the model.
        version: of transformers; of no effect for timm and CLIP.
        prefix: put before each name, such as `vit.` for ViTForImageClassification, `vision_model.` for CLIPModel and, in
            transformers 4, CLIPVisionModel.
    """
    names: dict[str, Site] = {}
    for template, text in _MODULES[family, version].items():
        module, part = _target(text)
        for index in _blocks(template, num_blocks):
            names[prefix + _fill(template, index)] = Site(module=_fill(module, index), part=part)
    return names


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Hugging Face model by timm's names, q, k and v fused; timm's own names stay as they are.

    The position embedding is copied as it is. Left out, because a backbone has no use for them: classifiers (also timm's),
    poolers, DINOv2's mask token, and of CLIPModel the text tower, projections and temperature. Tensors that are neither
    fused nor reshaped are those of `state`, not copies.

    Args:
        state: {name: tensor} of one model of any family, behind any wrappers.

    Raises:
        BackboneError: a name that is no family's or of another than those before it, a weight that is missing or there
            twice, or q, k and v of different shapes.
    """
    naming, read = _read(state)
    parameters = _PARAMETERS[naming]
    _check_complete(read, naming)
    weights: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for template, (target, part) in parameters.items():
        for index, tensor in read.get(template, {}).items():
            name = _fill(target, index)
            if part is not None:
                thirds.setdefault(name, {})[part] = tensor
            else:
                weights[name] = tensor[(None,) * (3 - tensor.ndim)] if template in _RANK else tensor
    for name, parts in thirds.items():
        if len(parts) < 3 or len({tensor.shape for tensor in parts.values()}) > 1:
            shapes = {"qkv"[part]: tuple(tensor.shape) for part, tensor in sorted(parts.items())}
            raise BackboneError(f"weights of a {naming[0]} model: {name} needs q, k and v of one shape, but there are {shapes}")
        weights[name] = torch.cat([parts[part] for part in range(3)])
    return weights


def from_timm(state: Mapping[str, Tensor], family: Family, *, version: Version = 4, prefix: str = "") -> dict[str, Tensor]:
    """The other way: a timm model's weights by another family's names, q, k and v apart; heads are left out.

    Tensors that are neither split nor reshaped are those of `state`, not copies. The mask token of DINOv2, which timm
    lacks, is not made up.

    Args:
        state: {timm name: tensor} of a whole model.
        family, version, prefix: as in `foreign_names`.

    Raises:
        BackboneError: a weight that the family lacks, or that the family has and `state` lacks.
    """
    weights = to_timm(state)
    num_blocks = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    optional = _OPTIONAL.get(family, set())
    foreign: dict[str, Tensor] = {}
    used: set[str] = set()
    for template, (target, part) in _PARAMETERS[family, version].items():
        for index in _blocks(target, num_blocks):
            name = _fill(target, index)
            if name not in weights:
                if target in optional:
                    continue
                raise BackboneError(f"weights have no {name}, which every {family} model has; give another family")
            used.add(name)
            tensor = weights[name]
            if part is not None:
                if tensor.shape[0] % 3:
                    raise BackboneError(f"weights {name}: {tensor.shape[0]} rows are not three equal parts, q, k and v")
                tensor = tensor.chunk(3)[part].clone()
            if template in _RANK:
                tensor = tensor.reshape(tensor.shape[3 - _RANK[template] :])
            foreign[prefix + _fill(template, index)] = tensor
    if unused := [name for name in weights if name not in used]:
        raise BackboneError(f"weights {unused[0]!r}: a {family} model has nothing of the kind; give another family")
    return foreign


def _match(name: str, separator: str, lookup: Mapping[str, dict[_Naming, _Target]], wrappers: re.Pattern[str]) -> _Match | None:
    """The longest end of `name` that is in `lookup` and has only wrappers before it."""
    parts = name.split(separator)
    numbers = [part for part in parts if _NUMBER.fullmatch(part)]
    general = ["{i}" if _NUMBER.fullmatch(part) else part for part in parts]
    for start in range(len(parts)):
        template = separator.join(general[start:])
        before = "".join(part + separator for part in parts[:start])
        if template in lookup and template.count("{i}") == len(numbers) and wrappers.fullmatch(before):
            index = numbers[0] if numbers else ""
            return _Match(wrappers=parts[:start], template=template, index=index, targets=lookup[template])
    return None


def _find(match: _Match | None) -> tuple[Family, Site] | None:
    if match is None:
        return None
    naming = next((naming for naming in match.targets if naming[0] in match.wrappers), next(iter(match.targets)))
    module, part = match.targets[naming]
    return naming[0], Site(module=_fill(module, match.index), part=part)


def _fill(template: str, index: str) -> str:
    return template.replace("{i}", index)


def _blocks(template: str, num_blocks: int) -> Iterator[str]:
    """What to fill into a template: every block's number, or "" once where it has no place for one."""
    return map(str, range(num_blocks)) if "{i}" in template else iter([""])


def _read(state: Mapping[str, Tensor]) -> tuple[_Naming, dict[str, dict[str, Tensor]]]:
    """The first naming that knows all names, and {template: {number of the block: tensor}}."""
    namings = list(_MODULES)
    read: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if _LEFT_OUT_KEY.fullmatch(key):
            continue
        match = _match(key, ".", _BY_PARAMETER, _DOTTED_WRAPPERS)
        if match is None:
            raise BackboneError(f"weights {key!r}: not a name that timm or Hugging Face's ViT, DeiT, CLIP or DINOv2 give")
        left = [naming for naming in namings if naming in match.targets]
        if not left:
            raise BackboneError(f"weights {key!r}: a name of another kind of model than the names before it ({namings[0][0]})")
        tensors = read.setdefault(match.template, {})
        if match.index in tensors:
            raise BackboneError(f"weights {key!r}: there under another prefix too; give the weights of one model")
        namings, tensors[match.index] = left, tensor
    return namings[0], read


def _check_complete(read: Mapping[str, Mapping[str, Tensor]], naming: _Naming) -> None:
    """Raise unless all tensors are there that the family must have, and optional ones in all blocks or in none."""
    num_blocks = max((int(index) + 1 for tensors in read.values() for index in tensors if index), default=1)
    optional = _OPTIONAL.get(naming[0], set())
    for template, (target, _) in _PARAMETERS[naming].items():
        if template not in read and target in optional:
            continue
        for index in _blocks(template, num_blocks):
            if index not in read.get(template, {}):
                raise BackboneError(
                    f"weights of a {naming[0]} model lack {_fill(template, index)}; give the whole model's weights"
                )
