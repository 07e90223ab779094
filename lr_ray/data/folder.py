"""A folder of class folders."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from lr_ray.data.images import LabelledImages
from lr_ray.errors import DataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def load_folder(folder: Path) -> LabelledImages:
    """Each sub-folder is a class, each image file in it (not deeper) an image of that class.

    Raises:
        DataError: no sub-folder with images.
    """
    classes = {
        child.name: sorted(file for file in child.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        for child in sorted(folder.iterdir())
        if child.is_dir()
    }
    classes = {name: files for name, files in classes.items() if files}
    if not classes:
        raise DataError(f"data {folder}: no class folders with images in it; expected {folder}/CLASS/IMAGE.png")
    files = [file for members in classes.values() for file in members]

    def digest() -> str:
        total = hashlib.sha256()
        for file in files:
            total.update(f"{file.relative_to(folder)}|".encode() + hashlib.sha256(file.read_bytes()).digest())
        return total.hexdigest()

    return LabelledImages(
        name=f"{folder.parent.name}/{folder.name}" if folder.parent.name else folder.name,
        class_names=tuple(classes),
        labels=np.repeat(np.arange(len(classes)), [len(members) for members in classes.values()]),
        describe=lambda index: str(files[index]),
        open_image=lambda index: Image.open(files[index]),
        digest=digest,
    )
