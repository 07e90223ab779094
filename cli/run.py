"""`lr-ray run`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from lr_ray.cli.options import Cluster, Fast, Json, Output, Overrides, Up, hand_over, print_json, read_config, reporter
from lr_ray.cli.table import print_results

if TYPE_CHECKING:
    from lr_ray.config import ExperimentConfig


def run(
    config: Annotated[Path, typer.Argument(help="YAML file of the experiment.", show_default=False)],
    overrides: Overrides = None,
    output: Output = None,
    fast: Fast = None,
    cluster: Cluster = None,
    up: Up = False,
    json: Json = False,
) -> None:
    """The whole job: tune (where the config names data for it), invert, train, eval, report. A rerun continues."""
    experiment = read_config(config, overrides, output=output)
    flags = ["--fast", fast] if fast else []
    hand_over(experiment, cluster, "run", *flags, up=up, json=json, reads=("tune", "validation", "test"))
    run_and_report(experiment, fast=fast is not None, json=json)


def run_and_report(experiment: "ExperimentConfig", *, fast: bool = False, json: bool) -> None:
    """Every step in turn, then the table and where the report is."""
    from lr_ray.report.write import write_report
    from lr_ray.runtime.evaluation import example_episode, stored_rows
    from lr_ray.runtime.experiment import run_experiment

    rows = run_experiment(experiment, reporter(quiet=json), fast=fast)
    written = write_report(experiment, stored_rows(experiment), example_episode(experiment))
    if json:
        print_json(rows)
        return
    print_results(rows)
    for uri in written:
        print(uri)
