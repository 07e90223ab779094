"""A Parquet file or folder in the Hugging Face Image convention."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lr_ray.data.images import LabelledImages
from lr_ray.errors import DataError

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")  # the second of each as in uoft-cs/cifar100


def load_parquet(path: Path) -> LabelledImages:
    """Columns `image` (struct of bytes and path) and `label` (integer, names in the schema's `huggingface` metadata; or text).

    CIFAR-100's `img` and `fine_label` are taken in their place.

    Raises:
        DataError: unreadable, or without these columns.
    """
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    try:
        image, label = _columns(pq.read_schema(files[0]).names)
        table = pa.concat_tables([pq.read_table(file, columns=[image, label], memory_map=True) for file in files])
        encoded = table.column(image).combine_chunks().field("bytes")
    except (OSError, pa.ArrowException, KeyError, AttributeError) as error:
        raise DataError(
            f"data {path}: not Parquet in the Hugging Face Image convention ({error}); "
            "expected columns image (struct of bytes and path) and label"
        ) from error
    if table.num_rows == 0 or encoded.null_count:
        raise DataError(
            f"data {path}: {table.num_rows} rows, {encoded.null_count} of them without image bytes; nothing to read"
        )
    raw_labels = table.column(label)
    if raw_labels.null_count:
        raise DataError(f"data {path}: {raw_labels.null_count} of {table.num_rows} rows have no label; remove them")
    if pa.types.is_integer(raw_labels.type):
        labels = raw_labels.to_numpy().astype(np.int64)
        names = _class_names(table.schema.metadata, label, int(labels.max()) + 1)
        present = np.unique(labels)
        if present[0] < 0 or present[-1] >= len(names):
            raise DataError(f"data {path}: labels {present[0]} to {present[-1]}, but {len(names)} class names; mend the labels")
        class_names, labels = tuple(names[int(c)] for c in present), np.searchsorted(present, labels)
    else:
        unique, labels = np.unique(raw_labels.to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
        class_names = tuple(str(name) for name in unique)

    def digest() -> str:
        total = hashlib.sha256()
        for file in files:
            total.update(hashlib.sha256(file.read_bytes()).digest())
        return total.hexdigest()

    return LabelledImages(
        name=f"{path.parent.name}/{path.stem}" if path.parent.name else path.stem,
        class_names=class_names,
        labels=labels,
        describe=lambda index: f"row {index} of {path}",
        open_image=lambda index: Image.open(io.BytesIO(encoded[index].as_py())),
        digest=digest,
    )


def _columns(names: Sequence[str]) -> tuple[str, str]:
    """Of image and label, those that are there; else the first, so that the error names it."""
    image, label = (next((n for n in known if n in names), known[0]) for known in (_IMAGE_COLUMNS, _LABEL_COLUMNS))
    return image, label


def _class_names(metadata: dict[bytes, bytes] | None, column: str, num_classes: int) -> list[str]:
    """From the Hugging Face features in the metadata, else the numbers themselves."""
    features: dict[str, Any] = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    label = features.get("info", {}).get("features", {}).get(column, {})
    names = label.get("names") or label.get("feature", {}).get("names")
    return [str(name) for name in names] if names else [str(index) for index in range(num_classes)]
