"""Print results as the Markdown tables that README and docs show; keep them in bench/results, and their pictures in docs.

python -m bench.tables runs/demo runs/cifar-fs runs/gain-glyphs runs/gain-cifar-fs
"""

import json
import shutil
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from lr_ray.report.pictures import contact_sheet
from lr_ray.storage.synthetic import by_adapter, list_synthetic, read_pool

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
ADAPTERS_SHOWN = 2

Row = dict[str, Any]


def markdown(rows: list[Row], name: str, cell: Callable[[Row], str], last: Callable[[Row], str]) -> str:
    """A line for each value of `name`, a column a shape, and one more column, headed by the docstring of `last`."""
    shapes = list(dict.fromkeys((row["n_way"], row["n_shot"]) for row in rows))
    columns = [name, *(f"{n_way}-way {n_shot}-shot" for n_way, n_shot in shapes), last.__doc__ or ""]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for key in dict.fromkeys(row[name] for row in rows):
        found = {(row["n_way"], row["n_shot"]): row for row in rows if row[name] == key}
        first = f"**{key}**" if key == "recycle" else key
        lines.append("| " + " | ".join([first, *(cell(found[shape]) for shape in shapes), last(found[shapes[0]])]) + " |")
    return "\n".join(lines)


def interval(row: Row) -> str:
    return f"{row['accuracy']:.2f} ± {row['ci95']:.2f}"


def speed(row: Row) -> str:
    """images/s"""
    return f"{row['images_per_s']:.0f}"


def seeds(row: Row) -> str:
    """1-shot of each seed"""
    return ", ".join(f"{accuracy:.1f}" for accuracy in row["seeds"].values())


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        rows = json.loads((folder / "results.json").read_text())
        shutil.copy(folder / "results.json", RESULTS / f"{folder.name}.json")
        if "cell" in rows[0]:
            named = [row | {"variant": row["cell"] if row["method"] == "recycle" else row["method"]} for row in rows]
            print(f"{folder.name}\n\n{markdown(named, 'variant', interval, seeds)}\n")
            shutil.copy(folder / "gain.png", PICTURES / f"{folder.name}.png")
            continue
        print(f"{folder.name}\n\n{markdown(rows, 'method', interval, speed)}\n")
        synthetic = str(folder / "synthetic")
        shown = by_adapter(list_synthetic(synthetic))[:ADAPTERS_SHOWN]
        pool = read_pool(synthetic, list(chain.from_iterable(shown)))
        (PICTURES / f"{folder.name}.png").write_bytes(contact_sheet(pool, keep_ratio=0.5))


if __name__ == "__main__":
    main()
