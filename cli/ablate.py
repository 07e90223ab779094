"""`lr-ray ablate`."""

from pathlib import Path
from typing import Annotated

import typer
from lr_ray.cli.options import Json, Output, print_json, reporter
from lr_ray.cli.table import print_grid


def ablate(
    grid: Annotated[Path, typer.Argument(help="YAML file of the grid.", show_default=False)],
    cell: Annotated[list[str] | None, typer.Option("--cell", help="Run these only. Repeatable.", show_default=False)] = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Run variants of an experiment side by side, each over the same seeds: table and bar chart. A rerun continues."""
    from lr_ray.grid import load_grid
    from lr_ray.report.write import write_grid_chart
    from lr_ray.runtime.ablation import run_grid

    loaded = load_grid(grid, output=output)
    summary = run_grid(loaded, cell, reporter(quiet=json))
    chart = write_grid_chart(loaded.output_root, summary)
    if json:
        print_json(summary)
        return
    print_grid(summary)
    print(chart)
