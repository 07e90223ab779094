"""Options that the commands share, and how they become a config."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from lr_ray.config import ExperimentConfig
    from lr_ray.report.progress import Reporter

Config = Annotated[Path, typer.Option("--config", "-c", help="YAML file of the experiment.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a value: section.key=value. Repeatable.", show_default=False)
]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Folder or URI of everything written.")]
Adapters = Annotated[str | None, typer.Option("--adapters", help="Folder or URI of adapters in PEFT's format.")]
Synthetic = Annotated[str | None, typer.Option("--synthetic", help="Folder or URI of the synthetic images.")]
Data = Annotated[
    str | None,
    typer.Option("--data", help="Real images: glyphs, digits, a Parquet file or folder, or a folder of class folders."),
]
Classes = Annotated[
    str | None, typer.Option("--classes", help="Classes of --data: names, patterns or ranges, separated by commas.")
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        help="Run there, as a Ray job: a cluster-launcher YAML (cluster/aws.yaml), the address of a cluster's dashboard "
        "(http://HOST:8265), or auto (that of this machine).",
    ),
]
Up = Annotated[bool, typer.Option("--up", help="Bring up the cluster of that YAML, if it is not up.")]
Fast = Annotated[
    Literal["auto"] | None,
    typer.Option(
        "--fast",
        help="auto: try for a minute which batch size, precision and actors are fastest here; kept in OUTPUT/fast.json.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


def read_config(
    path: Path,
    overrides: list[str] | None,
    *,
    output: str | None = None,
    adapters: str | None = None,
    synthetic: str | None = None,
    data: tuple[str, str | None, str | None] | None = None,
) -> "ExperimentConfig":
    """The config with `--set` and the plain flags applied.

    Args:
        data: which section of `data` --data and --classes set, and their values.
    """
    from lr_ray.config import load_config

    plain: dict[str, Any] = {"output": output, "adapters": adapters, "synthetic": synthetic}
    if data is not None:
        section, source, classes = data
        if source is not None:  # other data: the classes selected for the config's own do not apply
            plain[f"data.{section}"] = {"source": source}
        plain[f"data.{section}.classes"] = classes
    flags = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in plain.items() if value is not None]
    return load_config(path, [*(overrides or []), *flags])


def hand_over(
    experiment: "ExperimentConfig", cluster: str | None, *words: str, up: bool, json: bool, reads: tuple[str, ...] = ()
) -> None:
    """With --cluster, run the command there and exit with its code; without, do nothing.

    Args:
        words: the command and its options; that of the config comes last, for its value follows.
        reads: the sections of `data` whose images the command reads.
    """
    from lr_ray.errors import ClusterError

    if cluster is None:
        if up:
            raise ClusterError("--up: no cluster to bring up; add --cluster with a YAML such as cluster/aws.yaml")
        return
    from lr_ray.runtime.jobs import CONFIG_NAME, submit_and_follow

    command = [*words, CONFIG_NAME, *(["--json"] if json else [])]
    raise typer.Exit(submit_and_follow(command, experiment, cluster, up=up, reads=reads, reporter=reporter(quiet=json)))


def reporter(*, quiet: bool) -> "Reporter":
    """What says how far the work is."""
    from lr_ray.report.progress import Reporter

    return Reporter(quiet=quiet)


def print_json(value: Any) -> None:
    """On stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
