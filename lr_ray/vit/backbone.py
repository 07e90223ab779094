"""The frozen Vision Transformer: timm model, preprocessing constants, provenance.

timm takes longer to import than torch, so here and beside it is imported where it is used: a config is read without it.
"""

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lr_ray.errors import BackboneError, did_you_mean
from lr_ray.section import Section
from lr_ray.vit.embedded import EMBEDDED_BACKBONE, digest_tensors, load_embedded
from lr_ray.vit.naming import to_timm

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

Precision = Literal["auto", "fp32", "bf16"]
_FULL_ATTENTION_TOKENS = 257
"""Up to here (224 px, 14 px patches; as far as measured) PyTorch's fused attention is the slower one on a CPU: a step takes
1.4 to 2 times as long. Beyond, the matrix would cost much memory."""


class BackboneConfig(Section):
    """Which Vision Transformer, at which image size."""

    name: str = "embedded"
    """A timm name such as `vit_base_patch16_clip_quickgelu_224.openai`, or `embedded`: DINOv2 ViT-S/14 without its last
    block."""
    image_px: int | None = Field(default=None, gt=0)
    """Side of the square images; any multiple of the patch size. Default: the model's own."""
    weights: str | None = None
    """A safetensors file in timm's names or Hugging Face's, instead of the weights that belong to `name`."""
    pretrained: bool = True
    """False: random weights, the same on every machine. For tests and speed measurements only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backbone:
    """A frozen Vision Transformer with a class token.

    Attributes:
        name: as in the config.
        model: timm model without head, in eval mode, parameters without gradient.
        image_px: side of its images in pixels.
        mean, std: (3,) the normalisation of its images, per channel of [0, 1] pixels.
        digest: SHA-256 of its weights but the position embedding, which depends on `image_px`.
        source: where the weights come from.
    """

    name: str
    model: "VisionTransformer"
    image_px: int
    mean: Tensor
    std: Tensor
    digest: str
    source: str

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def identity(self) -> dict[str, str | int]:
        """What of it determines a result, for the inputs of an artefact; of `embedded` the name fixes the rest."""
        identity: dict[str, str | int] = {"digest": self.digest, "image_px": self.image_px}
        return identity if self.name == "embedded" else identity | self._function

    @property
    def _function(self) -> dict[str, str | int]:
        """What the model computes besides its weights: models of other names may share them."""
        block: Any = self.model.blocks[0]
        return {
            "mean": " ".join(f"{value:g}" for value in self.mean.tolist()),
            "std": " ".join(f"{value:g}" for value in self.std.tolist()),
            "activation": type(block.mlp.act).__name__,
            "norm_eps": f"{block.norm1.eps:g}",
            "num_heads": block.attn.num_heads,
        }

    @property
    def num_features(self) -> int:
        return int(self.model.embed_dim)

    @property
    def num_patches(self) -> int:
        return int(self.model.patch_embed.num_patches)

    @property
    def patch_px(self) -> int:
        return int(self.model.patch_embed.patch_size[0])

    def normalize(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images, uint8 or float in [0, 1] → normalised floats on the backbone's device."""
        images = images.to(self.device)
        pixels = images.float().div_(255) if images.dtype == torch.uint8 else images
        return (pixels - self.mean[:, None, None]) / self.std[:, None, None]

    def denormalize(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised floats → pixels in [0, 1]."""
        return images * self.std[:, None, None] + self.mean[:, None, None]


def load_backbone(config: BackboneConfig, *, device: torch.device | str = "cpu") -> Backbone:
    """Load the model, interpolate its position embedding to `config.image_px`, freeze it.

    Raises:
        BackboneError: unknown name, no class token, not a Vision Transformer, an image size that the patches do not
            divide, or weights that cannot be had or do not fit.
    """
    import timm
    from timm.data import resolve_model_data_config

    architecture, arguments = architecture_of(config.name)
    image_px = check_architecture(architecture, config)
    arguments["num_classes"] = 0
    if config.pretrained or config.weights is not None:
        arguments |= {"img_size": image_px, "weight_init": "skip"}  # random weights would only be replaced
        model, source = _load_pretrained(architecture, arguments, config)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, source = timm.create_model(architecture, **arguments), "random weights, seed 0"
        model.set_input_size(image_px)  # afterwards: the size must not change what is drawn
    model.eval().requires_grad_(False).to(device)
    if torch.device(device).type == "cpu" and model.num_prefix_tokens + model.patch_embed.num_patches <= _FULL_ATTENTION_TOKENS:
        for block in model.blocks:
            block.attn.fused_attn = False
    data = resolve_model_data_config(model)
    weights = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    return Backbone(
        name=config.name,
        model=model,
        image_px=image_px,
        mean=torch.tensor(data["mean"], device=device),
        std=torch.tensor(data["std"], device=device),
        digest=digest_tensors(weights),
        source=source,
    )


def architecture_of(name: str) -> tuple[str, dict[str, Any]]:
    """timm's name of the architecture and the arguments that make it, for a backbone's name."""
    if name == "embedded":
        return EMBEDDED_BACKBONE.architecture, dict(EMBEDDED_BACKBONE.architecture_args)
    return name, {}


def check_architecture(architecture: str, config: BackboneConfig) -> int:
    """The image size to use.

    Raises:
        BackboneError: unless the method works on the architecture at that size.
    """
    import timm
    from timm.models.vision_transformer import Block, VisionTransformer

    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained=False, num_classes=0)
    except OSError as error:
        raise BackboneError(f"backbone {config.name!r}: its architecture could not be looked up: {error}") from error
    except (RuntimeError, ValueError) as error:
        if not str(error).startswith(("Unknown model", "Invalid pretrained tag")):
            raise
        meant = did_you_mean(architecture, [*timm.list_models(pretrained=True), "embedded"], most=3, cutoff=0.5)
        raise BackboneError(
            f"backbone {config.name!r}: timm has no such model; {meant}`timm.list_models('vit*')` lists them"
        ) from None
    need = "LR-Ray needs a timm VisionTransformer with a class token, such as vit_base_patch16_clip_quickgelu_224.openai"
    if not isinstance(model, VisionTransformer):
        raise BackboneError(f"backbone {config.name!r} is a {type(model).__name__}; {need}")
    if model.cls_token is None or model.global_pool != "token":
        raise BackboneError(f"backbone {config.name!r} does not classify by a class token; {need}")
    if not all(type(block) is Block and hasattr(block.attn, "qkv") for block in model.blocks):
        raise BackboneError(f"backbone {config.name!r} has blocks other than timm's `Block` with fused qkv; {need}")
    image_px = config.image_px or int(model.patch_embed.img_size[0])
    patch_px = int(model.patch_embed.patch_size[0])
    if image_px % patch_px:
        lower = max(image_px // patch_px, 1) * patch_px
        raise BackboneError(
            f"image_px {image_px}: not a multiple of the {patch_px} px patches of {config.name!r}; "
            f"nearest are {lower} and {lower + patch_px}"
        )
    return image_px


def _load_pretrained(architecture: str, arguments: dict[str, Any], config: BackboneConfig) -> "tuple[VisionTransformer, str]":
    import timm

    if config.weights is not None:
        path = Path(config.weights.removeprefix("file://"))
        if path.suffix != ".safetensors":
            raise BackboneError(f"backbone weights {path}: only .safetensors files are read, never pickles; convert it")
        try:
            tensors, source = load_file(path), str(path)
        except (OSError, SafetensorError) as error:
            raise BackboneError(f"backbone weights {path}: {error}") from error
        if tensors and not any(name.startswith("blocks.") for name in tensors):
            tensors = to_timm(tensors)
    elif config.name == "embedded":
        tensors, source = load_embedded(EMBEDDED_BACKBONE), EMBEDDED_BACKBONE.source
    else:
        try:
            return timm.create_model(architecture, pretrained=True, **arguments), f"timm {architecture}"
        except (OSError, RuntimeError) as error:
            raise BackboneError(
                f"backbone {config.name!r}: its weights could not be loaded: {error}; "
                "set backbone.weights to a safetensors file, or backbone.name to 'embedded'"
            ) from error
    try:
        model = timm.create_model(
            architecture,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": tensors, "custom_load": False},
            **arguments,
        )
    except RuntimeError as error:
        raise BackboneError(f"backbone weights {source} do not fit {architecture}: {error}") from error
    if missing := [name for name in model.state_dict() if name not in tensors]:
        raise BackboneError(f"backbone weights {source} do not fit {architecture}: they lack {missing[0]}")
    model.pretrained_cfg.pop("state_dict")  # timm keeps a copy of it, as large as the model
    return model, source


@cache
def _cpu_is_fast_in_bf16() -> bool:
    """By AMX, or by AVX-512 on AMD's; AVX-512 on Intel's (a Xeon of model 207) does 100 GFLOP/s a core in bf16, 195 in fp32."""
    if torch.cpu._is_amx_tile_supported():
        return True
    described = Path("/proc/cpuinfo")
    vendor = described.read_text() if described.exists() else platform.processor()
    return torch.cpu._is_avx512_bf16_supported() and "GenuineIntel" not in vendor


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Mixed precision for forward passes: bf16 where the processor multiplies it faster than fp32, if `precision` is auto."""
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_is_fast_in_bf16()
        precision = "bf16" if fast else "fp32"
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
