"""`lr-ray plan`."""

from typing import Annotated

import typer
from lr_ray.cli.options import Config, Json, Overrides, print_json, read_config


def plan(
    config: Config,
    num_adapters: Annotated[
        int | None, typer.Option("--num-adapters", min=1, help="To invert.", show_default="tuning.num_adapters")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option("--num-classes", min=1, help="Of each adapter.", show_default="tuning.n_way")
    ] = None,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """What the job would take on GPUs: memory, actors a GPU, hours, dollars. Counted, not run."""
    from dataclasses import asdict

    from lr_ray.planning import GPUS, SHARE_OF_PEAK, job_cost, plan_on

    loaded = read_config(config, overrides)
    adapters, classes = num_adapters or loaded.tuning.num_adapters, num_classes or loaded.tuning.n_way
    cost = job_cost(loaded, num_classes=classes)
    plans = [plan_on(gpu, cost, num_adapters=adapters) for gpu in GPUS]
    if json:
        print_json({"cost": asdict(cost), "share_of_peak": SHARE_OF_PEAK, "gpus": [asdict(found) for found in plans]})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{loaded.name}: {adapters:,} adapters of {classes} classes")
    for column in ("GPU", "actors", "MiB each", "steps/s", "inversion", "training", "$"):
        table.add_column(column, justify="left" if column == "GPU" else "right")
    for found in plans:
        times = (_duration(found.inversion_h), _duration(found.training_h))
        money = "" if found.dollars is None else f"{found.dollars:,.2f}"
        table.add_row(found.gpu, str(found.actors), f"{found.actor_mib:,}", f"{found.steps_per_s:,.3g}", *times, money)
    Console().print(table)
    per_step = f"{cost.inversion.tflop:.3g} TFLOP and {cost.inversion.kept_mib:,.0f} MiB of activations"
    assumed = f"{100 * SHARE_OF_PEAK:.0f} % of the bf16 peak, 10 ms a step at least, on-demand prices"
    print(f"{per_step} a step, {cost.inversion_steps:,} steps an adapter. Counted, not measured; assumed: {assumed}.")


def _duration(hours: float | None) -> str:
    """Of one GPU."""
    if hours is None:
        return "does not fit"
    value, unit = next(
        ((hours * factor, unit) for factor, unit in ((1, "h"), (60, "min")) if hours * factor >= 1), (hours * 3600, "s")
    )
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"
