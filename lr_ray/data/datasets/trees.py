"""Folders of class folders."""

from collections.abc import Callable, Iterator
from pathlib import Path

from lr_ray.data.datasets.items import Item, Loader, loader_of

_SUFFIXES = {".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".tif", ".tiff"}


def class_folders(*patterns: str) -> Loader:
    """Images of the folders that the patterns match, `images/*` for one; the folder's name is the class."""
    return _folders(patterns, lambda folder: folder.name)


def nested_class_folders(*patterns: str) -> Loader:
    """As `class_folders`, the class named after its folder and the one above, `Greek/character01`."""
    return _folders(patterns, lambda folder: f"{folder.parent.name}/{folder.name}")


def _folders(patterns: tuple[str, ...], class_name: Callable[[Path], str]) -> Loader:
    def read(folder: Path, _split: str) -> Iterator[Item]:
        for child in (child for pattern in patterns for child in folder.glob(pattern) if child.is_dir()):
            name = class_name(child)
            yield from (Item(file, name) for file in child.iterdir() if file.suffix.lower() in _SUFFIXES)

    return loader_of(read)
