"""`lr-ray bench`."""

from typing import TYPE_CHECKING, Annotated

import typer
from lr_ray.cli.options import Json, print_json, reporter

if TYPE_CHECKING:
    from lr_ray.bench.speed import Bench

    from lr_ray.vit.backbone import BackboneConfig

bench = typer.Typer(
    name="bench",
    help="Measure speed on this machine, every variant in one run, against a textbook implementation: into bench/results.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Option("--backbone", help="embedded, or a timm name, whose weights are random then.")]
Side = Annotated[int, typer.Option("--image-px", help="Side of the images.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="In which the variants take turns; the median counts.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Of torch.", show_default="all processors")]


@bench.command()
def inversion(
    backbone: Name = "embedded",
    image_px: Side = 70,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images optimised together.")] = 40,
    threads: Threads = None,
    rounds: Rounds = 5,
    schedule_steps: Annotated[
        int, typer.Option("--schedule-steps", min=8, help="Of the whole sparse schedule, as one call.")
    ] = 24,
    compiled: Annotated[bool, typer.Option("--compile", help="Also through torch.compile, which takes a minute.")] = False,
    json: Json = False,
) -> None:
    """Steps of an inversion: dense, sparse, with and without the prior."""
    from lr_ray.bench.inversion import bench_inversion

    found = bench_inversion(
        _backbone(backbone, image_px),
        batch_size=batch_size,
        threads=_threads(threads),
        rounds=rounds,
        schedule_steps=schedule_steps,
        compiled=compiled,
        reporter=reporter(quiet=json),
    )
    _show(found, json)


@bench.command()
def training(
    backbone: Name = "embedded",
    image_px: Side = 224,
    threads: Threads = None,
    rounds: Rounds = 5,
    worker_steps: Annotated[
        int, typer.Option("--worker-steps", help="Also train so many steps by one worker and by two; 0: don't.")
    ] = 40,
    json: Json = False,
) -> None:
    """Steps of meta-training: dense and sparse; two workers against one."""
    from lr_ray.bench.training import bench_training

    found = bench_training(
        _backbone(backbone, image_px),
        threads=_threads(threads),
        rounds=rounds,
        worker_steps=worker_steps,
        reporter=reporter(quiet=json),
    )
    _show(found, json)


@bench.command(name="eval")
def evaluation(threads: Threads = None, json: Json = False) -> None:
    """Drawing 10,000 test episodes and scoring them from features computed once."""
    from lr_ray.bench.episodes import bench_episodes

    found = bench_episodes(threads=_threads(threads))
    if json:
        print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="{episodes:,} 5-way episodes".format(**found["settings"]))
    for name in found["rows"][0]:
        table.add_column(name)
    for row in found["rows"]:
        table.add_row(*map(str, row.values()))
    Console().print(table)


@bench.command()
def serve(
    image_px: Side = 70,
    threads: Threads = None,
    soak: Annotated[
        float, typer.Option("--soak", min=0, help="Also minutes of half that load, with replicas killed at random.")
    ] = 0,
    json: Json = False,
) -> None:
    """The service under load, on CIFAR-FS images: throughput, latency, start, memory, hostile uploads."""
    from lr_ray.errors import ConfigError

    try:
        from lr_ray.bench.serve import bench_serve, table
    except ModuleNotFoundError as error:
        needed = "`pip install 'lr-ray[serve,client]' psutil`"
        raise ConfigError(f"this bench needs a package that is not installed ({error}); {needed}") from error
    found = bench_serve(image_px=image_px, threads=_threads(threads), soak_min=soak, reporter=reporter(quiet=json))
    if json:
        print_json(found)
        return
    from rich.console import Console

    Console().print(table(found))


def _backbone(name: str, image_px: int) -> "BackboneConfig":
    from lr_ray.vit.backbone import BackboneConfig

    return BackboneConfig(name=name, image_px=image_px, pretrained=name == "embedded")


def _threads(given: int | None) -> int:
    import os

    return given or os.cpu_count() or 1


def _show(found: "Bench", json: bool) -> None:
    from rich.console import Console

    stored = found.store()
    if json:
        print_json(stored)
        return
    Console().print(found.table())
    for name, rows in found.others.items():
        for row in rows:
            print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
