import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from lr_ray.data.images import DataConfig
from lr_ray.errors import ConfigError
from lr_ray.grid import load_grid, plan_cell
from lr_ray.inversion.invert import InversionConfig

GRIDS = sorted((Path(__file__).parents[1] / "bench" / "gain").glob("*.yaml"))
BASE = {
    "name": "base",
    "data": {"tune": {"source": "digits", "classes": ["0:5"]}, "test": {"source": "digits", "classes": ["5:10"]}},
}


@pytest.fixture
def write(tmp_path: Path):
    """Writes `grid.yaml` beside a `base.yaml`; returns its path."""

    def write_grid(cells: dict[str, Any], **top: Any) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "cells": cells, **top}))
        return tmp_path / "grid.yaml"

    return write_grid


def message_of(path: Path, cell: str | None = None) -> str:
    def plan() -> None:
        grid = load_grid(path)
        plan_cell(grid, cell or "", 0)

    with pytest.raises(ConfigError) as caught:
        plan()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_every_cell_of_every_grid_here_is_allowed(path: Path):
    grid = load_grid(path)
    for name in grid.cells:
        assert plan_cell(grid, name, grid.seeds[0]).config.seed == grid.seeds[0]


def test_values_of_the_cell_go_over_those_of_the_grid_and_the_base(write):
    grid = load_grid(
        write(
            {"a": {}, "b": {"set": {"training.num_steps": 7}}},
            set={"training.num_steps": 5, "evaluation.methods": ["nn"]},
        )
    )
    a, b = (plan_cell(grid, name, 3).config for name in "ab")
    assert (a.training.num_steps, b.training.num_steps) == (5, 7)
    assert a.evaluation.methods == b.evaluation.methods == ("nn",)
    assert a.seed == b.seed == 3
    assert a.data.tune is not None
    assert a.data.tune.source == "digits"


def test_a_section_that_the_cell_replaces_is_replaced(write):
    cell = {"set": {"data.test": {"source": "glyphs"}, "inversion": {"num_steps": 3}}}
    over = {"data.test.classes": ["5:7"], "inversion.learning_rate": 0.5}
    config = plan_cell(load_grid(write({"a": cell}, set=over)), "a", 0).config
    assert config.data.test is not None
    assert (config.data.test.source, config.data.test.classes) == ("glyphs", DataConfig(source="glyphs").classes)
    assert (config.inversion.num_steps, config.inversion.learning_rate) == (3, InversionConfig().learning_rate)


@pytest.mark.parametrize("key", ["seed", "output", "synthetic", "metric_synthetic", "relations", "name"])
def test_what_the_grid_says_itself_cannot_be_set(write, key: str):
    for top, cells in (({"set": {key: "mine"}}, {"a": {}}), ({}, {"a": {"set": {key: "mine"}}})):
        expected = f"cell 'a': set.{key}: the grid itself says what {key} is; leave it out"
        assert message_of(write(cells, **top), "a") == expected


def test_a_class_that_yaml_takes_for_a_date(write):
    grid = load_grid(write({"a": {"set": {"data.test": {"source": "digits", "classes": [date(2024, 1, 1)]}}}}))
    config = plan_cell(grid, "a", 0).config
    assert config.data.test is not None
    assert config.data.test.classes == ("2024-01-01",)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"kind": "noise", "per_class": 4}, "per_class 4: `noise` images here have no classes of their own; leave it out"),
        ({"kind": "real", "data": {"source": "digits"}, "per_class": 4}, "per_class 4: `real` images here have no classes"),
        ({"kind": "mixed", "data": {"source": "digits"}}, "data does not go with kind `mixed`; leave it out"),
    ],
)
def test_settings_that_a_stand_in_does_not_have(write, images: dict[str, Any], message: str):
    assert message in message_of(write({"a": {"images": images}}))


def test_how_the_work_is_spread_does_not_name_a_cell_and_validation_does(write):
    spread = {"training.num_workers": 2, "training.episodes_per_step": 2, "training.recompute": True}
    alone = {"training.episodes_per_step": 2}
    validated = {**alone, "data.validation": {"source": "digits", "classes": ["4:9"]}}
    grid = load_grid(write({name: {"set": values} for name, values in (("a", alone), ("A", spread), ("b", validated))}))
    digests = [plan_cell(grid, name, 0).config.output_root.rpartition("-")[2] for name in grid.cells]
    assert digests[0] == digests[1] != digests[2]


def test_cells_share_adapters_and_images_as_far_as_they_agree(write):
    grid = load_grid(
        write(
            {
                "plain": {},
                "trained otherwise": {"set": {"training.num_steps": 7}},
                "inverted otherwise": {"set": {"inversion.num_steps": 7}},
                "tuned otherwise": {"set": {"tuning.num_adapters": 7}},
                "shuffled": {"images": {"kind": "shuffled"}},
                "metric on others": {"set": {"metric_inversion.num_steps": 9}},
                "and trained otherwise": {"set": {"metric_inversion.num_steps": 9, "training.num_steps": 7}},
                "measured otherwise": {"set": {"evaluation.methods": ["nn"]}},
            }
        )
    )
    cells = {name: plan_cell(grid, name, 0) for name in grid.cells}
    plain = cells["plain"].config

    def shared(name: str) -> tuple[bool, bool]:
        config = cells[name].config
        return config.adapters_root == plain.adapters_root, config.synthetic_root == plain.synthetic_root

    assert shared("trained otherwise") == (True, True)
    assert shared("inverted otherwise") == (True, False)
    assert shared("tuned otherwise") == (False, False)
    assert shared("shuffled") == (True, False)
    assert cells["shuffled"].inverted_root == plain.synthetic_root
    assert shared("measured otherwise") == (True, True)
    assert shared("metric on others") == (True, True)
    assert cells["metric on others"].config.for_metric.inversion.num_steps == 9
    roots = {cells[name].config.for_metric.synthetic_root for name in ("plain", "metric on others", "and trained otherwise")}
    assert roots == {plain.synthetic_root, cells["metric on others"].config.metric_synthetic}
    assert len({cell.config.output_root for cell in cells.values()}) == len(cells)
    assert plan_cell(grid, "plain", 1).config.adapters_root != plain.adapters_root
    assert all(cell.tune for cell in cells.values())


def test_images_for_the_metric_do_not_go_with_images_in_the_place_of_the_inverted(write):
    cell = {"set": {"metric_inversion.num_steps": 9}, "images": {"kind": "shuffled"}}
    with pytest.raises(ConfigError, match=r"cell 'a': images, .* do not go with metric_inversion.num_steps; leave it out"):
        plan_cell(load_grid(write({"a": cell})), "a", 0)


def test_given_adapters_are_not_tuned(write, tmp_path: Path):
    grid = load_grid(write({"a": {"set": {"adapters": str(tmp_path / "given")}}}))
    cell = plan_cell(grid, "a", 0)
    assert not cell.tune
    assert cell.config.adapters_root == str(tmp_path / "given")


def test_folders_lie_below_the_output(write, tmp_path: Path):
    grid = load_grid(write({"a, b/c": {}}), output=str(tmp_path / "here"))
    cell = plan_cell(grid, "a, b/c", 0)
    roots = [cell.config.output_root, cell.config.adapters_root, cell.config.synthetic_root]
    assert all(Path(root).parent.parent == tmp_path / "here" for root in roots)
    assert Path(cell.config.output_root).name.startswith("a-b-c-")


@pytest.mark.parametrize(
    ("cells", "top", "expected"),
    [
        ({}, {}, "cells"),
        ({"a": {}}, {"seeds": []}, "seeds"),
        ({"a": {}}, {"seeds": [1, 1]}, "the same one twice"),
        ({"a": {"sets": {}}}, {}, "unknown key 'cells.a.sets'"),
        ({"a": {"images": {"kind": "paintings"}}}, {}, "cells.a.images.kind"),
        ({"a": {}}, {"bases": "x"}, "allowed there: name, base, output, seeds, set, cells"),
        ({"a": {"set": {"training.num_stepz": 7}}}, {}, "cell 'a': .*training.num_stepz.*allowed there"),
        ({"a": {"set": {"data.test": None}}}, {}, "cell 'a': data.test is not set"),
    ],
)
def test_what_is_not_allowed_is_named(write, cells: dict[str, Any], top: dict[str, Any], expected: str):
    assert re.search(expected, message_of(write(cells, **top), "a"))


def test_a_base_that_is_not_there_is_named(write, tmp_path: Path):
    path = write({"a": {}})
    (tmp_path / "base.yaml").unlink()
    assert "base.yaml" in message_of(path, "a")


def test_a_cell_may_have_seeds_of_its_own(write):
    grid = load_grid(write({"a": {}, "b": {"seeds": [7]}}, seeds=[1, 2]))
    assert (grid.cells["a"].seeds, grid.cells["b"].seeds) == (None, (7,))
    assert "the same one twice" in message_of(write({"a": {"seeds": [1, 1]}}), "a")
