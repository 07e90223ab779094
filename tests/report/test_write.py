import base64
import csv
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lr_ray.config import ExperimentConfig
from lr_ray.errors import StorageError
from lr_ray.report.charts import EpisodeFeatures
from lr_ray.report.progress import Reporter
from lr_ray.report.write import watch_synthetic, write_report
from lr_ray.storage.synthetic import synthetic_name, write_synthetic
from tests.storage.test_synthetic import draw, spec_of


class Listening(Reporter):
    """Ends the watching when it has heard enough."""

    def __init__(self, over: threading.Event, root: Path) -> None:
        super().__init__()
        self.said: list[str] = []
        self.sheets: list[bytes] = []
        self._over, self._root = over, root

    def say(self, message: str) -> None:
        self.said.append(message)
        if "latest" not in message:
            return
        self.sheets.append((self._root / "contact_sheet.png").read_bytes())
        if len(self.sheets) == 1:
            add(self._root, "adapter-0", seed=1)
        elif len(self.sheets) == 2:
            self._over.set()


def add(root: Path, adapter_id: str, *, seed: int, folder: str = "synthetic") -> None:
    spec = spec_of(adapter_id, ("lion", "lynx"))
    write_synthetic(
        str(root / folder / synthetic_name(adapter_id, "0123456789ab")),
        draw(2, 2, seed=seed),
        spec,
        seed=seed,
        identity={},
    )


def test_the_sheet_is_drawn_again_when_images_come(tmp_path: Path):
    over = threading.Event()
    reporter = Listening(over, tmp_path)
    add(tmp_path, "adapter-1", seed=0)

    watch_synthetic(ExperimentConfig(name="watched", output=str(tmp_path)), reporter, over)

    assert reporter.said[0] == f"watching {tmp_path}/synthetic; Ctrl-C ends it"
    assert [line.partition(".png: ")[2] for line in reporter.said[1:]] == [
        "1 adapters in 1 files, the latest adapter-1",
        "2 adapters in 2 files, the latest adapter-0",
    ]
    first, second = reporter.sheets
    assert first.startswith(b"\x89PNG")
    assert second.startswith(b"\x89PNG")
    assert first != second


def test_images_that_are_damaged_end_the_watching(tmp_path: Path):
    folder = tmp_path / "synthetic"
    folder.mkdir()
    (folder / "adapter-0123456789ab.parquet").write_bytes(b"damaged")
    with pytest.raises(StorageError, match="run `lr-ray invert` again"):
        watch_synthetic(ExperimentConfig(name="watched", output=str(tmp_path)), Reporter(quiet=True), threading.Event())


def result(method: str, accuracy: float, **changes: Any) -> dict[str, Any]:
    task = {"method": method, "dataset": "digits", "n_way": 5, "n_shot": 1, "episodes": 600}
    return task | {"accuracy": accuracy, "ci95": 1.0, "images_per_s": 9.0} | changes


@pytest.fixture
def measured(tmp_path: Path) -> ExperimentConfig:
    """A run as it is before its report is written."""
    add(tmp_path, "adapter-1", seed=0)
    for folder in ("adapters/adapter-1", "meta_lora"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "adapter_config.json").write_text("{}")
    history = [{"step": step, "loss": 1.0, "accuracy": 0.5} for step in range(3)]
    (tmp_path / "meta_lora" / "lr_ray.json").write_text(json.dumps({"history": history}))
    return ExperimentConfig(name="measured", output=str(tmp_path))


def test_a_report_is_five_files(measured: ExperimentConfig, tmp_path: Path):
    rows = [result(name, value, episode_ms=9.0, per_class={"a": value}) for name, value in (("nn", 50.0), ("recycle", 60.0))]
    names = ["contact_sheet.png", "results.md", "results.tex", "results.csv", "report.html"]
    assert write_report(measured, rows) == [f"{tmp_path}/{name}" for name in names]
    assert "| nn | 50.00 ± 1.00 |" in (tmp_path / "results.md").read_text(encoding="utf-8")
    assert r"\textbf{recycle}" in (tmp_path / "results.tex").read_text(encoding="utf-8")
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        assert [line["accuracy"] for line in csv.DictReader(file)] == ["50.0", "60.0"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<img alt="') == 5
    assert "<td>adapter-1</td>" in page


@pytest.mark.parametrize(
    "manifest",
    ['{"held_out_accuracy": "high", "class_names": ["a"]}', '{"held_out_accuracy": null, "class_names": 5}', "[1]", "{", "5"],
)
def test_a_strangers_manifest_does_not_keep_the_report(measured: ExperimentConfig, tmp_path: Path, manifest: str):
    (tmp_path / "adapters" / "adapter-1" / "lr_ray.json").write_text(manifest)
    write_report(measured, [result("nn", 50.0)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td>adapter-1</td>" in page
    assert "from 1 adapters. No real image" in page


def test_what_a_manifest_tells_is_shown(measured: ExperimentConfig, tmp_path: Path):
    told = {"adapter_id": "birds", "held_out_accuracy": 0.875, "class_names": ["owl", "crow"], "versions": {"torch": "2"}}
    (tmp_path / "adapters" / "adapter-1" / "lr_ray.json").write_text(json.dumps(told))
    write_report(measured, [result("nn", 50.0)])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "from 1 adapters, 87.5 % accurate on images they did not see" in page
    assert all(f"<td>{cell}</td>" in page for cell in ("birds", "87.5", "owl, crow"))


def test_the_images_of_the_metric_are_shown_too(measured: ExperimentConfig, tmp_path: Path):
    add(tmp_path, "adapter-1", seed=3, folder="metric_synthetic")
    config = measured.model_copy(update={"metric_inversion": measured.inversion})
    written = write_report(config, [result("nn", 50.0)])
    assert written[:2] == [f"{tmp_path}/contact_sheet.png", f"{tmp_path}/contact_sheet_metric.png"]
    sheets = [Path(uri).read_bytes() for uri in written[:2]]
    assert sheets[0] != sheets[1]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('<img alt="') == 4
    assert all(base64.b64encode(sheet).decode() in page for sheet in sheets)


def test_a_report_of_older_rows_leaves_out_what_they_do_not_tell(measured: ExperimentConfig, tmp_path: Path):
    write_report(measured, [result("nn", 50.0)])
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count('<img alt="') == 3


def test_an_episode_is_shown_if_there_is_one(measured: ExperimentConfig, tmp_path: Path):
    features = np.random.default_rng(0).normal(size=(6, 4))
    episode = EpisodeFeatures(
        features={"nn": features, "recycle": 2 * features},
        labels=np.array([0, 0, 0, 1, 1, 1]),
        class_names=("a", "b"),
        support=np.array([True, False, False] * 2),
    )
    write_report(measured, [result("nn", 50.0)], embeddings=episode)
    assert "One episode's features" in (tmp_path / "report.html").read_text(encoding="utf-8")
