"""Synthetic images at rest: Parquet files, each of one adapter or some of its classes; a row an image, a row group a class."""

import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from lr_ray.errors import StorageError
from lr_ray.fewshot.episodes import ImagePool
from lr_ray.inversion.invert import SyntheticImages
from lr_ray.storage.filesystem import join, list_files, read_bytes, write_bytes
from lr_ray.vit.lora import AdapterSpec

_DIGEST_LENGTH = 12
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_SCHEMA = pa.schema(
    [
        ("adapter_id", pa.string()),
        ("class_index", pa.int32()),
        ("class_name", pa.string()),
        ("image", _IMAGE),
        ("patch_order", pa.list_(pa.uint16())),
        ("teacher_logits", pa.list_(pa.float16())),
        ("seed", pa.int64()),
        ("loss_ce", pa.float32()),
        ("loss_prior", pa.float32()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})},
)


def write_synthetic(uri: str, synthetic: SyntheticImages, spec: AdapterSpec, *, seed: int) -> None:
    """Commit images of one adapter as one Parquet file, lossless (PNG), in one atomic write."""
    labels = synthetic.labels.tolist()
    with ThreadPoolExecutor(max_workers=2) as pool:
        encoded = list(pool.map(_encode_png, synthetic.images))
    table = pa.table(
        {
            "adapter_id": [spec.adapter_id] * len(labels),
            "class_index": labels,
            "class_name": [spec.class_names[label] for label in labels],
            "image": [
                {"bytes": content, "path": f"{spec.adapter_id}-{label}-{row}.png"}
                for row, (label, content) in enumerate(zip(labels, encoded, strict=True))
            ],
            "patch_order": list(synthetic.patch_order.numpy().astype(np.uint16)),
            "teacher_logits": list(synthetic.teacher_logits.numpy().astype(np.float16)),
            "seed": [seed] * len(labels),
            "loss_ce": synthetic.loss_ce.tolist(),
            "loss_prior": synthetic.loss_prior.tolist(),
        },
        schema=_SCHEMA,
    )
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, table.schema) as writer:
        for label in dict.fromkeys(labels):
            writer.write_table(table.filter(pa.compute.field("class_index") == label))
    write_bytes(uri, buffer.getvalue())


def _encode_png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def synthetic_name(adapter_id: str, digest: str) -> str:
    """Name of the file that holds images of an adapter, made from inputs of that digest."""
    return f"{adapter_id}-{digest[:_DIGEST_LENGTH]}.parquet"


def adapter_id_of(file: str) -> str:
    """The adapter that a file of a synthetic set belongs to, by its name."""
    return file.rsplit("/", 1)[-1][: -len("-.parquet") - _DIGEST_LENGTH]


def list_synthetic(root: str) -> list[str]:
    """Names of the Parquet files of a synthetic set, sorted.

    Raises:
        StorageError: there are none.
    """
    files = list_files(root, suffix=".parquet")
    if not files:
        raise StorageError(f"synthetic images {root}: no Parquet files; run `lr-ray invert` first")
    return files


def by_adapter(files: Sequence[str]) -> list[tuple[str, ...]]:
    """Files of a synthetic set, those of one adapter together, in the order of its first."""
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(adapter_id_of(file), []).append(file)
    return [tuple(group) for group in groups.values()]


def read_rows(uri: str) -> pa.Table:
    """The rows of one file of a synthetic set.

    Raises:
        StorageError: unreadable, or not of a synthetic set.
    """
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(uri)), schema=_SCHEMA)
    except pa.ArrowException as error:
        raise StorageError(f"synthetic images {uri}: {error}; run `lr-ray invert` again") from error
    if not table.num_rows or any(column.null_count for column in table.columns):
        raise StorageError(f"{uri} is no file of synthetic images; remove it and run `lr-ray invert` again")
    return table


def _adapter_tables(root: str, files: Sequence[str]) -> list[pa.Table]:
    """A table an adapter, by class; the adapters in the order of their first files."""
    parts: dict[str, list[pa.Table]] = {}
    for file in files:
        table = read_rows(join(root, file))
        parts.setdefault(table["adapter_id"][0].as_py(), []).append(table)
    tables = []
    for found in parts.values():
        table = pa.concat_tables(found)
        order = np.argsort(table["class_index"].to_numpy(), kind="stable")
        tables.append(table.take(order).combine_chunks())
    return tables


def read_pool(root: str, files: Sequence[str]) -> ImagePool:
    """The images of some files of a synthetic set as one pool, classes numbered in the order of the files' adapters.

    Raises:
        StorageError: a file that is not a synthetic set's, or sets of different image sizes.
    """
    tables = _adapter_tables(root, files)
    widest = max(len(table["teacher_logits"][0]) for table in tables)
    class_names: list[str] = []
    class_of, adapter_of, slot_of, logits = [], [], [], []
    for adapter, table in enumerate(tables):
        slots, first, own = np.unique(table["class_index"].to_numpy(), return_index=True, return_inverse=True)
        class_of.append(own + len(class_names))
        class_names += table["class_name"].take(first).to_pylist()
        adapter_of += [adapter] * len(slots)
        slot_of += slots.tolist()
        rows = torch.from_numpy(np.stack(table["teacher_logits"].to_numpy()).astype(np.float32))
        logits.append(torch.nn.functional.pad(rows, (0, widest - rows.shape[1])))
    images = [_decode(content) for table in tables for content in table["image"].combine_chunks().field("bytes")]
    if len(sizes := {tuple(image.shape) for image in images}) > 1:
        raise StorageError(f"synthetic images {root} are of different sizes {sorted(sizes)}; invert all at one image_px")
    orders = np.concatenate([np.stack(table["patch_order"].to_numpy()) for table in tables]).astype(np.int64)
    return ImagePool(
        images=torch.stack(images),
        class_of=np.concatenate(class_of),
        class_names=tuple(class_names),
        adapter_of=np.array(adapter_of),
        slot_of=np.array(slot_of),
        teacher_logits=torch.cat(logits),
        patch_order=torch.from_numpy(orders),
    )


def _decode(content: pa.BinaryScalar) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content.as_py())))).permute(2, 0, 1)


def count_images(root: str, files: Sequence[str]) -> int:
    """Rows of some files of a synthetic set."""
    return sum(pq.read_metadata(pa.BufferReader(read_bytes(join(root, file)))).num_rows for file in files)
