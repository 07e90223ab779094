"""`lr-ray ablate`: every cell of a grid through the real pipeline, each over all seeds."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lr_ray.errors import ConfigError
from lr_ray.fewshot.methods import ingredients_of
from lr_ray.grid import GridConfig, plan_cell
from lr_ray.report.progress import Reporter
from lr_ray.report.tables import shape_of
from lr_ray.runtime.experiment import run_cell
from lr_ray.runtime.session import ray_session
from lr_ray.storage.filesystem import join, write_bytes

GRID_RESULTS_NAME = "results.json"


def run_grid(grid: GridConfig, cells: Sequence[str] | None, reporter: Reporter) -> list[dict[str, Any]]:
    """Run the cells in turn, each over all seeds; what is finished is not done again. Returns what `summarise` makes of all.

    Args:
        cells: names of those to run, default all.

    Raises:
        ConfigError: a cell that the grid does not have, or one that is not allowed; before any work starts.
    """
    names = list(cells or grid.cells)
    if unknown := [name for name in names if name not in grid.cells]:
        raise ConfigError(f"cell {unknown[0]!r} is not in the grid; there are {', '.join(grid.cells)}")
    plan = [plan_cell(grid, name, seed) for name in names for seed in grid.cells[name].seeds or grid.seeds]
    for cell in plan:
        ingredients_of(cell.config.evaluation.methods)
    rows: list[dict[str, Any]] = []
    with ray_session(plan[0].config.ray):
        for position, cell in enumerate(plan):
            reporter.say(f"cell {position + 1} of {len(plan)}: {cell.name}, seed {cell.seed}")
            rows += [{"cell": cell.name, "seed": cell.seed, **row} for row in run_cell(cell, reporter)]
            content = json.dumps(summarise(rows), indent=2, ensure_ascii=False)
            write_bytes(join(grid.output_root, GRID_RESULTS_NAME), content.encode())
    return summarise(rows)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each cell, method and shape: mean over the seeds, each seed's accuracy, and two kinds of spread.

    `ci95` is the 95 % confidence interval of the mean over the test episodes of all seeds; `lowest` and `highest` are
    the seeds'.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cell"], row["method"], shape_of(row)), []).append(row)
    summary: list[dict[str, Any]] = []
    for (cell, method, _), found in groups.items():
        accuracies = [row["accuracy"] for row in found]
        summary.append(
            {
                "cell": cell,
                "method": method,
                "dataset": found[0]["dataset"],
                **{key: found[0][key] for key in ("shape", "n_way", "n_shot") if key in found[0]},
                "episodes": found[0]["episodes"],
                "seeds": {str(row["seed"]): row["accuracy"] for row in found},
                "accuracy": round(float(np.mean(accuracies)), 2),
                "ci95": round(float(np.sqrt(np.square([row["ci95"] for row in found]).sum())) / len(found), 2),
                "lowest": min(accuracies),
                "highest": max(accuracies),
            }
        )
    return summary
