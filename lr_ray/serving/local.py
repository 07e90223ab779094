"""Few-shot classification of a folder by a folder, without a service."""

from pathlib import Path

from lr_ray.data.folder import IMAGE_SUFFIXES, load_folder
from lr_ray.errors import DataError
from lr_ray.model import Model
from lr_ray.serving.tasks import Prediction, Support


def classify_folder(
    model: Model, support: Path, query: Path, *, temperature: float = 1.0
) -> tuple[Support, list[tuple[str, Prediction]]]:
    """What each query file is taken for, by its path below `query`, sorted.

    Args:
        support: folder of class folders of images.
        query: folder of images, in any depth, or one image.
        temperature: see `Support.classify`.

    Raises:
        DataError: absent, no images, one class only, or an image that does not decode.
    """
    for folder in (support, query):
        if not folder.exists():
            raise DataError(f"{folder}: no such file or folder; give images")
    if not support.is_dir():
        raise DataError(f"{support} is a file; --support takes a folder of class folders with images")
    labelled = load_folder(support)
    if len(labelled.class_names) < 2:
        raise DataError(f"{support} has one class only, {labelled.class_names[0]!r}; give images of two or more")
    files = [query] if query.is_file() else [p for p in sorted(query.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise DataError(f"{query}: no images in it; give a folder of images, or one image")
    names = [labelled.class_names[label] for label in labelled.labels]
    task = Support.of(model.embed([labelled.describe(index) for index in range(len(labelled))]), names)
    predictions = task.classify(model.embed(files), temperature=temperature)
    shown = [file.name if file == query else file.relative_to(query).as_posix() for file in files]
    return task, list(zip(shown, predictions, strict=True))
