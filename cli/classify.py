"""`lr-ray classify`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from lr_ray.cli.options import Json, print_json, reporter

if TYPE_CHECKING:
    from lr_ray.serving.tasks import Prediction

_NONE = "none of these"


def classify(
    meta_lora: Annotated[
        str, typer.Argument(help="Folder or URI of a meta-LoRA that `lr-ray train` wrote.", show_default=False)
    ],
    support: Annotated[str, typer.Option("--support", help="Folder or URI of class folders of images.", show_default=False)],
    query: Annotated[
        str,
        typer.Option("--query", help="Folder of images, or one image; with --output also a URI.", show_default=False),
    ],
    reject: Annotated[
        bool, typer.Option("--reject", help="Mark what is too far from every class; needs two images of some class.")
    ] = False,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.001, max=1000, help="Times minus the distance, before the softmax.")
    ] = 1.0,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="Folder or URI for Parquet: a batch job on Ray, for many images.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Classify images by a handful of labelled ones, with no training and no service. A batch job that is rerun continues."""
    if output is not None:
        _in_batch(meta_lora, support, query, output, reject=reject, temperature=temperature, json=json)
        return
    from lr_ray.model import load
    from lr_ray.serving.local import answer_row, classify_folder

    task, found = classify_folder(load(meta_lora), support, query, temperature=temperature, reject=reject)
    if json:
        rows = [answer_row(file, prediction, reject=reject) for file, prediction in found]
        print_json({"classes": list(task.class_names), "threshold": task.threshold, "results": rows})
    else:
        _print_table(found, reject=reject)


def _in_batch(meta_lora: str, support: str, query: str, output: str, *, reject: bool, temperature: float, json: bool) -> None:
    from dataclasses import asdict

    from lr_ray.runtime.classification import classify_prefix

    shown = reporter(quiet=json)
    report = classify_prefix(meta_lora, support, query, output, shown, reject=reject, temperature=temperature)
    if json:
        print_json(asdict(report))
    else:
        print(f"{report.rows} rows in {report.files} Parquet files in {report.output}, {report.errors} of them with an error")


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
