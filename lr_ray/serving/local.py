"""Few-shot classification of a folder by a folder, without a service."""

from pathlib import Path
from typing import Any

import torch

from lr_ray.data.folder import check_names, class_folders, is_image, load_folder
from lr_ray.data.images import LabelledImages
from lr_ray.errors import DataError
from lr_ray.model import Model
from lr_ray.serving.tasks import Prediction, Support
from lr_ray.storage.filesystem import join, list_files, read_bytes


def read_support(root: str) -> LabelledImages:
    """The labelled images in class folders below a folder or URI.

    Raises:
        DataError: absent, no images, or one class only.
        StorageError: not readable.
    """
    if "://" in root:
        names = list_files(root, suffix="")
        labelled = class_folders(root, names, lambda name: read_bytes(join(root, name)))
    else:
        folder = Path(root)
        _check_there(folder)
        if not folder.is_dir():
            raise DataError(f"{root} is a file; --support takes a folder of class folders with images")
        labelled = load_folder(folder)
    if len(labelled.class_names) < 2:
        raise DataError(f"{root} has one class only, {labelled.class_names[0]!r}; give images of two or more")
    return labelled


def embed_support(model: Model, labelled: LabelledImages, *, reject: bool) -> Support:
    """The classes of the labelled images.

    Raises:
        DataError: an image that does not decode; with `reject`, no class has two images that differ.
    """
    names = [labelled.class_names[label] for label in labelled.labels]
    image_px, batch = model.backbone.image_px, model.batch_size
    parts = [range(start, min(start + batch, len(labelled))) for start in range(0, len(labelled), batch)]
    task = Support.of(torch.cat([model.embed(labelled.pixels(part, image_px)) for part in parts]), names)
    if reject and task.threshold is None:
        raise DataError("--reject: every class of --support has one image; give two of some class, or leave --reject out")
    return task


def classify_folder(
    model: Model, support: str, query: str, *, temperature: float = 1.0, reject: bool = False
) -> tuple[Support, list[tuple[str, Prediction]]]:
    """What each query file is taken for, by its path below `query`, sorted.

    Args:
        support: folder or URI of class folders of images.
        query: local folder of images, in any depth, or one image.
        temperature: see `Support.classify`.
        reject: whether a threshold is needed.

    Raises:
        DataError: absent, no images, one class only, an image that does not decode, or with `reject` no threshold.
        StorageError: the support images are not readable.
    """
    labelled = read_support(support)
    if "://" in query:
        raise DataError(f"--query {query}: only a batch job reads images from there; add --output, or copy them here first")
    root = Path(query)
    _check_there(root)
    files = [root] if root.is_file() else [path for path in sorted(root.rglob("*")) if is_image(path.name)]
    if not files:
        raise DataError(f"{query}: no images in it; give a folder of images, or one image")
    names = [file.name if file == root else file.relative_to(root).as_posix() for file in files]
    check_names(query, names)
    task = embed_support(model, labelled, reject=reject)
    predictions = task.classify(model.embed(files), temperature=temperature)
    return task, list(zip(names, predictions, strict=True))


def answer_row(file: str, prediction: Prediction, *, reject: bool) -> dict[str, Any]:
    """What is told of a query: file, class (with `reject` None for none of these), probability, distance, none_of_these."""
    return {
        "file": file,
        "class": None if reject and prediction.rejected else prediction.ranked[0],
        "probability": prediction.probabilities[0],
        "distance": prediction.distances[0],
        "none_of_these": prediction.rejected,
    }


def _check_there(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give images")
