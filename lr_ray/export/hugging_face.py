"""The model of transformers that is the counterpart of a backbone: its family, its names, and itself."""

import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from lr_ray.errors import BackboneError, ExportError
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.naming import Family, Version, from_timm

_FAMILIES: tuple[tuple[str, Family], ...] = (
    (r"embedded|.*dinov2.*", "dinov2"),
    (r"vit_.*_clip_.*", "clip"),
    (r"deit_.*distilled.*", "deit"),
    (r"(?:vit|deit)_.*", "vit"),
)
_CLASSES: dict[Family, str] = {
    "vit": "ViTModel",
    "deit": "DeiTModel",
    "clip": "CLIPVisionModel",
    "dinov2": "Dinov2Model",
}
_REMEDY = "give peft, which is for timm's model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Counterpart:
    """How transformers calls a backbone.

    Attributes:
        version: of transformers' names; 5 renamed modules (CLIP's in 5.6, ViT's and DeiT's in 5.9), and PEFT loads an adapter
            by the names of the model it is for.
        prefix: before the names of modules in `model_class`.
    """

    family: Family
    version: Version

    @property
    def prefix(self) -> str:
        return "vision_model." if self.family == "clip" and self.version == 4 else ""

    @property
    def model_class(self) -> str:
        return _CLASSES[self.family]

    @property
    def features(self) -> str:
        """Of the model's output: the expression of the normalised [CLS]."""
        return "pooler_output" if self.family == "clip" else "last_hidden_state[:, 0]"


@cache
def installed_version(family: Family) -> Version:
    """That of transformers' names of the family here, asked of a small model; the newest where it is not installed."""
    if find_spec("transformers") is None:
        return 5
    transformers = import_module("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8, "patch_size": 8}
    with torch.device("meta"):
        config = getattr(transformers, _CLASSES[family].replace("Model", "Config"))(**sizes)
        names = getattr(transformers, _CLASSES[family])(config).state_dict()
    return 4 if any(name.startswith("vision_model.") or ".attention.attention." in name for name in names) else 5


def counterpart_of(backbone: Backbone) -> Counterpart:
    """By the backbone's name, checked against its weights.

    Raises:
        ExportError: transformers has no such model.
    """
    name = backbone.name.partition(".")[0]
    family = next((family for pattern, family in _FAMILIES if re.fullmatch(pattern, name)), None)
    if family is None:
        raise ExportError(f"--format peft-hf: {backbone.name!r} is no ViT, DeiT, CLIP or DINOv2 of transformers; {_REMEDY}")
    try:
        from_timm(backbone.model.state_dict(), family)
    except BackboneError as error:
        raise ExportError(
            f"--format peft-hf: transformers has no counterpart of {backbone.name!r} among its {family} models "
            f"({str(error).partition(';')[0]}); {_REMEDY}"
        ) from error
    model = backbone.model
    if not all(type(block.mlp) is Mlp for block in model.blocks) or model.no_embed_class:
        raise ExportError(
            f"--format peft-hf: {backbone.name!r} has another MLP or position embedding than the {family} models of "
            f"transformers; {_REMEDY}"
        )
    return Counterpart(family=family, version=installed_version(family))


class ForeignModel(nn.Module):
    """A model of transformers; images in [0, 1] → features."""

    def __init__(self, model: Any, backbone: Backbone, features: str) -> None:
        super().__init__()
        self.model = model
        self.backbone = backbone
        self.pooled = features == "pooler_output"

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, D)."""
        output = self.model(pixel_values=self.backbone.normalize(images))
        found: Tensor = output.pooler_output if self.pooled else output.last_hidden_state[:, 0]
        return found


def make_foreign(backbone: Backbone, counterpart: Counterpart) -> Any:
    """The model of the installed transformers with the backbone's weights, at its image size.

    Raises:
        ExportError: the weights do not fit it.
    """
    transformers = import_module("transformers")
    config = getattr(transformers, counterpart.model_class.replace("Model", "Config"))(**_sizes(backbone, counterpart.family))
    options = {} if counterpart.family in ("clip", "dinov2") else {"add_pooling_layer": False}
    model = getattr(transformers, counterpart.model_class)(config, **options).eval()
    state = backbone.model.state_dict()
    weights = from_timm(state, counterpart.family, version=counterpart.version, prefix=counterpart.prefix)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ExportError(
            f"--format peft-hf: {backbone.name!r} does not fit {counterpart.model_class} ({error}); {_REMEDY}"
        ) from error
    if wrong := [name for name in (*missing, *unexpected) if not name.endswith(("mask_token", "position_ids"))]:
        raise ExportError(
            f"--format peft-hf: {backbone.name!r} does not fit {counterpart.model_class} of the installed transformers, which "
            f"differs in {wrong[0]}; {_REMEDY}"
        )
    return model


def _sizes(backbone: Backbone, family: Family) -> dict[str, Any]:
    """What transformers' config says of the backbone."""
    model, block = backbone.model, backbone.model.blocks[0]
    sizes: dict[str, Any] = {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": backbone.image_px,
        "patch_size": backbone.patch_px,
        "layer_norm_eps": model.norm.eps,
        "hidden_act": _activation(block.mlp.act, backbone),
    }
    hidden = block.mlp.fc1.out_features
    if family == "dinov2":
        return sizes | {"mlp_ratio": hidden // model.embed_dim, "qkv_bias": block.attn.qkv.bias is not None}
    if family == "clip":
        return sizes | {"intermediate_size": hidden}
    return sizes | {"intermediate_size": hidden, "qkv_bias": block.attn.qkv.bias is not None}


def _activation(activation: nn.Module, backbone: Backbone) -> str:
    """transformers' name of it, found by what it computes."""
    points = torch.linspace(-4, 4, 101)
    known = {
        "gelu": nn.functional.gelu(points),
        "quick_gelu": points * torch.sigmoid(1.702 * points),
        "gelu_pytorch_tanh": nn.functional.gelu(points, approximate="tanh"),
    }
    with torch.inference_mode():
        found = activation(points)
    for name, values in known.items():
        if torch.allclose(found, values, rtol=0, atol=1e-6):
            return name
    raise ExportError(f"--format peft-hf: transformers has no name for the activation of {backbone.name!r}; {_REMEDY}")
