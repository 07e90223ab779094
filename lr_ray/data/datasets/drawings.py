"""Quick, Draw!: a NumPy array of bitmaps a class."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from lr_ray.data.datasets.items import Keep
from lr_ray.data.images import LabelledImages
from lr_ray.errors import DataError

_SIDE_PX = 28
_PREFIX = "full_numpy_bitmap_"  # of files fetched by a browser from the bucket's page


def quick_draw(folder: Path, _split: str, keep: Keep) -> LabelledImages:
    """CLASS.npy of (N, 784) uint8, white strokes on black; read where they are needed, not into memory.

    Raises:
        DataError: another array, or none of the classes.
    """
    named = {file.stem.removeprefix(_PREFIX): file for file in folder.glob("*.npy")}
    files = {name: file for name, file in sorted(named.items()) if keep(name)}
    if not files:
        raise DataError(f"data {folder}: no .npy file of the classes asked for; put all 345 there")
    bitmaps = [_bitmaps(file) for file in files.values()]
    counts = [len(of_class) for of_class in bitmaps]
    starts, labels, names = np.cumsum([0, *counts]), np.repeat(np.arange(len(counts)), counts), tuple(files)

    def position(index: int) -> tuple[int, int]:
        return int(labels[index]), index - int(starts[labels[index]])

    def open_image(index: int) -> Image.Image:
        label, row = position(index)
        return Image.fromarray(bitmaps[label][row].reshape(_SIDE_PX, _SIDE_PX))

    def digest() -> str:
        total = hashlib.sha256()
        for name, file in files.items():
            with file.open("rb") as content:
                total.update(f"{name}|".encode() + hashlib.file_digest(content, "sha256").digest())
        return total.hexdigest()

    return LabelledImages(
        name=folder.name,
        class_names=names,
        labels=labels,
        describe=lambda index: f"row {position(index)[1]} of {files[names[labels[index]]]}",
        open_image=open_image,
        digest=digest,
    )


def _bitmaps(file: Path) -> np.ndarray:
    """(N, 784) uint8, mapped from the file."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"data {file}: no NumPy array ({error}); download it again") from error
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != _SIDE_PX**2:
        raise DataError(f"data {file}: not (N, {_SIDE_PX**2}) uint8 as in the folder numpy_bitmap; download it again")
    return array
