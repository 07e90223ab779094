"""The report of a run: `contact_sheet.png` and `report.html` in its output folder."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from lr_ray.config import ExperimentConfig
from lr_ray.report.html import render_report
from lr_ray.report.pictures import accuracy_bars, contact_sheet, grid_bars, training_curves
from lr_ray.storage.adapters import list_adapters
from lr_ray.storage.filesystem import join, write_bytes
from lr_ray.storage.manifest import read_manifest, versions
from lr_ray.storage.synthetic import by_adapter, count_images, list_synthetic, read_pool

_ADAPTERS_SHOWN = 6


def write_report(config: ExperimentConfig, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Draw and commit what `evaluate_methods` measured; returns the URIs of what was written.

    Raises:
        StorageError: a step of the run is missing.
    """
    root = config.output_root
    files = list_synthetic(config.synthetic_root)
    manifests = {"recycle": read_manifest(config.meta_lora_root), "oracle": read_manifest(config.oracle_root)}
    keep_ratio = config.training.keep_ratio if config.training.keep_ratio < 1 else 0.5
    shown = list(chain.from_iterable(by_adapter(files)[:_ADAPTERS_SHOWN]))
    sheet = contact_sheet(read_pool(config.synthetic_root, shown), keep_ratio=keep_ratio)
    page = render_report(
        name=config.name,
        rows=rows,
        adapters=[read_manifest(folder) or {} for folder in list_adapters(config.adapters_root)],
        num_images=count_images(config.synthetic_root, files),
        config=config.resolved(),
        versions=versions(),
        pictures={
            "bars": accuracy_bars(rows),
            "sheet": sheet,
            "curves": training_curves({name: found["history"] for name, found in manifests.items() if found}),
        },
    )
    written = {join(root, "contact_sheet.png"): sheet, join(root, "report.html"): page.encode()}
    for uri, content in written.items():
        write_bytes(uri, content)
    return list(written)


def write_grid_chart(root: str, summary: Sequence[dict[str, Any]]) -> str:
    """Draw and commit what `run_grid` measured; returns the URI of the picture."""
    uri = join(root, "gain.png")
    write_bytes(uri, grid_bars(summary))
    return uri
