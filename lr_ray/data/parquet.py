"""A Parquet file or folder in the Hugging Face Image convention."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from pydantic import BaseModel, ValidationError

from lr_ray.data.images import LabelledImages, readable
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
        encoded = pc.struct_field(table.column(image), "bytes")
        features = _features(table.schema.metadata)
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
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
        names = _class_names(features, label, int(labels.max()) + 1)
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
            with readable(file):
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


def _features(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """Hugging Face's description of the columns, empty where there is none.

    Raises:
        ValueError: it is not as Hugging Face writes it.
    """
    try:
        return _Described.model_validate_json((metadata or {}).get(b"huggingface", b"{}")).info.features
    except ValidationError as error:
        raise ValueError("its metadata `huggingface` is not as that writes it") from error


class _Info(BaseModel):
    features: dict[str, Any] = {}


class _Described(BaseModel):
    info: _Info = _Info()


def _class_names(features: dict[str, Any], column: str, num_classes: int) -> list[str]:
    """Of the column's feature, else the numbers themselves."""
    label = features.get(column)
    if isinstance(label, dict) and isinstance(inner := label.get("feature"), dict):
        label = label if label.get("names") else inner
    names = label.get("names") if isinstance(label, dict) else None
    return [str(name) for name in names] if isinstance(names, list) and names else [str(index) for index in range(num_classes)]
