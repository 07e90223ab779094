"""Print a results.json as the Markdown table that the README shows, and keep the file in bench/results.

python bench/tables.py runs/demo runs/cifar-fs
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line a method, a column a shape."""
    shapes = list(dict.fromkeys((row["n_way"], row["n_shot"]) for row in rows))
    lines = [
        "| method | " + " | ".join(f"{n_way}-way {n_shot}-shot" for n_way, n_shot in shapes) + " | images/s |",
        "|---" * (len(shapes) + 2) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {(row["n_way"], row["n_shot"]): row for row in rows if row["method"] == method}
        cells = [f"{found[shape]['accuracy']:.2f} ± {found[shape]['ci95']:.2f}" for shape in shapes]
        name = f"**{method}**" if method == "recycle" else method
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {next(iter(found.values()))['images_per_s']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        print(f"{folder.name}\n\n{markdown(json.loads((folder / 'results.json').read_text()))}\n")
        shutil.copy(folder / "results.json", RESULTS / f"{folder.name}.json")


if __name__ == "__main__":
    main()
