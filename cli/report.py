"""`lr-ray report`."""

import threading
from typing import Annotated

import typer
from lr_ray.cli.options import Config, Json, Output, Overrides, Synthetic, print_json, read_config, reporter


def report(
    config: Config,
    overrides: Overrides = None,
    synthetic: Synthetic = None,
    output: Output = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw the images of an inversion that goes on, as they come, until Ctrl-C.")
    ] = False,
    json: Json = False,
) -> None:
    """Draw the contact sheet and the HTML report of a measured run again."""
    experiment = read_config(config, overrides, output=output, synthetic=synthetic)
    from lr_ray.report.write import watch_synthetic, write_report

    if watch:
        try:
            watch_synthetic(experiment, reporter(quiet=json), threading.Event())
        except KeyboardInterrupt:
            raise typer.Exit from None
    from lr_ray.runtime.evaluation import example_episode, stored_rows

    written = write_report(experiment, stored_rows(experiment), example_episode(experiment))
    if json:
        print_json(written)
    else:
        print(*written, sep="\n")
