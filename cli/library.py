"""`lr-ray library`: adapters as they come, in one place."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from lr_ray.cli.options import Config, Json, Overrides, print_json, read_config, reporter

if TYPE_CHECKING:
    from lr_ray.library.index import Entry

library = typer.Typer(
    name="library",
    help="A library of adapters as their authors saved them: take in, list, look at, check, remove.",
    no_args_is_help=True,
)

Library = Annotated[str, typer.Argument(metavar="LIBRARY", help="Folder or URI of the library.", show_default=False)]
AdapterId = Annotated[str, typer.Argument(metavar="ID", help="An adapter's id, or how it begins.", show_default=False)]


@library.command()
def add(
    where: Library,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="A PEFT folder or a folder of them, a .safetensors file, a .tar, .tar.gz or .zip of those, s3://…, "
            "hf://OWNER/NAME, or a .txt list of those.",
            show_default=False,
        ),
    ],
    config: Config,
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Take adapters of the config's backbone in, each after its checks. Those that are there stay; a rerun changes nothing.

    Adapters that are not taken are listed with the reason, and the exit code is 2.
    """
    experiment = read_config(config, overrides)
    from dataclasses import asdict

    from lr_ray.library.add import add_sources

    shown = reporter(quiet=json)
    added = add_sources(where, sources, experiment.backbone, say=shown.say)
    if json:
        print_json(asdict(added))
    else:
        print(f"{len(added.taken)} taken, {len(added.present)} there already, {len(added.refused)} refused")
        if added.taken or added.present:
            print(f"recycle them with: --adapters {added.root}")
        for why in added.refused:
            print(f"lr-ray: refused: {why}", file=sys.stderr)
    if added.refused:
        raise typer.Exit(2)


@library.command(name="ls")
def list_(where: Library, json: Json = False) -> None:
    """What the library holds, group by group: a group is a backbone at an image size, and what --adapters takes."""
    from dataclasses import asdict

    from lr_ray.library.index import list_entries

    entries = list_entries(where)
    if json:
        print_json([asdict(entry) for entry in entries])
        return
    from rich.console import Console

    console = Console(highlight=False)
    for group in dict.fromkeys(entry.group for entry in entries):
        console.print(_table([entry for entry in entries if entry.group == group], f"{where.rstrip('/')}/{group}"))
    if not entries:
        print(f"{where} holds no adapters; `lr-ray library add` takes them in")


@library.command()
def show(where: Library, adapter_id: AdapterId, json: Json = False) -> None:
    """All that is known of an adapter."""
    from dataclasses import asdict

    from lr_ray.library.index import checks_of, find_entry

    entry = find_entry(where, adapter_id)
    checks = checks_of(where, entry)
    if json:
        print_json({**asdict(entry), "checks": checks})
        return
    for name, value in asdict(entry).items():
        print(f"{name}: {', '.join(map(str, value)) if isinstance(value, tuple) else value}")
    for found in checks:
        value = f" {found['value']:.4g}" if "value" in found else ""
        print(f"{found['verdict']}: {found['name']}{value}{': ' + found['says'] if 'says' in found else ''}")


@library.command()
def check(
    where: Library,
    adapter_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Adapters to check; default all.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Read the adapters again and repeat every check on them; the exit code is 1 if one is bad."""
    from lr_ray.errors import AdapterError
    from lr_ray.library.add import check_library
    from lr_ray.library.checks import as_rows, failure_of
    from lr_ray.library.index import find_entry, list_entries

    chosen = [find_entry(where, name) for name in adapter_ids] if adapter_ids else list_entries(where)
    if not chosen:
        raise AdapterError(f"library {where}: it holds no adapters to check; `lr-ray library add` takes them in")
    rows, bad = [], 0
    with reporter(quiet=json).track("check", len(chosen)) as advance:
        for found in check_library(where, only=chosen):
            rows.append({"adapter_id": found.entry.adapter_id, "group": found.entry.group, "checks": as_rows(found.checks)})
            bad += bool(why := failure_of(found.checks))
            advance(f"{found.entry.adapter_id}: {why or 'good'}")
            if why and not json:
                print(f"lr-ray: bad: {found.entry.name}: {why}", file=sys.stderr)
    if json:
        print_json(rows)
    else:
        print(f"{len(rows) - bad} good, {bad} bad")
    if bad:
        raise typer.Exit(1)


@library.command()
def rm(
    where: Library,
    adapter_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids, or how they begin.", show_default=False)],
) -> None:
    """Remove adapters."""
    from lr_ray.library.index import find_entry, remove_entry

    for entry in dict.fromkeys(find_entry(where, name) for name in adapter_ids):
        remove_entry(where, entry)
        print(f"removed {entry.name}")


@library.command()
def sample(
    to: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder to write, which `library add` takes.", show_default=False)
    ],
    config: Config,
    overrides: Overrides = None,
    num_damaged: Annotated[int, typer.Option("--num-damaged", min=0, help="How many of them nobody should take.")] = 0,
    json: Json = False,
) -> None:
    """A market to play with: tune adapters on the config's real images and save them as strangers would have shared them.

    As many as `tuning.num_adapters`, of ranks 2, 4, 8 and 16 in turn, in five formats.
    """
    experiment = read_config(config, overrides)
    from lr_ray.runtime.market import make_market

    written = make_market(str(to), experiment, reporter(quiet=json), num_damaged=num_damaged)
    if json:
        print_json(written)
    else:
        print(f"{len(written)} adapters in {to}; take them in with: lr-ray library add LIBRARY {to} -c {config}")


def _table(entries: "Sequence[Entry]", title: str) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"{title}: {len(entries):,} adapters"), title_justify="left")
    for column in ("id", "format", "rank", "targets", "classes", "licence", "notes"):
        table.add_column(column, justify="right" if column == "classes" else "left", overflow="fold")
    for entry in entries:
        ranks, targets = ", ".join(map(str, entry.ranks)), ", ".join(entry.targets)
        texts = (entry.adapter_id, entry.format, ranks, targets, str(entry.num_classes), entry.license, "; ".join(entry.notes))
        table.add_row(*map(escape, texts))
    return table
