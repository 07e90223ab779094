"""A meta-LoRA merged into its backbone, as a file that is used without LR-Ray.

`timm`: safetensors in timm's own names. `onnx` and `torch` (a `torch.export` program): float32 images (N, 3, H, W) in
[0, 1] → (N, D) features, normalisation inside. A file is loaded again and compared with the model before it is committed.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import timm
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from lr_ray.errors import ExportError
from lr_ray.model import Model
from lr_ray.storage.filesystem import write_bytes
from lr_ray.vit.backbone import Backbone, architecture_of
from lr_ray.vit.tokens import encode, encode_pixels

TOLERANCE = 1e-4
"""Largest difference from the model's features, relative to the largest of them."""
OPSET = 20
"""Of ONNX; onnxruntime has it since 1.17."""
_ONNX_BYTES = 2**31 - 2**20
"""Of the weights: protobuf holds less than 2 GiB."""

Features = Callable[[Tensor], Tensor]
"""(N, 3, H, W) float32 images in [0, 1] → (N, D) features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A file that was committed.

    Attributes:
        num_bytes: its size.
        difference: the largest from the model's features, relative to the largest of them.
    """

    uri: str
    num_bytes: int
    difference: float


def export_model(model: Model, kind: str, uri: str) -> Exported:
    """Write the model, once what is to be written gives its features.

    Args:
        model: on the CPU.
        kind: `timm`, `onnx` or `torch`.
        uri: of the file; what was there is replaced.

    Raises:
        ExportError: an unknown kind, a missing package, a model too large for the kind, or other features.
        StorageError: not writable.
    """
    if kind not in _KINDS:
        raise ExportError(f"--format {kind!r}: there is no such format; give one of {', '.join(_KINDS)}")
    make, read = _KINDS[kind]
    content = make(model.backbone)
    difference = _compare(model.backbone, read(content))
    if not difference <= TOLERANCE:
        raise ExportError(
            f"--format {kind}: the exported features differ from the model's by {difference:.1e} of the largest, above "
            f"{TOLERANCE:.0e}; nothing was written: try another of {', '.join(_KINDS)}, or other versions of torch and onnx"
        )
    write_bytes(uri, content)
    return Exported(uri=uri, num_bytes=len(content), difference=difference)


def _compare(backbone: Backbone, exported: Features) -> float:
    """The largest relative difference on random images, in batches of one and three."""
    side = backbone.image_px
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = encode_pixels(backbone, images, precision="fp32")
        found = torch.cat([exported(part.float() / 255) for part in images.split([1, 3])])
    return float((found - expected).abs().max() / expected.abs().max())


class _FromPixels(nn.Module):
    """Images in [0, 1] → features."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.model = backbone.model
        self.register_buffer("mean", backbone.mean[:, None, None])
        self.register_buffer("std", backbone.std[:, None, None])
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        return encode(self.model, (images - self.mean) / self.std).features


def _example(backbone: Backbone) -> dict[str, Any]:
    """What both exporters trace with: two images, their number free."""
    images = torch.zeros(2, 3, backbone.image_px, backbone.image_px)
    return {"args": (images,), "dynamic_shapes": ({0: torch.export.Dim("batch")},)}


def _make_timm(backbone: Backbone) -> bytes:
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


def _read_timm(content: bytes) -> Features:
    header_bytes = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + header_bytes])["__metadata__"]
    model = timm.create_model(metadata["architecture"], **json.loads(metadata["architecture_args"])).eval()
    model.load_state_dict(load_safetensors(content))
    mean, std = (torch.tensor(json.loads(metadata[name]))[:, None, None] for name in ("mean", "std"))

    def features(images: Tensor) -> Tensor:
        found: Tensor = model((images - mean) / std)
        return found

    return features


def _make_torch(backbone: Backbone) -> bytes:
    program = torch.export.export(_FromPixels(backbone).eval(), **_example(backbone))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _read_torch(content: bytes) -> Features:
    return torch.export.load(io.BytesIO(content)).module()


def _make_onnx(backbone: Backbone) -> bytes:
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
        _FromPixels(backbone).eval(),
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


def _read_onnx(content: bytes) -> Features:
    session = import_module("onnxruntime").InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


_KINDS: dict[str, tuple[Callable[[Backbone], bytes], Callable[[bytes], Features]]] = {
    "timm": (_make_timm, _read_timm),
    "onnx": (_make_onnx, _read_onnx),
    "torch": (_make_torch, _read_torch),
}
