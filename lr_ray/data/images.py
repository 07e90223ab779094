"""Real labelled images, whatever they come from."""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lr_ray.errors import DataError
from lr_ray.section import ClassPatterns, Section, match_classes

MAX_PIXELS = 50_000_000
_UNREADABLE_EXIF = (KeyError, SyntaxError, TypeError, ValueError, ZeroDivisionError, struct.error)
"""What Pillow raises on EXIF that it cannot read, as it catches it itself where it looks for a JPEG's resolution."""


class DataConfig(Section):
    """Which images, of which classes."""

    source: str
    """`glyphs`, `digits`, a dataset's name and split (`cub/test`; all in docs/datasets.md), a Parquet file or folder in the
    Hugging Face Image convention, hf://datasets/OWNER/NAME with such files, or a folder of class folders."""
    root: str | None = None
    """Folder (or hf:// address of Parquet) of the dataset that `source` names; default its place in $LR_RAY_DATA."""
    classes: ClassPatterns | None = None
    """Class names, patterns (`latin/*`) or ranges of positions (`0:30`); default all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledImages:
    """Images with labels; an image is opened when it is asked for.

    Attributes:
        name: what a person calls the data, classes included if they are a selection.
        class_names: C names.
        labels: (M,) in [0, C).
        describe: position of an image → where it came from, for messages.
        open_image: position → the image.
        digest: → SHA-256 of everything that determines the images and labels.
    """

    name: str
    class_names: tuple[str, ...]
    labels: np.ndarray
    describe: Callable[[int], str]
    open_image: Callable[[int], Image.Image]
    digest: Callable[[], str]

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: Sequence[int] | np.ndarray, image_px: int) -> Tensor:
        """(n, 3, image_px, image_px) uint8: RGB, turned as EXIF says, short side resized (bicubic), centre cropped.

        Raises:
            DataError: an image that does not decode, or is too large to be one.
        """

        return read_pixels((int(i) for i in indices), image_px, open_image=self.open_image, describe=self.describe)

    def select(self, patterns: Sequence[str] | None) -> "LabelledImages":
        """The images of the classes that match, labels renumbered in the classes' own order.

        Raises:
            DataError: a pattern that matches no class.
        """
        if patterns is None:
            return self
        matched: set[int] = set()
        for pattern in patterns:
            matched |= (found := match_classes(self.class_names, pattern))
            if not found:
                some = ", ".join(self.class_names[:8])
                raise DataError(
                    f"classes: {pattern!r} matches none of the {len(self.class_names)} classes of {self.name} ({some}, …)"
                )
        chosen = sorted(matched)
        positions = np.flatnonzero(np.isin(self.labels, chosen))
        return LabelledImages(
            name=f"{self.name}[{','.join(patterns)}]",
            class_names=tuple(self.class_names[index] for index in chosen),
            labels=np.searchsorted(chosen, self.labels[positions]),
            describe=lambda index: self.describe(int(positions[index])),
            open_image=lambda index: self.open_image(int(positions[index])),
            digest=lambda: f"{self.digest()}[{','.join(map(str, chosen))}]",
        )


@contextmanager
def readable(file: Path | str) -> Iterator[None]:
    """What cannot be read inside is said of the file.

    Raises:
        DataError: see there.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"data {file}: {error.strerror or error}; mend, replace or remove it") from error


def read_pixels(
    indices: Iterable[int], image_px: int, *, open_image: Callable[[int], Image.Image], describe: Callable[[int], str]
) -> Tensor:
    """(n, 3, image_px, image_px) uint8: RGB, turned as EXIF says, short side resized (bicubic), centre cropped.

    Args:
        indices: n of them, at least one.
        open_image: index → the image.
        describe: index → where it came from, for messages.

    Raises:
        DataError: an image that does not decode, or is too large or too small to be one.
    """

    def load(index: int) -> Tensor:
        try:
            image = open_image(index)
            if not 0 < image.width * image.height <= MAX_PIXELS:
                raise DataError(
                    f"image {describe(index)} has {image.width}×{image.height} pixels; at most {MAX_PIXELS} are allowed, "
                    "and at least one: replace or remove it"
                )
            if max(image.size) / min(image.size) * image_px**2 > MAX_PIXELS:
                raise DataError(
                    f"image {describe(index)} is a strip of {image.width}×{image.height} pixels, too large once its short side "
                    f"has {image_px}: replace or remove it"
                )
            return square_pixels(image, image_px)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"image {describe(index)} does not decode ({type(error).__name__}: {error}); replace or remove it"
            ) from error

    with ThreadPoolExecutor(max_workers=2) as pool:
        return torch.stack(list(pool.map(load, indices)))


def square_pixels(image: Image.Image, image_px: int) -> Tensor:
    """(3, image_px, image_px) uint8: RGB, turned as EXIF says, short side resized (bicubic), centre cropped."""
    return torch.from_numpy(np.array(fit_square(upright(image), image_px))).permute(2, 0, 1)


def upright(image: Image.Image) -> Image.Image:
    """A copy in RGB, what is transparent on white, turned as its EXIF orientation says; EXIF that cannot be read says
    nothing, as in a browser."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        copied = Image.new("RGB", layer.size, "white")
        copied.paste(layer, mask=layer.getchannel("A"))
        copied.info = layer.info
    else:
        copied = image.convert("RGB")
    with suppress(*_UNREADABLE_EXIF):
        ImageOps.exif_transpose(copied, in_place=True)
    return copied


def fit_square(image: Image.Image, side_px: int) -> Image.Image:
    """Short side to `side_px` (bicubic, antialiased), then the central square."""
    width, height = image.size
    scale = side_px / min(width, height)
    resized = image.resize((max(side_px, round(width * scale)), max(side_px, round(height * scale))), Image.Resampling.BICUBIC)
    left, top = (resized.width - side_px) // 2, (resized.height - side_px) // 2
    return resized.crop((left, top, left + side_px, top + side_px))
