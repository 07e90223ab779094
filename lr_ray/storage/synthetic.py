"""Synthetic images at rest: one Parquet file an adapter, a row an image, a row group a class."""

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
    """Commit the images of one adapter as one Parquet file, lossless (PNG), in one atomic write."""
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
    """Name of the file that holds the images of an adapter, made from inputs of that digest."""
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


def read_pool(root: str, files: Sequence[str]) -> ImagePool:
    """The images of some files of a synthetic set as one pool, classes numbered in the order of the files.

    Raises:
        StorageError: a file that is not a synthetic set's, or sets of different image sizes.
    """
    tables = []
    for file in files:
        try:
            table = pq.read_table(pa.BufferReader(read_bytes(join(root, file))), schema=_SCHEMA)
        except pa.ArrowException as error:
            raise StorageError(f"synthetic images {join(root, file)}: {error}; run `lr-ray invert` again") from error
        if not table.num_rows or any(column.null_count for column in table.columns):
            raise StorageError(f"{join(root, file)} is no file of synthetic images; remove it and run `lr-ray invert` again")
        tables.append(table)
    num_classes = [int(table["class_index"].to_numpy().max()) + 1 for table in tables]
    starts = np.concatenate([[0], np.cumsum(num_classes)]).astype(int)
    widest = max(num_classes)
    class_names = [""] * int(starts[-1])
    logits, class_of = [], []
    for table, start in zip(tables, starts, strict=False):
        indices = table["class_index"].to_numpy()
        class_of.append(indices + start)
        for index, name in zip(indices, table["class_name"].to_pylist(), strict=True):
            class_names[start + index] = name
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
        adapter_of=np.repeat(np.arange(len(tables)), num_classes),
        slot_of=np.concatenate([np.arange(count) for count in num_classes]),
        teacher_logits=torch.cat(logits),
        patch_order=torch.from_numpy(orders),
    )


def _decode(content: pa.BinaryScalar) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content.as_py())))).permute(2, 0, 1)


def count_images(root: str, files: Sequence[str]) -> int:
    """Rows of some files of a synthetic set."""
    return sum(pq.read_metadata(pa.BufferReader(read_bytes(join(root, file)))).num_rows for file in files)
