"""From a dataset's name to its images."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lr_ray.data.datasets.catalogue import DATASETS, WITHOUT_CLASSES, Dataset
from lr_ray.data.datasets.hub import HUB, classes_of, fetch
from lr_ray.data.datasets.items import Keep
from lr_ray.data.datasets.splits import class_lists, entry_of
from lr_ray.data.images import LabelledImages
from lr_ray.errors import DataError, did_you_mean

ALL = "all"
ROOT_VARIABLE = "LR_RAY_DATA"
_PARQUET = ("*.parquet", "*/*.parquet", "*/*/*.parquet")  # no deeper: the folder may be a large tree of something else
_FAMILIES = {name.partition("/")[0] for name in DATASETS}


def names_dataset(source: str) -> bool:
    """Whether `source` is a dataset's name, known or misspelt after its first part, rather than a path that exists."""
    return source.partition("/")[0] in _FAMILIES and not Path(source).exists()


def splits_of(dataset: Dataset) -> tuple[str, ...]:
    """Those that may stand after the dataset's name; `all` is the default."""
    return (*(class_lists(dataset.class_list) if dataset.class_list else ()), *dataset.parts, ALL)


def find(source: str) -> tuple[str, str]:
    """NAME or NAME/SPLIT → (name, split).

    Raises:
        DataError: no such dataset, or no such split of it.
    """
    name, split = _parted(source)
    if name in WITHOUT_CLASSES:
        raise DataError(f"data {source}: {WITHOUT_CLASSES[name]}; only datasets of classes are read")
    if name not in DATASETS:
        raise DataError(f"data {source!r}: no such dataset; {did_you_mean(source, DATASETS)}known: {', '.join(DATASETS)}")
    allowed = splits_of(DATASETS[name])
    if split not in allowed:
        only = "" if len(allowed) > 1 else "; the literature splits its classes in no one way: choose them with `classes`"
        raise DataError(f"data {source}: no split {split!r} of {name}; allowed: {', '.join(allowed)}{only}")
    return name, split


def _parted(source: str) -> tuple[str, str]:
    head, _, tail = source.rpartition("/")
    known = DATASETS.keys() | WITHOUT_CLASSES.keys()
    return (head, tail) if source not in known and head in known else (source, ALL)


def default_root(source: str) -> str | None:
    """The folder of the dataset in $LR_RAY_DATA; None if the variable isn't set or the dataset isn't known."""
    name, variable = _parted(source)[0], os.environ.get(ROOT_VARIABLE)
    return os.path.join(variable, DATASETS[name].home or name) if variable and name in DATASETS else None


def load_dataset(source: str, root: str | None = None) -> LabelledImages:
    """The images of NAME or NAME/SPLIT.

    Args:
        source: the name, `cub/test`.
        root: folder with the dataset as its authors publish it or as Parquet, or the address of the latter on the hub;
            default its place in $LR_RAY_DATA.

    Raises:
        DataError: no such dataset or split, not there, not whole, or not as its authors publish it.
    """
    name, split = find(source)
    dataset, root = DATASETS[name], root or default_root(source)
    if root is None:
        raise DataError(
            f"data {source}: where? download {dataset.obtain}; unpack it and set data.SECTION.root to its folder, or "
            f"{ROOT_VARIABLE} to the folder that holds {dataset.home or name}/"
        )
    entries = frozenset(class_lists(dataset.class_list).get(split, ()) if dataset.class_list else ())

    def keep(class_name: str) -> bool:
        return not entries or entry_of(class_name, entries) is not None

    data = _reader(source, dataset, root)(split, keep)
    found = {entry_of(class_name, entries) for class_name in data.class_names}
    if missing := sorted(entries - found):
        some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise DataError(
            f"data {source}: {root} lacks {len(missing)} of its {len(entries)} classes ({some}); download {dataset.obtain}"
        )
    return replace(data, name=source)


def _reader(source: str, dataset: Dataset, root: str) -> Callable[[str, Keep], LabelledImages]:
    """What reads `root`, by the layout found there."""
    if root.startswith(HUB):
        return _parquet_reader(source, dataset, fetch(root))
    folder = Path(root.removeprefix("file://")).expanduser()
    for layout in dataset.layouts:
        for place in (folder / part for part in layout.folders):
            if all(any(place.glob(need)) for need in layout.needs):
                return lambda split, keep: layout.load(place, split, keep)
    if files := sorted(file for pattern in _PARQUET for file in folder.glob(pattern)):
        return _parquet_reader(source, dataset, files)
    raise DataError(
        f"data {source}: {_absence(dataset, folder)}; download {dataset.obtain}, and unpack it there, or set data.SECTION.root"
    )


def _parquet_reader(source: str, dataset: Dataset, files: list[Path]) -> Callable[[str, Keep], LabelledImages]:
    def read(split: str, keep: Keep) -> LabelledImages:
        if split in dataset.parts:
            raise DataError(
                f"data {source}: which images are {split!r} is told by the authors' files, not by Parquet; "
                f"download {dataset.obtain}, or leave the split out"
            )
        return classes_of(files, keep, dataset.aliases)

    return read


def _absence(dataset: Dataset, folder: Path) -> str:
    if not folder.is_dir():
        return f"no folder {folder}"
    needed = " nor ".join(dict.fromkeys(" with ".join(layout.needs) for layout in dataset.layouts))
    return f"{folder} has no {needed}"
