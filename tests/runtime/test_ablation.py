"""Grids and stand-ins on Ray: cells share what they agree on, stand-ins look like inverted images to all that follows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lr_ray.cli.main import app
from typer.testing import CliRunner

from lr_ray.config import ExperimentConfig
from lr_ray.data.load import load_data
from lr_ray.data.procedural import PROCEDURAL
from lr_ray.errors import ConfigError, DataError
from lr_ray.fewshot.episodes import ImagePool
from lr_ray.grid import StandInConfig, load_grid
from lr_ray.runtime.ablation import run_grid, summarise
from lr_ray.runtime.inversion import invert_library
from lr_ray.runtime.stand_ins import make_stand_ins
from lr_ray.storage.adapters import list_adapters, read_adapter, read_adapters
from lr_ray.storage.synthetic import list_synthetic, read_index, read_pool
from lr_ray.vit.backbone import load_backbone
from tests.jobs import QUIET

pytestmark = pytest.mark.usefixtures("ray_cluster")
EACH = 4


def stand_ins(config: ExperimentConfig, **settings: Any) -> ImagePool:
    inverted = config.synthetic_root
    place = config.model_copy(update={"synthetic": f"{config.output_root}/stand-ins"})
    make_stand_ins(place, StandInConfig(**settings), inverted, QUIET)
    return read_pool(place.synthetic_root, list_synthetic(place.synthetic_root))


def real_images(config: ExperimentConfig, name: str) -> torch.Tensor:
    assert config.data.tune is not None
    data = load_data(config.data.tune)
    return data.pixels(np.flatnonzero(data.labels == data.class_names.index(name)), 32)


def found_in(images: torch.Tensor, real: torch.Tensor) -> list[int]:
    """Position of each image among the real ones."""
    same = (images[:, None] == real[None]).flatten(2).all(dim=2)
    assert same.any(dim=1).all(), "an image that is none of the real ones"
    return same.int().argmax(dim=1).tolist()


@pytest.mark.parametrize("kind", PROCEDURAL)
def test_procedural_images_go_to_the_class_that_the_adapter_finds_most_like_them(library: ExperimentConfig, kind: str):
    pool = stand_ins(library, kind=kind)
    assert pool.images.shape == (3 * 3 * EACH, 3, 32, 32)
    assert np.array_equal(np.bincount(pool.class_of), [EACH] * 9)
    assert len(torch.unique(pool.images, dim=0)) == len(pool.images)
    assert pool.teacher_logits is not None
    for adapter in range(3):
        first = pool.class_of == 3 * adapter  # chosen first, from all candidates
        others = (pool.class_of // 3 == adapter) & ~first
        scores = pool.teacher_logits.log_softmax(dim=1)[:, 0]
        assert scores[first].min() >= scores[others].max()


def test_unrelated_real_images_are_of_the_data_named(library: ExperimentConfig):
    data = load_data(library.data.test)
    pool = stand_ins(library, kind="real", data={"source": "digits", "classes": ["6:10"]})
    found_in(pool.images, data.pixels(np.arange(len(data)), 32))
    names = {name for adapter in read_adapters(library.adapters_root) for name in adapter.spec.class_names}
    assert set(pool.class_names) == names


def test_real_images_of_the_adapters_classes_few_and_many(library: ExperimentConfig):
    for per_class, different in ((None, EACH), (2, 2), (7, 7)):
        config = library.model_copy(update={"output": f"{library.output_root}-{per_class}", "adapters": library.adapters_root})
        pool = stand_ins(config, kind="real", per_class=per_class)
        for c, name in enumerate(pool.class_names):
            images = pool.images[torch.from_numpy(pool.class_of == c)]
            assert len(images) == max(EACH, per_class or 0)
            assert len(set(found_in(images, real_images(library, name)))) == different


def test_mixed_are_the_inverted_and_some_real_ones(inverted: ExperimentConfig):
    originals = read_pool(inverted.synthetic_root, list_synthetic(inverted.synthetic_root))
    pool = stand_ins(inverted, kind="mixed", per_class=2)
    for c, name in enumerate(pool.class_names):
        images = pool.images[torch.from_numpy(pool.class_of == c)]
        assert torch.equal(images[:EACH], originals.images[torch.from_numpy(originals.class_of == c)])
        assert len(set(found_in(images[EACH:], real_images(inverted, name)))) == 2


def test_shuffled_are_the_inverted_ones_patch_by_patch(inverted: ExperimentConfig):
    originals = read_pool(inverted.synthetic_root, list_synthetic(inverted.synthetic_root))
    pool = stand_ins(inverted, kind="shuffled")

    def patches(images: torch.Tensor) -> torch.Tensor:
        return images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)

    moved = 0
    for image, original in zip(patches(pool.images), patches(originals.images), strict=True):
        assert sorted(map(tuple, image.tolist())) == sorted(map(tuple, original.tolist()))
        moved += not torch.equal(image, original)
    assert moved > 0.8 * len(pool.images)
    assert np.array_equal(pool.class_of, originals.class_of)


@pytest.mark.parametrize(
    "settings", [{"kind": "shuffled"}, {"kind": "mixed", "per_class": 2}, {"kind": "real", "per_class": 2}, {"kind": "noise"}]
)
def test_stand_ins_are_of_the_classes_that_are_inverted(inverted: ExperimentConfig, settings: dict[str, Any]):
    some = inverted.inversion.model_copy(update={"classes": ("1:3",)})
    config = inverted.model_copy(update={"inversion": some, "synthetic": f"{inverted.output_root}/some"})
    invert_library(config, QUIET)
    pool = stand_ins(config, **settings)
    originals = read_pool(config.synthetic_root, list_synthetic(config.synthetic_root))
    assert pool.class_names == originals.class_names
    assert pool.slot_of.tolist() == originals.slot_of.tolist() == [1, 2] * 3
    assert pool.teacher_logits is not None
    assert np.bincount(pool.class_of).tolist() == [EACH + 2 * (settings["kind"] == "mixed")] * 6


def test_stand_ins_are_made_once(library: ExperimentConfig):
    stand_ins(library, kind="noise")
    files = {path: path.stat().st_mtime_ns for path in Path(library.output_root, "stand-ins").glob("*.parquet")}
    stand_ins(library, kind="noise")
    assert files == {path: path.stat().st_mtime_ns for path in files}
    assert len(files) == 3


def test_stand_ins_of_an_adapter_with_a_normalisation_of_its_own(library: ExperimentConfig):
    """Which is the adapter's and not the backbone's that trains on them."""
    manifest = Path(list_adapters(library.adapters_root)[0], "lr_ray.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"mean": [0.1, 0.2, 0.3]}))
    assert read_adapter(str(manifest.parent)).mean == (0.1, 0.2, 0.3)
    stand_ins(library, kind="noise")
    root = f"{library.output_root}/stand-ins"
    assert len(read_index(root, list_synthetic(root), load_backbone(library.backbone).identity)) == 9


def test_too_few_real_images_are_an_error(library: ExperimentConfig):
    with pytest.raises(DataError, match="images in digits.*but 1000 are asked for"):
        stand_ins(library, kind="real", per_class=1000)


def test_real_images_without_data_are_an_error(library: ExperimentConfig):
    config = library.model_copy(update={"data": library.data.model_copy(update={"tune": None})})
    with pytest.raises(ConfigError, match="name the real images"):
        stand_ins(config, kind="real")


@pytest.fixture
def grid_file(tiny_experiment: ExperimentConfig, tmp_path: Path) -> Path:
    resolved = tiny_experiment.resolved() | {"output": None}
    (tmp_path / "tiny.yaml").write_text(json.dumps(resolved))
    grid = {
        "base": "tiny.yaml",
        "output": str(tmp_path / "grid"),
        "seeds": [0, 1],
        "set": {"evaluation.methods": ["recycle"], "training.num_steps": 2},
        "cells": {
            "references": {"set": {"evaluation.methods": ["nn"]}},
            "metric": {"images": {"kind": "noise"}, "set": {"evaluation.methods": ["nn-metric"]}},
            "noise": {"images": {"kind": "noise"}},
        },
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid, sort_keys=False))
    return tmp_path / "grid.yaml"


@pytest.mark.slow
def test_a_grid_through_the_command_line(grid_file: Path, tmp_path: Path):
    first = CliRunner().invoke(app, ["ablate", str(grid_file), "--json"], catch_exceptions=False)
    summary = json.loads(first.stdout)
    assert [(row["cell"], row["method"]) for row in summary] == [
        ("references", "nn"),
        ("metric", "nn-metric"),
        ("noise", "recycle"),
    ]
    for row in summary:
        assert row["accuracy"] == pytest.approx(np.mean(list(row["seeds"].values())), abs=0.01)
        assert list(row["seeds"]) == ["0", "1"]
    root = tmp_path / "grid"
    assert json.loads((root / "results.json").read_text()) == summary
    assert (root / "gain.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((root / "adapters").iterdir())) == 2, "a library for each seed, which all cells share"
    assert len(list((root / "synthetic").iterdir())) == 2, "noise for each seed, and no inverted images, which none asks for"
    made = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}

    second = CliRunner().invoke(app, ["ablate", str(grid_file), "--json"], catch_exceptions=False)

    assert json.loads(second.stdout) == summary
    assert made == {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}


def test_only_the_cells_asked_for_beside_what_is_finished(grid_file: Path, tmp_path: Path):
    alone = run_grid(load_grid(grid_file), ["references", "references"], QUIET)
    assert [(row["cell"], list(row["seeds"])) for row in alone] == [("references", ["0", "1"])]
    again = run_grid(load_grid(grid_file), ["metric"], QUIET)
    assert again[0] == alone[0]
    assert [row["cell"] for row in again] == ["references", "metric"]
    assert json.loads((tmp_path / "grid" / "results.json").read_text()) == again


def test_what_was_measured_on_other_data_is_not_mixed_in(grid_file: Path, tmp_path: Path):
    content = yaml.safe_load(grid_file.read_text())
    (before,) = run_grid(load_grid(grid_file), ["references"], QUIET)
    assert before["seeds"].keys() == {"0", "1"}

    content["set"]["data.test"] = {"source": "digits", "classes": ["5:9"]}
    grid_file.write_text(yaml.safe_dump(content, sort_keys=False))
    one_seed = {**content, "seeds": [0]}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(one_seed, sort_keys=False))
    (alone,) = run_grid(load_grid(tmp_path / "one.yaml"), ["references"], QUIET)
    assert alone["dataset"] != before["dataset"]
    run_grid(load_grid(grid_file), ["noise"], QUIET)
    found = json.loads((tmp_path / "grid" / "results.json").read_text())
    assert [(row["cell"], row["dataset"], list(row["seeds"])) for row in found] == [
        ("references", alone["dataset"], ["0"]),
        ("noise", alone["dataset"], ["0", "1"]),
    ]


def test_an_unknown_cell_is_an_error_before_any_work(grid_file: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="cell 'noises' is not in the grid; there are references, metric, noise"):
        run_grid(load_grid(grid_file), ["noises"], QUIET)
    assert not (tmp_path / "grid").exists()


def test_the_summary_is_the_mean_over_seeds_and_its_interval():
    row = {"cell": "a", "method": "nn", "dataset": "d", "n_way": 5, "n_shot": 1, "episodes": 600}
    rows = [{**row, "seed": seed, "accuracy": a, "ci95": c} for seed, a, c in ((0, 50.0, 0.6), (1, 53.0, 0.8))]
    (found,) = summarise(rows)
    assert found["seeds"] == {"0": 50.0, "1": 53.0}
    assert (found["accuracy"], found["lowest"], found["highest"]) == (51.5, 50.0, 53.0)
    assert found["ci95"] == 0.5  # sqrt(0.36 + 0.64) / 2


def test_the_summary_keeps_shapes_apart():
    row = {"cell": "a", "method": "nn", "dataset": "d", "seed": 0, "episodes": 600, "accuracy": 50.0, "ci95": 0.6}
    varying = [{"n_way": None, "n_shot": None, "shape": f"varying-way varying-shot{more}"} for more in ("", " (ways 5-9)")]
    shapes = [{"n_way": 5, "n_shot": 1}, *varying]
    found = summarise([{**row, **shape} for shape in shapes])
    assert [{key: entry[key] for key in ("n_way", "n_shot", "shape") if key in entry} for entry in found] == shapes


def test_the_summary_keeps_numbers_of_queries_apart():
    row = {"cell": "a", "method": "nn", "dataset": "d", "n_way": 5, "n_shot": 1, "seed": 0, "episodes": 600, "ci95": 1.0}
    found = summarise([{**row, "n_query": q, "accuracy": accuracy} for q, accuracy in ((15, 60.0), (5, 50.0))])
    assert [(entry["n_query"], entry["accuracy"], entry["seeds"]) for entry in found] == [
        (15, 60.0, {"0": 60.0}),
        (5, 50.0, {"0": 50.0}),
    ]
