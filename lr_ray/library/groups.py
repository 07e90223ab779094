"""Groups of a library: the adapters of one backbone at one image size, in a folder that is a run's `adapters`.

`LIBRARY/GROUP/group.json` holds the backbone, beside the adapters' own folders.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from lr_ray.errors import StorageError
from lr_ray.library.checks import Check, as_rows
from lr_ray.library.index import SKETCH, read_rows
from lr_ray.storage.filesystem import join, read_bytes, read_if_there, write_bytes
from lr_ray.vit.backbone import Backbone, BackboneConfig
from lr_ray.vit.lora import Adapter, LowRank

GROUP_NAME = "group.json"


def group_of(backbone: Backbone) -> str:
    """The name of the group of adapters that are tuned on this backbone at this image size."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", backbone.name)
    return f"{slug}-{backbone.image_px}px-{backbone.digest[:6]}"


def claim_group(root: str, backbone: Backbone, config: BackboneConfig) -> None:
    """Put the backbone's config beside the adapters below `root`, from which `read_group` gives the backbone again."""
    content = json.dumps({"backbone": config.model_dump(mode="json"), "digest": backbone.digest}, indent=2).encode()
    if read_if_there(uri := join(root, GROUP_NAME)) != content:
        write_bytes(uri, content)


def read_group(library: str, group: str) -> BackboneConfig:
    """The backbone of a group.

    Raises:
        StorageError: unreadable or damaged.
    """
    uri = join(library, group, GROUP_NAME)
    try:
        return BackboneConfig.model_validate(json.loads(read_bytes(uri))["backbone"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise StorageError(f"{uri} is damaged ({error!r}); delete it, and add an adapter of that backbone again") from error


def facts_of(
    adapter: Adapter, checks: Sequence[Check], *, notes: Sequence[str], sketch: Sequence[float], **source: str
) -> dict[str, Any]:
    """What a manifest holds besides what `write_adapter` knows.

    Args:
        source: fields of `Entry` that tell where it came from.
    """
    parts = [part for name, low_rank in adapter.modules.items() for part in _parts(name, low_rank)]
    shifted = {re.sub(r"^blocks\.\d+\.", "", name) for name in adapter.shifts}
    return {
        **source,
        "ranks": sorted({rank for _, rank, _ in parts}),
        "alphas": sorted({alpha for _, _, alpha in parts}),
        "targets": sorted({target for target, _, _ in parts} | shifted),
        "license": adapter.spec.license,
        "checks": as_rows(checks),
        "notes": list(notes),
        SKETCH: [float(f"{value:.5g}") for value in sketch],
    }


def _parts(name: str, low_rank: LowRank) -> list[tuple[str, int, float]]:
    """(target, rank, alpha) of a module's update; query, key and value apart."""
    if not name.endswith("attn.qkv"):
        return [
            (name.rpartition(".")[2] if name.startswith("blocks.") else name, len(low_rank.a), low_rank.scale * len(low_rank.a))
        ]
    ranks = [int(rows.any(dim=0).sum()) for rows in low_rank.b.chunk(3)]
    return [(target, rank, low_rank.scale * rank) for target, rank in zip("qkv", ranks, strict=True) if rank]


def read_sketches(library: str, group: str) -> dict[str, Tensor]:
    """{adapter's folder: its sketch} of a group."""
    rows = read_rows(library, ["adapter_id", "group", SKETCH])
    return {join(library, group, row["adapter_id"]): torch.tensor(row[SKETCH]) for row in rows if row["group"] == group}
