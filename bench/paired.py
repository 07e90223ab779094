"""Two runs' `recycle` on the same test episodes: the mean difference of their accuracies, its interval, and its p-value.

    python -m bench.paired speed runs/dense runs/sparse [runs/other ...]

Each of the later runs against the first. Writes bench/results/paired-NAME.json.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from lr_ray.bench.speed import write_result

from lr_ray.fewshot.evaluate import is_right, paired_difference


def accuracies(run: Path, shape: str) -> np.ndarray:
    """(E,) of the episodes of a shape such as `5-way-1-shot`, from what was predicted of each."""
    (path,) = (run / "evaluation").glob(f"recycle-{shape}-*.parquet")
    n_way = int(shape.split("-")[0])
    predicted = pq.read_table(path)["predicted"].to_pylist()
    return np.array([is_right(np.array(ways).reshape(n_way, -1)).mean() for ways in predicted])


def episodes_of(run: Path, shape: str) -> str:
    """The name of their file, which holds the digest of data, seed and shape."""
    (path,) = (run / "evaluation").glob(f"episodes-{shape}-*.parquet")
    return path.name


def compare(first: Path, other: Path, shape: str) -> dict[str, Any]:
    if episodes_of(first, shape) != episodes_of(other, shape):
        raise SystemExit(f"{first} and {other}: not the same test episodes of {shape}")
    theirs, ours = accuracies(first, shape), accuracies(other, shape)
    found = paired_difference(ours, theirs)
    return {
        "run": other.name,
        "against": first.name,
        "shape": shape,
        "accuracy": round(100 * float(ours.mean()), 2),
        "accuracy_against": round(100 * float(theirs.mean()), 2),
        "difference": round(100 * found.mean, 2),
        "difference_ci95": round(100 * found.ci95, 2),
        "p_value": found.p_value,
        "episodes": found.num_episodes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("runs", nargs="+", type=Path)
    arguments = parser.parse_args()
    first, *others = arguments.runs
    rows = [compare(first, other, shape) for other in others for shape in ("5-way-1-shot", "5-way-5-shot")]
    for row in rows:
        print(row)
    write_result(f"paired-{arguments.name}", {"rows": rows})


if __name__ == "__main__":
    main()
