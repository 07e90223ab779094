"""The table of accuracies."""

from collections.abc import Sequence
from typing import Any


def print_results(rows: Sequence[dict[str, Any]]) -> None:
    """A line a method, a column a shape, on stdout."""
    from rich.console import Console

    from lr_ray.report.tables import as_text, results_table

    Console(highlight=False).print(as_text(results_table(rows)))


def print_grid(summary: Sequence[dict[str, Any]]) -> None:
    """A line a cell and method, a column a shape, on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lr_ray.report.tables import shape_of, shapes_of

    shapes = shapes_of(summary)
    datasets = ", ".join(dict.fromkeys(row["dataset"] for row in summary))
    seeds = ", ".join(dict.fromkeys(seed for row in summary for seed in row["seeds"]))
    table = Table(title=escape(f"Accuracy on {datasets}, %, mean of seeds {seeds} ± 95 % CI (lowest to highest)"))
    for column in ("cell", "method"):
        table.add_column(column)
    for shape in shapes:
        table.add_column(shape, justify="right")
    for cell, method in dict.fromkeys((row["cell"], row["method"]) for row in summary):
        found = {shape_of(r): r for r in summary if (r["cell"], r["method"]) == (cell, method)}
        texts = [_accuracy(found[shape]) if shape in found else "" for shape in shapes]
        table.add_row(escape(cell), method, *texts)
    Console(highlight=False).print(table)


def _accuracy(row: dict[str, Any]) -> str:
    return f"{row['accuracy']:.2f} ± {row['ci95']:.2f} ({row['lowest']:.1f} to {row['highest']:.1f})"
