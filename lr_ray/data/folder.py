"""A folder of class folders."""

import hashlib
import io
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from lr_ray.data.images import LabelledImages, readable
from lr_ray.errors import DataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def is_image(name: str) -> bool:
    """By the end of its name."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def check_names(root: str, names: Iterable[str]) -> None:
    """Raise where a name could not be written down.

    Raises:
        DataError: it is not UTF-8.
    """
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{root}: the file name {name!r} is not UTF-8; rename it") from error


def load_folder(folder: Path) -> LabelledImages:
    """Each sub-folder is a class, each image file in it (not deeper) an image of that class.

    Raises:
        DataError: no sub-folder with images, or one with images in its own sub-folders alone.
    """
    with readable(folder):
        files = [file for child in folder.iterdir() if child.is_dir() for file in _files_of(child)]
    names = [file.relative_to(folder).as_posix() for file in files]
    return class_folders(str(folder), names, lambda name: (folder / name).read_bytes())


def _files_of(class_folder: Path) -> list[Path]:
    """Its own; of all depths where none of its own is an image."""
    files = list(class_folder.iterdir())
    return files if any(is_image(file.name) for file in files) else list(class_folder.rglob("*"))


def class_folders(root: str, names: Iterable[str], read: Callable[[str], bytes]) -> LabelledImages:
    """As `load_folder`, of a folder that may be anywhere.

    Args:
        root: the folder.
        names: of its files, relative to it; those that are deeper than CLASS/IMAGE are left out.
        read: name → content.

    Raises:
        DataError: none is CLASS/IMAGE, a CLASS has deeper images alone, or a name is not UTF-8.
    """
    parts = [tuple(name.split("/")) for name in names if is_image(name)]
    members = sorted(found for found in parts if len(found) == 2)
    if not members:
        raise DataError(f"data {root}: no class folders with images in it; expected {root}/CLASS/IMAGE.png")
    found_classes = {found[0] for found in members}
    if deep := sorted(found for found in parts if len(found) > 2 and found[0] not in found_classes):
        raise DataError(
            f"data {root}: the class folder {deep[0][0]!r} has no images of its own, only deeper ones such as "
            f"{'/'.join(deep[0])}; move them up to {deep[0][0]}/, or take that folder out of {root}"
        )
    files = ["/".join(found) for found in members]
    check_names(root, files)
    class_names, labels = np.unique([found[0] for found in members], return_inverse=True)

    def digest() -> str:
        total = hashlib.sha256()
        for file in files:
            with readable(f"{root}/{file}"):
                total.update(f"{file}|".encode() + hashlib.sha256(read(file)).digest())
        return total.hexdigest()

    return LabelledImages(
        name="/".join(part for part in PurePosixPath(root).parts[-2:] if part != "/"),
        class_names=tuple(str(name) for name in class_names),
        labels=labels,
        describe=lambda index: f"{root}/{files[index]}",
        open_image=lambda index: Image.open(io.BytesIO(read(files[index]))),
        digest=digest,
    )
