"""The metric beside a meta-LoRA: there and back, and a line for one that is not the meta-LoRA's."""

from pathlib import Path

import pytest
import torch

from lr_ray.errors import AdapterError, StorageError
from lr_ray.fewshot.metric import Metric, MetricConfig, fit_metric
from lr_ray.storage.filesystem import write_bytes
from lr_ray.storage.manifest import METRIC_NAME, write_manifest
from lr_ray.storage.measurements import write_tensors
from lr_ray.storage.metric import metric_digest, read_metric, write_metric

DIM = 6


@pytest.fixture
def metric() -> Metric:
    return fit_metric(
        torch.randn(20, DIM, generator=torch.Generator().manual_seed(0)), torch.arange(5).repeat(4), MetricConfig()
    )


def write(folder: str, metric: Metric) -> None:
    """With the manifest that names it."""
    write_manifest(folder, {}, {"metric": write_metric(folder, metric)})


@pytest.fixture
def folder(tmp_path: Path, metric: Metric) -> str:
    write(str(tmp_path), metric)
    return str(tmp_path)


def test_there_and_back(folder: str, metric: Metric) -> None:
    found = read_metric(folder, num_features=DIM)
    assert found is not None
    assert all(torch.equal(value, metric.tensors()[name]) for name, value in found.tensors().items())
    assert write_metric(folder, found) == metric_digest(folder)


def test_a_meta_lora_without_one(tmp_path: Path) -> None:
    write_manifest(str(tmp_path), {}, {})
    assert read_metric(str(tmp_path), num_features=DIM) is None


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (lambda folder, _: Path(folder, METRIC_NAME).unlink(), AdapterError, "has no metric.safetensors"),
        (lambda folder, _: write_bytes(f"{folder}/{METRIC_NAME}", b"no tensors"), StorageError, "damaged"),
        (
            lambda folder, m: write_metric(folder, Metric(mean=m.mean + 1, weight=m.weight, length=m.length)),
            AdapterError,
            "names",
        ),
        (
            lambda folder, m: write_metric(folder, Metric(mean=m.mean, weight=m.weight[:3], length=m.length)),
            AdapterError,
            "6 feat",
        ),
        (
            lambda folder, m: write(folder, Metric(mean=m.mean * float("nan"), weight=m.weight, length=m.length)),
            AdapterError,
            "names",
        ),
        (lambda folder, m: write_tensors(f"{folder}/{METRIC_NAME}", {"mean": m.mean}, {}), AdapterError, "no metric of 6"),
    ],
)
def test_one_that_is_not_the_meta_loras(folder: str, metric: Metric, spoil, kind: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    spoil(folder, metric)
    with pytest.raises(kind, match=message) as caught:
        read_metric(folder, num_features=DIM)
    assert "\n" not in str(caught.value)
