"""Labelled image files, and boxes in them."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from lr_ray.data.images import MAX_PIXELS, LabelledImages, readable
from lr_ray.errors import DataError

Keep = Callable[[str], bool]
"""Class name → whether the split has it."""
Loader = Callable[[Path, str, Keep], LabelledImages]
"""(folder, split, classes to keep) → images."""


class Item(NamedTuple):
    """One labelled image."""

    file: Path
    class_name: str
    box: tuple[float, float, float, float] | None = None
    """Left, upper, right, lower in pixels; default the whole file."""


def loader_of(read: Callable[[Path, str], Iterable[Item]]) -> Loader:
    """A loader from a reader, (folder, split) → items of all classes."""

    def load(folder: Path, split: str, keep: Keep) -> LabelledImages:
        return from_items(folder, [item for item in read(folder, split) if keep(item.class_name)])

    return load


def from_items(folder: Path, items: Iterable[Item]) -> LabelledImages:
    """Classes in the order of their names, a class's images in that of their paths.

    Raises:
        DataError: no items.
    """
    ordered = sorted(items, key=lambda item: (item.class_name, item.file, item.box or ()))
    if not ordered:
        raise DataError(f"data {folder}: no images of the classes asked for; unpack the whole dataset there")
    class_names, labels = np.unique([item.class_name for item in ordered], return_inverse=True)
    return LabelledImages(
        name=folder.name,
        class_names=tuple(str(name) for name in class_names),
        labels=labels.astype(np.int64),
        describe=lambda index: _describe(ordered[index]),
        open_image=lambda index: _open(ordered[index]),
        digest=lambda: _digest(folder, ordered),
    )


def inside(folder: Path, relative: str, listed_in: str) -> Path:
    """The path of a file that a list names.

    Raises:
        DataError: it leads out of `folder`.
    """
    path = PurePosixPath(relative)
    if not relative or path.is_absolute() or ".." in path.parts:
        raise DataError(
            f"data {folder}: {listed_in} lists {relative!r}; only paths within the folder are read: mend or replace it"
        )
    return folder / path


def _describe(item: Item) -> str:
    return str(item.file) if item.box is None else f"{item.file} ({', '.join(f'{side:.0f}' for side in item.box)})"


def _open(item: Item) -> Image.Image:
    image = Image.open(item.file)
    if item.box is None or image.width * image.height > MAX_PIXELS:  # the caller refuses what is too large
        return image
    limits = (image.width, image.height, image.width, image.height)
    left, upper, right, lower = (round(min(max(side, 0), limit)) for side, limit in zip(item.box, limits, strict=True))
    return image.crop((left, upper, right, lower))


def _digest(folder: Path, items: Sequence[Item]) -> str:
    total, contents = hashlib.sha256(), dict[Path, bytes]()
    for item in items:
        if item.file not in contents:
            with readable(item.file):
                contents[item.file] = hashlib.sha256(item.file.read_bytes()).digest()
        total.update(f"{item.class_name}|{item.file.relative_to(folder)}|{item.box}|".encode() + contents[item.file])
    return total.hexdigest()
