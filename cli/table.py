"""The table of accuracies."""

from collections.abc import Sequence
from typing import Any


def print_results(rows: Sequence[dict[str, Any]]) -> None:
    """A line a method, a column a shape, on stdout."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shapes = list(dict.fromkeys((row["n_way"], row["n_shot"]) for row in rows))
    datasets = ", ".join(dict.fromkeys(row["dataset"] for row in rows))
    title = f"Accuracy on {datasets}, %, ± 95 % confidence interval, {rows[0]['episodes']} episodes"
    table = Table(title=escape(title))
    table.add_column("method")
    for n_way, n_shot in shapes:
        table.add_column(f"{n_way}-way {n_shot}-shot", justify="right")
    table.add_column("images/s", justify="right")
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {(row["n_way"], row["n_shot"]): row for row in rows if row["method"] == method}
        cells = [f"{found[s]['accuracy']:.2f} ± {found[s]['ci95']:.2f}" if s in found else "" for s in shapes]
        speed = next(iter(found.values()))["images_per_s"]
        table.add_row(method, *cells, f"{speed:.0f}", style="bold" if method == "recycle" else None)
    Console(highlight=False).print(table)
