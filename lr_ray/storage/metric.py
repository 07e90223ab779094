"""The metric that is kept with a meta-LoRA, beside its weights."""

import torch

from lr_ray.errors import AdapterError
from lr_ray.fewshot.metric import Metric
from lr_ray.storage.filesystem import exists, join
from lr_ray.storage.manifest import METRIC_NAME, read_manifest
from lr_ray.storage.measurements import read_tensors, write_tensors
from lr_ray.vit.embedded import digest_tensors


def write_metric(folder: str, metric: Metric) -> str:
    """Commit it; returns its digest, which the meta-LoRA's manifest holds under `metric`."""
    digest = digest_tensors(metric.tensors())
    write_tensors(join(folder, METRIC_NAME), metric.tensors(), {"digest": digest})
    return digest


def metric_digest(folder: str) -> str | None:
    """Of the metric of a finished meta-LoRA; None of one without, as earlier versions wrote."""
    digest: str | None = (read_manifest(folder) or {}).get("metric")
    return digest


def read_metric(folder: str, *, num_features: int) -> Metric | None:
    """The metric of a finished meta-LoRA, or None.

    Raises:
        AdapterError: not the one that the manifest names, or not of D features.
        StorageError: unreadable or damaged.
    """
    digest = metric_digest(folder)
    if digest is None:
        return None
    uri, remedy = join(folder, METRIC_NAME), "put it back or train again"
    if not exists(uri):
        raise AdapterError(f"meta-LoRA {folder} has no {METRIC_NAME}, but its manifest names one; {remedy}")
    tensors = read_tensors(uri)[0]
    shapes = {"mean": (num_features,), "weight": (num_features, num_features), "length": ()}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        raise AdapterError(f"{uri} is no metric of {num_features} features; {remedy}")
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()) or digest_tensors(tensors) != digest:
        raise AdapterError(f"{uri} is not the one that the meta-LoRA's manifest names; {remedy}")
    return Metric.of(tensors)
