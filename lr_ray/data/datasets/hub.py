"""Parquet datasets: of the Hugging Face hub, and in the place of a dataset's own layout."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lr_ray.data.datasets.items import Keep
from lr_ray.data.images import LabelledImages
from lr_ray.data.parquet import load_parquet
from lr_ray.errors import DataError

HUB = "hf://"
_ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/(convert|pr)/\w+|[^/@]+))?(/(?P<prefix>.+))?"
)


def fetch(address: str) -> list[Path]:
    """Download the Parquet files of hf://datasets/OWNER/NAME[@REVISION][/PREFIX] that the cache lacks.

    Raises:
        DataError: no such address, unreachable, or no Parquet there.
    """
    from huggingface_hub import snapshot_download  # a second to import, which no other dataset should pay for

    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise DataError(f"data {address!r}: no dataset of the hub; expected hf://datasets/OWNER/NAME[@REVISION][/PREFIX]")
    repo, revision, prefix = found["repo"], found["revision"], found["prefix"] or ""
    try:
        snapshot = Path(
            snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=[f"{prefix.rstrip('*')}*.parquet"])
        )
    except Exception as error:  # of the hub, of HTTP, of the cache: all say what failed
        raise DataError(
            f"data {address}: not fetched ({type(error).__name__}: {error}); see that the dataset exists, that this machine "
            "reaches huggingface.co, and that `hf auth login` was run if it is gated"
        ) from error
    files = sorted(file for file in snapshot.rglob("*.parquet") if _starts(file.relative_to(snapshot), prefix))
    if not files:
        raise DataError(f"data {address}: no Parquet files there; give a dataset of image and label columns in Parquet")
    return files


def _starts(file: Path, prefix: str) -> bool:
    return file.as_posix().startswith(prefix.rstrip("*"))


def load_hub(address: str) -> LabelledImages:
    """All classes of what `fetch` finds, by name.

    Raises:
        DataError: as `fetch`, or not in the Hugging Face Image convention.
    """
    return replace(classes_of(fetch(address), lambda _: True, {}), name=address.removeprefix(f"{HUB}datasets/"))


def classes_of(files: Sequence[Path], keep: Keep, aliases: Mapping[str, str]) -> LabelledImages:
    """The images of Parquet files whose class is kept; a class of the same name in several files is one.

    Args:
        files: at least one.
        keep: class name → whether it is kept.
        aliases: class name in the files → its name.

    Raises:
        DataError: not in the Hugging Face Image convention, or none of the classes.
    """
    named = [_renamed(load_parquet(file), aliases) for file in files]
    kept = [(data, [name for name in data.class_names if keep(name)]) for data in named]
    parts = [data.select(names) for data, names in kept if names]
    if not parts:
        raise DataError(f"data {files[0].parent}: no images of the classes asked for in its Parquet files; add the other files")
    return _joined(parts)


def _renamed(data: LabelledImages, aliases: Mapping[str, str]) -> LabelledImages:
    return replace(data, class_names=tuple(aliases.get(name, name) for name in data.class_names))


def _joined(parts: Sequence[LabelledImages]) -> LabelledImages:
    class_names = sorted({name for part in parts for name in part.class_names})
    number = {name: index for index, name in enumerate(class_names)}
    labels = np.concatenate([np.array([number[name] for name in part.class_names])[part.labels] for part in parts])
    starts = np.cumsum([0, *map(len, parts)])

    def position(index: int) -> tuple[LabelledImages, int]:
        part = int(np.searchsorted(starts, index, side="right")) - 1
        return parts[part], index - int(starts[part])

    def describe(index: int) -> str:
        part, row = position(index)
        return part.describe(row)

    return LabelledImages(
        name="+".join(part.name for part in parts),
        class_names=tuple(class_names),
        labels=labels,
        describe=describe,
        open_image=lambda index: (place := position(index))[0].open_image(place[1]),
        digest=lambda: hashlib.sha256("|".join(part.digest() for part in parts).encode()).hexdigest(),
    )
