"""Print results as the Markdown tables that README and docs show; keep them in bench/results, and their pictures in docs.

python -m bench.tables runs/demo runs/cifar-fs runs/gain-glyphs runs/gain-cifar-fs
"""

import json
import shutil
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from lr_ray.bench.speed import RESULTS

from lr_ray.report.pictures import contact_sheet
from lr_ray.report.tables import as_markdown, results_table, shape_of, shapes_of
from lr_ray.storage.synthetic import by_adapter, list_synthetic, read_first_classes

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
ADAPTERS_SHOWN = 2
CLASSES_SHOWN = 12

Row = dict[str, Any]


def markdown(rows: list[Row]) -> str:
    """A line a variant of a grid, a column a shape, and the 1-shot accuracy of each seed."""
    shapes = shapes_of(rows)
    columns = ["variant", *shapes, "1-shot of each seed"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        found = {shape_of(row): row for row in rows if row["variant"] == variant}
        first = f"**{variant}**" if variant == "recycle" else variant
        lines.append("| " + " | ".join([first, *(interval(found[s]) for s in shapes), seeds(found[shapes[0]])]) + " |")
    return "\n".join(lines)


def cells_of(rows: list[Row]) -> dict[str, set[str]]:
    """In which cells each method was measured."""
    cells: dict[str, set[str]] = {}
    for row in rows:
        cells.setdefault(row["method"], set()).add(row["cell"])
    return cells


def variant_of(row: Row, cells: dict[str, set[str]]) -> str:
    """The cell, for its own meta-LoRA; else the method, and its cell where it was measured in several."""
    method, _, options = row["method"].partition(":")
    if method == "recycle":
        return f"{row['cell']}, {options}" if options else str(row["cell"])
    return str(row["method"]) if len(cells[row["method"]]) == 1 else f"{row['cell']}, {row['method']}"


def interval(row: Row) -> str:
    return f"{row['accuracy']:.2f} ± {row['ci95']:.2f}"


def seeds(row: Row) -> str:
    return ", ".join(f"{accuracy:.1f}" for accuracy in row["seeds"].values())


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        rows = json.loads((folder / "results.json").read_text())
        shutil.copy(folder / "results.json", RESULTS / f"{folder.name}.json")
        if "cell" in rows[0]:
            cells = cells_of(rows)
            named = [row | {"variant": variant_of(row, cells)} for row in rows]
            print(f"{folder.name}\n\n{markdown(named)}\n")
            shutil.copy(folder / "gain.png", PICTURES / f"{folder.name}.png")
            continue
        print(f"{folder.name}\n\n{as_markdown(results_table(rows))}\n")
        for name, synthetic in ((folder.name, folder / "synthetic"), (f"{folder.name}-metric", folder / "metric_synthetic")):
            if not synthetic.is_dir():
                continue
            shown = by_adapter(list_synthetic(str(synthetic)))[:ADAPTERS_SHOWN]
            classes = read_first_classes(str(synthetic), list(chain.from_iterable(shown)), most=CLASSES_SHOWN)
            (PICTURES / f"{name}.png").write_bytes(contact_sheet(classes, keep_ratio=0.5))


if __name__ == "__main__":
    main()
