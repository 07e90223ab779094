"""The `lr-ray` command. Heavy libraries are imported by the commands that need them, so that help is instant."""

import sys

import typer
from lr_ray.cli.ablate import ablate
from lr_ray.cli.bench import bench
from lr_ray.cli.classify import classify
from lr_ray.cli.cluster import cluster
from lr_ray.cli.demo import demo
from lr_ray.cli.evaluate import evaluate
from lr_ray.cli.export import export
from lr_ray.cli.fetch import fetch
from lr_ray.cli.invert import invert
from lr_ray.cli.library import library
from lr_ray.cli.plan import plan
from lr_ray.cli.push import push
from lr_ray.cli.report import report
from lr_ray.cli.run import run
from lr_ray.cli.serve import serve
from lr_ray.cli.train import train
from lr_ray.cli.tune import tune

app = typer.Typer(
    name="lr-ray",
    help="Recycle LoRAs: from many adapters of one Vision Transformer to a backbone that classifies new few-shot tasks "
    "without fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(run)
app.command()(demo)
app.command()(tune)
app.command()(invert)
app.command()(train)
app.command(name="eval")(evaluate)
app.command()(classify)
app.command()(export)
app.command()(push)
app.command()(report)
app.command()(ablate)
app.command()(plan)
app.command()(fetch)
app.add_typer(serve)
app.add_typer(library)
app.add_typer(bench)
app.add_typer(cluster)


def main() -> None:
    """Run; an `LrRayError` is one line on stderr and exit code 1, anything else keeps its traceback."""
    try:
        app()
    except Exception as error:
        from lr_ray.errors import LrRayError

        if not isinstance(error, LrRayError):
            raise
        print(f"lr-ray: {error}", file=sys.stderr)
        sys.exit(1)
