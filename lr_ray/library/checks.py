"""What is looked at before an adapter is taken into a library, and again by `lr-ray library check`."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lr_ray.errors import AdapterError, StorageError
from lr_ray.library.names import backbone_of
from lr_ray.storage.adapters import read_adapter
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import Adapter, as_tuned, check_adapter, merged
from lr_ray.vit.tokens import encode

Verdict = Literal["passed", "noted", "failed"]
_NUM_NOISE = 16
_ALIKE = 0.9999
"""Cosine from which two classes of a head are one, and two updates the same."""
_MOST_CLASSES = 10_000
_COLLAPSED = 1e-4
"""Share of a head in which its classes differ, up to which they do not."""
_SKETCH = 128
_CANDIDATE = 0.9
"""Cosine of sketches from which two adapters are compared in full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """What one look at an adapter found.

    Attributes:
        name: what was looked at.
        says: the reason of a note or failure, one line; "" of one that passed.
        value: what was measured, if anything.
    """

    name: str
    verdict: Verdict
    says: str = ""
    value: float | None = None


def check(adapter: Adapter, backbone: Backbone, *, base_model: str = "") -> list[Check]:
    """Every check that needs no other adapter; those after the first failure that makes them meaningless are left out.

    Args:
        base_model: what the adapter says that it was tuned from; "" if it does not say.
    """
    found = [_base_model(base_model, backbone), _fits(adapter, backbone)]
    if found[-1].verdict == "failed":
        return found
    return [*found, _trained(adapter, backbone), _head(adapter), _function(adapter, backbone)]


def failure_of(checks: Sequence[Check]) -> str:
    """Why the adapter is not taken; "" if it is."""
    return next((f"{check.name}: {check.says}" for check in checks if check.verdict == "failed"), "")


def _base_model(stated: str, backbone: Backbone) -> Check:
    name = "base model"
    if not stated:
        return Check(name=name, verdict="noted", says="the adapter does not say what it was tuned from")
    meant = backbone_of(stated)
    if backbone.name == stated or (meant is not None and _same(meant, backbone.name)):
        return Check(name=name, verdict="passed")
    if meant is None:
        return Check(name=name, verdict="noted", says=f"{stated!r} is not known here; its shapes alone say that it fits")
    says = f"it was tuned from {stated!r}, which is {meant!r}, not from {backbone.name!r}; set backbone.name to the former"
    return Check(name=name, verdict="failed", says=says)


def _same(stated: str, own: str) -> bool:
    """Whether two of timm's names may mean the same weights; one without a tag means some tag or other."""
    (architecture, _, tag), (other, _, other_tag) = stated.partition("."), own.partition(".")
    return architecture == other and (not tag or not other_tag or tag == other_tag)


def _fits(adapter: Adapter, backbone: Backbone) -> Check:
    """Backbone's digest, image size, shapes, NaN and infinity."""
    try:
        check_adapter(adapter, backbone)
    except AdapterError as error:
        return Check(
            name="fits", verdict="failed", says=str(error).removeprefix(f"adapter {adapter.spec.adapter_id}").lstrip(": ")
        )
    return Check(name="fits", verdict="passed")


def _trained(adapter: Adapter, backbone: Backbone) -> Check:
    """The largest ‖ΔW‖ / ‖W‖."""
    parameters = dict(backbone.model.named_parameters())
    sizes = {
        name: float(update.norm() / parameters[name].norm().clamp_min(1e-12)) for name, update in adapter.updates().items()
    }
    largest = max(sizes.values(), default=0.0)
    if not all(map(math.isfinite, sizes.values())):
        return Check(name="trained", verdict="failed", says="its products are NaN or infinite; it is damaged: get it again")
    if largest == 0:
        return Check(name="trained", verdict="failed", says="every lora_B is zero: it was never trained", value=0.0)
    return Check(name="trained", verdict="passed", value=largest)


def _head(adapter: Adapter) -> Check:
    """The cosine of the two classes that are most alike."""
    if adapter.head_weight is None:
        return Check(name="head", verdict="noted", says="no head: of use for averaging and merging, not for inversion")
    rows = adapter.head_weight.double()
    if adapter.head_bias is not None:
        rows = torch.cat([rows, adapter.head_bias.double()[:, None]], dim=1)
    if not 2 <= len(rows) <= _MOST_CLASSES:
        says = f"it has {len(rows):,} classes; an adapter has 2 to {_MOST_CLASSES:,}"
        return Check(name="head", verdict="failed", says=says)
    if (rows - rows.mean(dim=0)).norm() <= _COLLAPSED * rows.norm():
        return Check(name="head", verdict="failed", says="its classes collapse: the head gives all the same logit")
    units = torch.nn.functional.normalize(rows, dim=1)
    among = (units @ units.T).fill_diagonal_(-1)
    if (alike := float(among.max())) > _ALIKE:
        return Check(name="head", verdict="noted", says="two of its classes are the same to its head", value=alike)
    return Check(name="head", verdict="passed", value=alike)


@torch.no_grad()
def _function(adapter: Adapter, backbone: Backbone) -> Check:
    """The mean entropy of its predictions on noise, as a share of log C; without a head, whether its features are finite."""
    side = backbone.image_px
    noise = torch.rand(_NUM_NOISE, 3, side, side, generator=torch.Generator().manual_seed(0))
    seen = as_tuned(adapter, backbone)
    with merged(backbone.model, adapter.updates()):
        features = encode(backbone.model, seen.normalize(noise), pool=adapter.pool).features.float()
    logits = features if adapter.head_weight is None else adapter.logits(features)
    if not torch.isfinite(logits).all():
        return Check(name="function", verdict="failed", says="what it gives on noise is NaN or infinite")
    if adapter.head_weight is None:
        return Check(name="function", verdict="passed")
    shares = logits.double().softmax(dim=1)
    entropy = float(torch.special.entr(shares).sum(dim=1).mean() / torch.tensor(float(shares.shape[1])).log())
    return Check(name="function", verdict="passed", value=entropy)


def sketch_of(adapter: Adapter) -> Tensor:
    """(128,) numbers whose cosine between two adapters is about that of their updates; cheap for any rank.

    Each is Σ over modules of uᵀ·ΔW·v with random u, v of that module and number, the same for every adapter.
    """
    total = torch.zeros(_SKETCH, dtype=torch.float64)
    for name, low_rank in sorted(adapter.modules.items()):
        u, v = _probe(name, low_rank.b.shape[0]), _probe(f"{name}/in", low_rank.a.shape[1])
        total += low_rank.scale * ((u @ low_rank.b.double()) * (v @ low_rank.a.double().T)).sum(dim=1)
    for name, shift in sorted(adapter.shifts.items()):
        total += _probe(f"{name}/shift", shift.numel()) @ shift.double().flatten()
    return total.float()


def _probe(name: str, size: int) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    return torch.randn(_SKETCH, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine_of(one: Adapter, other: Adapter) -> float:
    """⟨ΔW, ΔW′⟩ / ‖ΔW‖·‖ΔW′‖ over all parameters, with no product formed."""
    return _inner(one, other) / max(math.sqrt(_inner(one, one) * _inner(other, other)), 1e-30)


def _inner(one: Adapter, other: Adapter) -> float:
    total = 0.0
    for name in one.modules.keys() & other.modules.keys():
        p, q = one.modules[name], other.modules[name]
        total += p.scale * q.scale * float(((p.b.double().T @ q.b.double()) * (p.a.double() @ q.a.double().T)).sum())
    for name in one.shifts.keys() & other.shifts.keys():
        total += float((one.shifts[name].double() * other.shifts[name].double()).sum())
    return total


def duplicate_of(adapter: Adapter, folder: str, sketch: Tensor, sketches: Mapping[str, Tensor]) -> Check:
    """Whether the update of another adapter is the same but for its size.

    Args:
        folder: of the adapter, which is not compared with itself.
        sketch: of the adapter.
        sketches: {folder: sketch} of a library.
    """
    folders = [other for other in sketches if other != folder]
    cosines = torch.cosine_similarity(torch.stack([sketches[other] for other in folders]), sketch[None]) if folders else None
    closest = 0.0
    for index in [] if cosines is None else cosines.argsort(descending=True).tolist():
        if cosines is None or cosines[index] < _CANDIDATE:
            break
        try:
            other = read_adapter(folders[index])
        except (AdapterError, StorageError):  # its own check says so
            continue
        closest = max(closest, cosine := cosine_of(adapter, other))
        if cosine > _ALIKE:
            return Check(name="duplicate", verdict="noted", says=f"its update is that of {other.spec.adapter_id}", value=cosine)
    return Check(name="duplicate", verdict="passed", value=closest)


def as_rows(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """For a manifest, without what says nothing."""
    return [
        {"name": check.name, "verdict": check.verdict}
        | ({"says": check.says} if check.says else {})
        | ({} if check.value is None else {"value": round(check.value, 6)})
        for check in checks
    ]
