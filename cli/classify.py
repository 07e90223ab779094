"""`lr-ray classify`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from lr_ray.cli.options import Json, print_json

if TYPE_CHECKING:
    from lr_ray.serving.tasks import Prediction

_NONE = "none of these"


def classify(
    meta_lora: Annotated[
        str, typer.Argument(help="Folder or URI of a meta-LoRA that `lr-ray train` wrote.", show_default=False)
    ],
    support: Annotated[Path, typer.Option("--support", help="Folder of class folders of images.", show_default=False)],
    query: Annotated[Path, typer.Option("--query", help="Folder of images, or one image.", show_default=False)],
    reject: Annotated[
        bool, typer.Option("--reject", help="Mark what is too far from every class; needs two images of some class.")
    ] = False,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.001, max=1000, help="Times minus the distance, before the softmax.")
    ] = 1.0,
    json: Json = False,
) -> None:
    """Classify images by a handful of labelled ones, with no training and no service."""
    from lr_ray.errors import DataError
    from lr_ray.model import load
    from lr_ray.serving.local import classify_folder

    task, found = classify_folder(load(meta_lora), support, query, temperature=temperature)
    threshold = task.threshold
    if reject and threshold is None:
        raise DataError(f"--reject: every class in {support} has one image; give two of some class, or leave --reject out")
    if json:
        rows = [_row(file, prediction, reject=reject) for file, prediction in found]
        print_json({"classes": list(task.class_names), "threshold": threshold, "results": rows})
    else:
        _print_table(found, reject=reject)


def _row(file: str, prediction: "Prediction", *, reject: bool) -> dict[str, object]:
    return {
        "file": file,
        "class": None if reject and prediction.rejected else prediction.ranked[0],
        "probability": prediction.probabilities[0],
        "distance": prediction.distances[0],
        "none_of_these": prediction.rejected,
    }


def _print_table(found: "Sequence[tuple[str, Prediction]]", *, reject: bool) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in ("file", "class", "probability", "distance"):
        table.add_column(column, justify="left" if column in ("file", "class") else "right", overflow="fold")
    for file, prediction in found:
        name = _NONE if reject and prediction.rejected else prediction.ranked[0]
        table.add_row(escape(file), escape(name), f"{prediction.probabilities[0]:.3f}", f"{prediction.distances[0]:.3f}")
    Console(highlight=False).print(table)
