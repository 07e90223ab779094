"""Backbone + meta-LoRA merged, as the content of one file that is used without LR-Ray.

`timm`: safetensors in timm's own names. `onnx` and `torch` (a `torch.export` program): float32 images (N, 3, H, W) in
[0, 1] → (N, D) features, normalisation and metric inside.
"""

import io
import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

import timm
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from lr_ray.errors import ExportError
from lr_ray.fewshot.metric import METRIC_TENSORS, Metric
from lr_ray.vit.backbone import Backbone, architecture_of
from lr_ray.vit.tokens import encode

OPSET = 20
"""Of ONNX; onnxruntime has it since 1.17."""
_ONNX_BYTES = 2**31 - 2**20
"""Of the weights: protobuf holds less than 2 GiB."""

Features = Callable[[Tensor], Tensor]
"""(N, 3, H, W) float32 images in [0, 1] → (N, D) features."""


class _FromPixels(nn.Module):
    """Images in [0, 1] → features, in the metric if there is one."""

    def __init__(self, backbone: Backbone, metric: Metric | None) -> None:
        super().__init__()
        for name, tensor in ({} if metric is None else metric.tensors()).items():
            self.register_buffer(f"metric_{name}", tensor)
        self.has_metric = metric is not None
        self.model = backbone.model
        self.register_buffer("mean", backbone.mean[:, None, None])
        self.register_buffer("std", backbone.std[:, None, None])
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        features = encode(self.model, (images - self.mean) / self.std).features
        if not self.has_metric:
            return features
        return Metric.of({name: self.get_buffer(f"metric_{name}") for name in METRIC_TENSORS})(features)


def _example(backbone: Backbone) -> dict[str, Any]:
    """What both exporters trace with: two images, their number free."""
    images = torch.zeros(2, 3, backbone.image_px, backbone.image_px)
    return {"args": (images,), "dynamic_shapes": ({0: torch.export.Dim("batch")},)}


def is_distilled(backbone: Backbone) -> bool:
    """Whether timm's own forward pass gives the mean of two tokens, of which LR-Ray's features are the first."""
    return hasattr(backbone.model, "dist_token")


def make_timm(backbone: Backbone, _metric: Metric | None) -> bytes:
    """Safetensors; what makes the architecture, mean and std are in the metadata. timm's models have no place for a metric.

    Raises:
        ExportError: timm's own forward pass gives other features.
    """
    if is_distilled(backbone):
        raise ExportError(
            f"--format timm: timm's own {backbone.name!r} gives the mean of its class and its distillation token, where the "
            "features are the class token's; give torch, onnx or peft"
        )
    architecture, arguments = architecture_of(backbone.name)
    metadata = {
        "format": "pt",
        "architecture": architecture,
        "architecture_args": json.dumps(arguments | {"num_classes": 0, "img_size": backbone.image_px}),
        "mean": json.dumps(backbone.mean.tolist()),
        "std": json.dumps(backbone.std.tolist()),
    }
    tensors = {name: value.contiguous() for name, value in backbone.model.state_dict().items()}
    content: bytes = save_safetensors(tensors, metadata=metadata)
    return content


def read_timm(content: bytes) -> Features:
    """What such a file computes."""
    header_bytes = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + header_bytes])["__metadata__"]
    model = timm.create_model(metadata["architecture"], **json.loads(metadata["architecture_args"])).eval()
    model.load_state_dict(load_safetensors(content))
    mean, std = (torch.tensor(json.loads(metadata[name]))[:, None, None] for name in ("mean", "std"))

    def features(images: Tensor) -> Tensor:
        found: Tensor = model((images - mean) / std)
        return found

    return features


def make_torch(backbone: Backbone, metric: Metric | None) -> bytes:
    """A `torch.export` program, any batch size."""
    program = torch.export.export(_FromPixels(backbone, metric).eval(), **_example(backbone))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def read_torch(content: bytes) -> Features:
    """What such a program computes."""
    return torch.export.load(io.BytesIO(content)).module()


def make_onnx(backbone: Backbone, metric: Metric | None) -> bytes:
    """An ONNX model, any batch size.

    Raises:
        ExportError: a missing package, or too many weights for it.
    """
    for package in ("onnxscript", "onnxruntime"):
        try:
            import_module(package)
        except ImportError as error:
            raise ExportError(f"--format onnx: {package} cannot be imported ({error}); pip install 'lr-ray[export]'") from error
    size = sum(value.nbytes for value in backbone.model.state_dict().values())
    if size > _ONNX_BYTES:
        raise ExportError(
            f"--format onnx: the weights have {size} bytes, but an ONNX file holds at most {_ONNX_BYTES}; give torch or timm"
        )
    program = torch.onnx.export(
        _FromPixels(backbone, metric).eval(),
        **_example(backbone),
        input_names=["images"],
        output_names=["features"],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def read_onnx(content: bytes) -> Features:
    """What such a model computes, by onnxruntime on the CPU."""
    session = import_module("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
