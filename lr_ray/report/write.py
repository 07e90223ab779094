"""The report of a run: `results.md`, `.tex` and `.csv`, `contact_sheet.png` and `report.html` in its output folder."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

from pydantic import BaseModel, FiniteFloat, ValidationError

from lr_ray.config import ExperimentConfig
from lr_ray.errors import StorageError
from lr_ray.report.charts import EpisodeFeatures, accuracy_against_time, embedding_maps, per_class_bars
from lr_ray.report.html import render_report
from lr_ray.report.pictures import accuracy_bars, contact_sheet, grid_bars, training_curves
from lr_ray.report.progress import Reporter
from lr_ray.report.tables import as_csv, as_latex, as_markdown, measured_last, results_table
from lr_ray.storage.adapters import list_adapters
from lr_ray.storage.filesystem import join, list_files, read_many, write_bytes
from lr_ray.storage.manifest import read_manifest, versions
from lr_ray.storage.synthetic import adapter_id_of, by_adapter, count_images, list_synthetic, read_first_classes

SHEET_NAME = "contact_sheet.png"
_SHEET_NAMES = {"sheet": SHEET_NAME, "metric_sheet": "contact_sheet_metric.png"}
_ADAPTERS_SHOWN = 6
_CLASSES_SHOWN = 12
_SECONDS_BETWEEN_LOOKS = 2.0


def write_report(
    config: ExperimentConfig, rows: Sequence[dict[str, Any]], embeddings: EpisodeFeatures | None = None
) -> list[str]:
    """Draw and commit what `evaluate_methods` measured; returns the URIs of what was written.

    Args:
        rows: of `results.json`; on the data set of the last of them are the pictures.
        embeddings: an episode for the page to show before and after the meta-LoRA.

    Raises:
        StorageError: a step of the run is missing.
    """
    root = config.output_root
    files = list_synthetic(config.synthetic_root)
    sheets = {"sheet": _sheet(config, by_adapter(files))}
    if config.metric_inversion is not None:
        sheets["metric_sheet"] = _sheet(config.for_metric, by_adapter(list_synthetic(config.for_metric.synthetic_root)))
    page = render_report(
        name=config.name,
        rows=rows,
        adapters=read_many(_adapter_line, list_adapters(config.adapters_root)),
        num_images=count_images(config.synthetic_root, files),
        config=config.resolved(),
        versions=versions(),
        pictures=_charts(rows, embeddings) | sheets | {"curves": _curves(config)},
    )
    drawn = {join(root, _SHEET_NAMES[key]): png for key, png in sheets.items()}
    for uri, png in drawn.items():
        write_bytes(uri, png)
    tables, html = write_tables(root, rows), join(root, "report.html")
    write_bytes(html, page.encode())
    return [*drawn, *tables, html]


class _Line(BaseModel):
    """What of an adapter's manifest, which may be a stranger's, the page shows; a value of another kind is not there."""

    adapter_id: str | None = None
    held_out_accuracy: FiniteFloat | None = None
    class_names: tuple[str, ...] | None = None


def _adapter_line(folder: str) -> dict[str, Any]:
    line = {"adapter_id": folder.rstrip("/").rpartition("/")[2]}
    try:
        manifest: Any = read_manifest(folder)
    except StorageError:  # the inversion has said so
        return line
    for key in _Line.model_fields if isinstance(manifest, dict) else ():
        with suppress(ValidationError):
            line |= _Line.model_validate({key: manifest.get(key)}).model_dump(exclude_none=True)
    return line


def write_tables(root: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Commit rows of `results.json` as tables; returns the URIs."""
    table = results_table(rows)
    texts = {"results.md": as_markdown(table), "results.tex": as_latex(table), "results.csv": as_csv(rows)}
    for name, text in texts.items():
        write_bytes(join(root, name), text.encode())
    return [join(root, name) for name in texts]


def _charts(rows: Sequence[dict[str, Any]], embeddings: EpisodeFeatures | None) -> dict[str, bytes]:
    """PNGs of what can be drawn from these rows."""
    measured = measured_last(rows)
    drawn = {
        "bars": accuracy_bars(measured) if measured else None,
        "time": accuracy_against_time(measured),
        "classes": per_class_bars(measured),
        "embeddings": embedding_maps(embeddings) if embeddings else None,
    }
    return {name: png for name, png in drawn.items() if png is not None}


def _curves(config: ExperimentConfig) -> bytes:
    manifests = {"recycle": read_manifest(config.meta_lora_root), "oracle": read_manifest(config.oracle_root)}
    return training_curves({name: found["history"] for name, found in manifests.items() if found})


def _sheet(config: ExperimentConfig, adapters: Sequence[Sequence[str]]) -> bytes:
    """PNG of the first classes of the first of these adapters, each given by its files."""
    keep_ratio = config.training.keep_ratio if config.training.keep_ratio < 1 else 0.5
    files = list(chain.from_iterable(adapters[:_ADAPTERS_SHOWN]))
    return contact_sheet(read_first_classes(config.synthetic_root, files, most=_CLASSES_SHOWN), keep_ratio=keep_ratio)


def watch_synthetic(config: ExperimentConfig, reporter: Reporter, over: threading.Event) -> None:
    """Draw `contact_sheet.png` again whenever there are new images to train on, those that came last first, until it is over.

    Raises:
        StorageError: unreadable images, or the sheet cannot be written.
    """
    uri = join(config.output_root, SHEET_NAME)
    reporter.say(f"watching {config.synthetic_root}; Ctrl-C ends it")
    drawn: set[str] = set()
    latest: list[tuple[str, ...]] = []
    while not over.is_set():
        files = list_files(config.synthetic_root, suffix=".parquet")
        if new := set(files) - drawn:
            groups = by_adapter(files)
            fresh = [group for group in groups if new.intersection(group)]
            ids = {adapter_id_of(group[0]) for group in fresh}
            latest = [*fresh, *(group for group in latest if adapter_id_of(group[0]) not in ids)]
            write_bytes(uri, _sheet(config, latest))
            reporter.say(f"{uri}: {len(groups)} adapters in {len(files)} files, the latest {adapter_id_of(fresh[-1][0])}")
            drawn.update(files)
        over.wait(_SECONDS_BETWEEN_LOOKS)


def write_grid_chart(root: str, summary: Sequence[dict[str, Any]]) -> str:
    """Draw and commit what `run_grid` measured; returns the URI of the picture."""
    uri = join(root, "gain.png")
    write_bytes(uri, grid_bars(summary))
    return uri
