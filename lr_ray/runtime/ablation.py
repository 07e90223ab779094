"""`lr-ray ablate`: every cell of a grid through the real pipeline, each over all seeds."""

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from lr_ray.data.images import DataConfig
from lr_ray.data.load import load_data
from lr_ray.errors import ConfigError
from lr_ray.fewshot.episodes import EpisodeShape
from lr_ray.fewshot.methods import expand, ingredients_of
from lr_ray.fewshot.protocol import TestShape
from lr_ray.grid import Cell, GridConfig, plan_cell
from lr_ray.report.progress import Reporter
from lr_ray.report.tables import shape_of
from lr_ray.runtime.evaluation import RESULTS_NAME
from lr_ray.runtime.experiment import run_cell
from lr_ray.runtime.session import ray_session
from lr_ray.storage.filesystem import join, write_bytes
from lr_ray.storage.measurements import read_rows

GRID_RESULTS_NAME = "results.json"


def run_grid(grid: GridConfig, cells: Sequence[str] | None, reporter: Reporter) -> list[dict[str, Any]]:
    """Run the cells in turn, each over all seeds; what is finished is not done again.

    Returns what `summarise` makes of the grid as far as it is finished, cells of earlier runs included.

    Args:
        cells: names of those to run, default all.

    Raises:
        ConfigError: a cell that the grid does not have, or one that is not allowed; before any work starts.
    """
    if unknown := [name for name in cells or () if name not in grid.cells]:
        raise ConfigError(f"cell {unknown[0]!r} is not in the grid; there are {', '.join(grid.cells)}")
    plan = [plan_cell(grid, name, seed) for name in grid.cells for seed in grid.cells[name].seeds or grid.seeds]
    for cell in plan:
        ingredients_of(cell.config.evaluation.methods)
    _all_finished(plan)  # damaged ones are told before the work
    todo = [cell for cell in plan if cell.name in (cells or grid.cells)]
    summary: list[dict[str, Any]] = []
    with ray_session(todo[0].config.ray):
        for position, cell in enumerate(todo):
            reporter.say(f"cell {position + 1} of {len(todo)}: {cell.name}, seed {cell.seed}")
            run_cell(cell, reporter)
            summary = summarise(_all_finished(plan))  # also what other commands have finished meanwhile
            content = json.dumps(summary, indent=2, ensure_ascii=False)
            write_bytes(join(grid.output_root, GRID_RESULTS_NAME), content.encode())
    return summary


def _all_finished(plan: Sequence[Cell]) -> list[dict[str, Any]]:
    return [{"cell": cell.name, "seed": cell.seed, **row} for cell in plan for row in _finished(cell)]


def _finished(cell: Cell) -> list[dict[str, Any]]:
    """What was measured of the cell's methods, in their order, on its data set and shapes."""
    evaluation = cell.config.evaluation
    rows = read_rows(join(cell.config.output_root, RESULTS_NAME)) or []
    order = {label: position for position, label in enumerate(expand(evaluation.methods))}
    mine = [row for row in rows if row["method"] in order and any(_is_of(shape, row) for shape in evaluation.shapes)]
    if not mine:
        return []
    assert cell.config.data.test is not None
    dataset = _name_of(cell.config.data.test)
    return sorted((row for row in mine if row["dataset"] == dataset), key=lambda row: order[row["method"]])


@cache
def _name_of(data: DataConfig) -> str:
    """As rows have it; it takes the reading of the data, once for all cells."""
    return load_data(data).name


def _is_of(shape: TestShape, row: dict[str, Any]) -> bool:
    """Whether a row is of episodes of that shape."""
    if isinstance(shape, EpisodeShape):
        return (row["n_way"], row["n_shot"], row["n_query"]) == (shape.n_way, shape.n_shot, shape.n_query)
    return bool(row.get("shape") == shape.name)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each cell, method and shape: mean over the seeds, each seed's accuracy, and two kinds of spread.

    `ci95` is the 95 % confidence interval of the mean over the test episodes of all seeds; `lowest` and `highest` are
    the seeds'.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cell"], row["method"], shape_of(row), row.get("n_query")), []).append(row)
    summary: list[dict[str, Any]] = []
    for (cell, method, *_), found in groups.items():
        accuracies = [row["accuracy"] for row in found]
        summary.append(
            {
                "cell": cell,
                "method": method,
                "dataset": found[0]["dataset"],
                **{key: found[0][key] for key in ("shape", "n_way", "n_shot", "n_query") if key in found[0]},
                "episodes": found[0]["episodes"],
                "seeds": {str(row["seed"]): row["accuracy"] for row in found},
                "accuracy": round(float(np.mean(accuracies)), 2),
                "ci95": round(float(np.sqrt(np.square([row["ci95"] for row in found]).sum())) / len(found), 2),
                "lowest": min(accuracies),
                "highest": max(accuracies),
            }
        )
    return summary
