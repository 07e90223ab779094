"""`lr-ray eval`."""

from typing import Annotated

import typer
from lr_ray.cli.options import (
    Adapters,
    Classes,
    Cluster,
    Config,
    Data,
    Json,
    Output,
    Overrides,
    Up,
    hand_over,
    print_json,
    read_config,
    reporter,
)
from lr_ray.cli.table import print_results


def evaluate(
    config: Config,
    overrides: Overrides = None,
    data: Data = None,
    classes: Classes = None,
    adapters: Adapters = None,
    output: Output = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Measure these only. Repeatable.", show_default=False)
    ] = None,
    cluster: Cluster = None,
    up: Up = False,
    json: Json = False,
) -> None:
    """Measure every method on the same few-shot tasks of unseen classes."""
    chosen = [f"evaluation.methods=[{','.join(repr(name) for name in method)}]"] if method else []
    experiment = read_config(
        config, [*(overrides or []), *chosen], output=output, adapters=adapters, data=("test", data, classes)
    )
    reads: tuple[str, ...] = ("test",)
    if cluster is not None:
        from lr_ray.fewshot.methods import ingredients_of

        reads = ("test", "tune") if "tune" in ingredients_of(experiment.evaluation.methods) else reads
    hand_over(experiment, cluster, "eval", "--config", up=up, json=json, reads=reads)
    from lr_ray.runtime.evaluation import evaluate_methods

    rows = evaluate_methods(experiment, reporter(quiet=json))
    if json:
        print_json(rows)
    else:
        print_results(rows)
