"""A meta-LoRA in a form that is used without LR-Ray: merged into its backbone as a file, or itself as a PEFT folder.

Whatever the form, it is loaded again and compared with the model before it is committed.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lr_ray.errors import ExportError
from lr_ray.export.adapter import hub_id_of, make_peft, make_peft_hf, read_peft, read_peft_hf
from lr_ray.export.files import Features, make_onnx, make_timm, make_torch, read_onnx, read_timm, read_torch
from lr_ray.export.usage import usage_peft, usage_peft_hf, usage_timm
from lr_ray.fewshot.metric import Metric
from lr_ray.model import Parts, load_parts
from lr_ray.report.card import fitted_card
from lr_ray.storage.filesystem import delete, exists, join, read_if_there, write_bytes
from lr_ray.storage.manifest import CARD_NAME, CONFIG_NAME, MANIFEST_NAME, METRIC_NAME
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import merged
from lr_ray.vit.tokens import encode_pixels

TOLERANCE = 1e-4
"""Largest difference from the model's features, relative to the largest of them."""
ALONE = ""
"""Name of the content of a form that is a single file."""

Files = Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A form of a meta-LoRA.

    Attributes:
        make: its files in the order in which they are committed; a single file is called `ALONE`.
        read: what a user of these files computes.
        usage: the lines of a card that load it from the place given; None for forms that have no card.
        library: of that card.
        is_folder: a card and a PEFT config are written; else one file.
        in_metric: what is computed is in the meta-LoRA's metric; else the metric is to be applied to it.
    """

    make: Callable[[Parts], dict[str, bytes]]
    read: Callable[[Parts, Files], Features]
    usage: Callable[[Parts, str], str] | None = None
    library: str = ""
    is_folder: bool = False
    in_metric: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was committed.

    Attributes:
        uri: of the file or folder.
        num_bytes: its size.
        difference: the largest from the model's features, relative to the largest of them.
    """

    uri: str
    num_bytes: int
    difference: float


def _one_file(
    make: Callable[[Backbone, Metric | None], bytes],
    read: Callable[[bytes], Features],
    usage: Callable[[Parts, str], str] | None = None,
    *,
    in_metric: bool = False,
) -> Kind:
    def make_merged(parts: Parts) -> dict[str, bytes]:
        with merged(parts.backbone.model, parts.adapter.updates()):
            return {ALONE: make(parts.backbone, parts.metric)}

    return Kind(
        make=make_merged, read=lambda _parts, files: read(files[ALONE]), usage=usage, library="timm", in_metric=in_metric
    )


KINDS = {
    "timm": _one_file(make_timm, read_timm, usage_timm),
    "onnx": _one_file(make_onnx, read_onnx, in_metric=True),
    "torch": _one_file(make_torch, read_torch, in_metric=True),
    "peft": Kind(make=make_peft, read=read_peft, usage=usage_peft, library="peft", is_folder=True),
    "peft-hf": Kind(make=make_peft_hf, read=read_peft_hf, usage=usage_peft_hf, library="peft", is_folder=True),
}
"""`lr-ray export`."""


def export_model(meta_lora: str, kind: str, uri: str) -> Exported:
    """Write a meta-LoRA in a form, once what is to be written gives its features.

    Args:
        meta_lora: folder or URI that `lr-ray train` wrote.
        kind: one of `KINDS`.
        uri: of the file or folder; what an export left there under the same names is replaced.

    Raises:
        ExportError: an unknown kind, files of a meta-LoRA or adapter there, a missing package, a model that the kind
            cannot hold, or other features.
        StorageError: not readable or not writable.
        AdapterError, BackboneError: as of `lr_ray.load`.
    """
    check_kind(kind, list(KINDS))
    _check_free(uri, is_folder=KINDS[kind].is_folder)
    parts = load_parts(meta_lora)
    files, difference = make_files(parts, kind)
    if KINDS[kind].is_folder:
        files = {CARD_NAME: card_of(parts, meta_lora, kind, where="PATH").encode(), **files}
        for name in (CONFIG_NAME, METRIC_NAME):  # without the first nobody takes old and new files for one adapter
            delete(join(uri, name))
    for name, content in files.items():
        write_bytes(join(uri, name) if name != ALONE else uri, content)
    return Exported(uri=uri, num_bytes=sum(map(len, files.values())), difference=difference)


def _check_free(uri: str, *, is_folder: bool) -> None:
    """Raise where a meta-LoRA or an adapter that LR-Ray wrote would lose a file; an export has no manifest."""
    folder = uri if is_folder else os.path.dirname(uri) or "."
    if exists(join(folder, MANIFEST_NAME)) and (is_folder or exists(uri)):
        raise ExportError(
            f"--to {uri}: {folder} is a meta-LoRA or an adapter of LR-Ray (it has {MANIFEST_NAME}), of which files would be "
            "replaced; give another name"
        )


def check_kind(kind: str, allowed: list[str]) -> None:
    """Raise unless it is one of those."""
    if kind not in allowed:
        raise ExportError(f"--format {kind!r}: there is no such format; give one of {', '.join(allowed)}")


def make_files(parts: Parts, kind: str) -> tuple[dict[str, bytes], float]:
    """The files of a form, and the largest difference of their features from the model's.

    Raises:
        ExportError: it is more than `TOLERANCE`, or they cannot be made.
    """
    files = KINDS[kind].make(parts)
    difference = _compare(parts, KINDS[kind].read(parts, files), in_metric=KINDS[kind].in_metric)
    if not difference <= TOLERANCE:
        raise ExportError(
            f"--format {kind}: the exported features differ from the model's by {difference:.1e} of the largest, above "
            f"{TOLERANCE:.0e}; nothing was written: try another of {', '.join(KINDS)}, or other versions of torch, onnx, peft "
            "and transformers"
        )
    return files, difference


def _compare(parts: Parts, exported: Features, *, in_metric: bool) -> float:
    """The largest relative difference on random images, in batches of one and three."""
    backbone = parts.backbone
    side = backbone.image_px
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with merged(backbone.model, parts.adapter.updates()):
            expected = encode_pixels(backbone, images, precision="fp32")
            if in_metric and parts.metric is not None:
                expected = parts.metric(expected)
        found: Tensor = torch.cat([exported(part.float() / 255) for part in images.split([1, 3])])
    return float((found - expected).abs().max() / expected.abs().max())


def card_of(parts: Parts, meta_lora: str, kind: str, *, where: str) -> str:
    """The card of the meta-LoRA's folder, fitted to a form that is loaded from `where`.

    Raises:
        StorageError: not readable.
    """
    usage = KINDS[kind].usage
    assert usage is not None
    content = read_if_there(join(meta_lora, CARD_NAME))
    return fitted_card(
        None if content is None else content.decode(errors="replace"),
        usage=usage(parts, where),
        library=KINDS[kind].library,
        base_model=hub_id_of(parts, foreign=kind == "peft-hf"),
        title=f"A meta-LoRA of {parts.backbone.name}",
    )
