"""`lr-ray serve`."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from lr_ray.cli.options import Json, print_json
from typer.core import TyperGroup

if TYPE_CHECKING:
    from lr_ray.serving.config import ServingConfig

_START = "start"


class _StartIsMeant(TyperGroup):
    """`lr-ray serve META_LORA` is `lr-ray serve start META_LORA`; a folder called `key` is `./key`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """With the command that is meant."""
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [_START, *args]
        return super().parse_args(ctx, args)


serve = typer.Typer(
    name="serve",
    cls=_StartIsMeant,
    help="Few-shot classification as an HTTP service: serve META_LORA [META_LORA…].",
    no_args_is_help=True,
)
key = typer.Typer(name="key", help="API keys of the service.", no_args_is_help=True)
serve.add_typer(key)

Keys = Annotated[Path, typer.Option("--keys", help="File of the keys' hashes.")]
Name = Annotated[str, typer.Argument(help="Whose key it is: a-z, 0-9, _ and -.", show_default=False)]
_KEYS = Path("keys.json")


MetaLoras = Annotated[
    list[str],
    typer.Argument(
        help="Folders or URIs of meta-LoRAs that `lr-ray train` wrote, or NAME=PATH; the first is the default. All of one "
        "backbone and image size.",
        show_default=False,
    ),
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; another than this machine's needs --keys.")]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of it.")]
Tasks = Annotated[str, typer.Option("--tasks", help="Folder or URI where tasks are kept.")]
KeysFile = Annotated[
    Path | None, typer.Option("--keys", help="File of API keys that `lr-ray serve key add` made.", show_default=False)
]
Replicas = Annotated[
    str, typer.Option("--replicas", help="Processes that hold the backbone: how many, or MIN:MAX, as the load needs.")
]
PrecisionOption = Annotated[
    str | None,
    typer.Option("--precision", help="Of the passes: fp32, bf16 or auto; default that of the run.", show_default=False),
]
_TASKS = "runs/serving/tasks"
_PACKAGES = ("fastapi", "prometheus_client", "python_multipart")
"""Of the extra `serve`."""


@serve.command(name=_START)
def start(
    meta_loras: MetaLoras,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    tasks: Tasks = _TASKS,
    keys: KeysFile = None,
    replicas: Replicas = "1",
    precision: PrecisionOption = None,
) -> None:
    """Serve until Ctrl-C: few-shot classification with meta-LoRAs, over HTTP, on Ray Serve; and a page to try it."""
    config = _config(meta_loras, host, port, tasks, keys, replicas, precision)
    from lr_ray.runtime.serving import serve_until_stopped

    for url in serve_until_stopped(config):
        print(f"{url}/v1, described in {url}/openapi.json; a page to try it: {url}; Ctrl-C ends it", flush=True)


@serve.command()
def build(
    meta_loras: MetaLoras,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("serve.yaml"),
    host: Host = "127.0.0.1",
    port: Port = 8000,
    tasks: Tasks = _TASKS,
    keys: KeysFile = None,
    replicas: Replicas = "1",
    precision: PrecisionOption = None,
) -> None:
    """Write a config for Ray's own `serve run` and `serve deploy`, which serve the same on a cluster."""
    config = _config(meta_loras, host, port, tasks, keys, replicas, precision)
    from lr_ray.runtime.serving import write_serve_config

    write_serve_config(config, output)
    print(f"wrote {output}; `serve run {output}` serves it here, `serve deploy {output}` on a cluster")


def _config(
    meta_loras: list[str],
    host: str,
    port: int,
    tasks: str,
    keys: Path | None,
    replicas: str,
    precision: Any,
) -> "ServingConfig":
    from lr_ray.errors import ConfigError
    from lr_ray.serving.config import ServingConfig
    from lr_ray.serving.models import name_meta_loras
    from lr_ray.storage.filesystem import absolute_path

    try:
        for package in _PACKAGES:
            import_module(package)
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs a package that is not installed ({error}); `pip install 'lr-ray[serve]'`") from error
    least, _, most = replicas.partition(":")
    counts = [int(text) if text.isascii() and text.isdigit() else 0 for text in ([least, most] if ":" in replicas else [least])]
    if not all(counts):
        raise ConfigError(f"--replicas {replicas!r}: give a number from 1, or MIN:MAX such as 1:4")
    if precision not in (None, "auto", "fp32", "bf16"):
        raise ConfigError(f"--precision {precision!r}: give fp32, bf16 or auto")
    return ServingConfig(
        meta_loras={name: absolute_path(path) for name, path in name_meta_loras(meta_loras).items()},
        tasks=absolute_path(tasks),
        keys=None if keys is None else keys.absolute(),
        host=host,
        port=port,
        replicas=counts[0],
        max_replicas=counts[1] if len(counts) == 2 else None,
        precision=precision,
    )


@key.command()
def add(
    name: Name,
    keys: Keys = _KEYS,
    requests_per_minute: Annotated[
        int | None, typer.Option("--requests-per-minute", min=1, help="Default 600.", show_default=False)
    ] = None,
    bytes_per_minute: Annotated[
        int | None, typer.Option("--bytes-per-minute", min=1, help="Of request bodies; default 256 MiB.", show_default=False)
    ] = None,
    tasks: Annotated[
        int | None, typer.Option("--max-tasks", min=0, help="Kept at once; default 100.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Make a key and show it, once; the file keeps its hash."""
    from lr_ray.serving.keys import add_key

    limits = {"requests_per_minute": requests_per_minute, "bytes_per_minute": bytes_per_minute, "tasks": tasks}
    secret = add_key(keys, name, **{limit: value for limit, value in limits.items() if value is not None})
    if json:
        print_json({"name": name, "key": secret})
    else:
        print(secret)


@key.command(name="ls")
def list_(keys: Keys = _KEYS, json: Json = False) -> None:
    """The keys' names and limits."""
    from lr_ray.serving.keys import read_keys

    rows = [found.model_dump(exclude={"sha256"}) for found in read_keys(keys)]
    if json:
        print_json(rows)
    for row in [] if json else rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))


@key.command()
def rm(name: Name, keys: Keys = _KEYS) -> None:
    """Remove a key; a service that runs refuses it at once. Its tasks stay, for the next key of that name."""
    from lr_ray.serving.keys import remove_key

    remove_key(keys, name)
    print(f"removed {name}")
