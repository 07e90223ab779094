"""`lr-ray invert`."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer
from lr_ray.cli.options import (
    Adapters,
    Cluster,
    Config,
    Fast,
    Json,
    Output,
    Overrides,
    Synthetic,
    Up,
    hand_over,
    print_json,
    read_config,
    reporter,
)


def invert(
    config: Config,
    overrides: Overrides = None,
    adapters: Adapters = None,
    synthetic: Synthetic = None,
    output: Output = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first adapter that cannot be inverted.")] = False,
    fast: Fast = None,
    cluster: Cluster = None,
    up: Up = False,
    json: Json = False,
) -> None:
    """Invert every adapter into synthetic images of its classes. A rerun continues.

    Adapters that cannot be inverted are skipped and listed, and the exit code is 2.
    """
    experiment = read_config(config, overrides, output=output, adapters=adapters, synthetic=synthetic)
    flags = [*(["--strict"] if strict else []), *(["--fast", fast] if fast else [])]
    hand_over(experiment, cluster, "invert", *flags, "--config", up=up, json=json)
    from lr_ray.runtime.inversion import invert_library
    from lr_ray.runtime.probe import choose_by_probe

    shown = reporter(quiet=json)
    report = invert_library(choose_by_probe(experiment, shown) if fast else experiment, shown, strict=strict)
    if json:
        print_json(asdict(report))
    else:
        for root in dict.fromkeys((experiment.synthetic_root, experiment.for_metric.synthetic_root)):
            number = sum(uri.startswith(f"{root.rstrip('/')}/") for uri in report.uris)
            print(f"{number} files of synthetic images in {root}")
        for failure in report.failures:
            print(f"lr-ray: failed: {failure}", file=sys.stderr)
    if report.failures:
        raise typer.Exit(2)
