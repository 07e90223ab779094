"""Print a results.json as the Markdown table that the README shows; keep it in bench/results, and some images in docs.

python bench/tables.py runs/demo runs/cifar-fs
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from lr_ray.report.pictures import contact_sheet
from lr_ray.storage.synthetic import list_synthetic, read_pool

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
ADAPTERS_SHOWN = 2


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
        synthetic = str(folder / "synthetic")
        pool = read_pool(synthetic, list_synthetic(synthetic)[:ADAPTERS_SHOWN])
        (PICTURES / f"{folder.name}.png").write_bytes(contact_sheet(pool, keep_ratio=0.5))


if __name__ == "__main__":
    main()
