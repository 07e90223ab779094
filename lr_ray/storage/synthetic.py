"""Synthetic images at rest: Parquet files, each of one adapter or some of its classes; a row an image, a row group a class."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from lr_ray.errors import StorageError
from lr_ray.fewshot.episodes import ClassImages, ClassRef, ImagePool
from lr_ray.inversion.invert import SyntheticImages
from lr_ray.storage.filesystem import arrow_filesystem, join, list_files, read_bytes, read_many, storage_errors, write_bytes
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
        ("flipped_logits", pa.list_(pa.float16())),
        ("seed", pa.int64()),
        ("loss_ce", pa.float32()),
        ("loss_prior", pa.float32()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})},
)
_IDENTITY_KEY = b"lr_ray"
"""Of a file's metadata: the identity of the backbone that its images were made with, as JSON."""


def write_synthetic(
    uri: str, synthetic: SyntheticImages, spec: AdapterSpec, *, seed: int, identity: Mapping[str, str | int]
) -> None:
    """Commit images of one adapter as one Parquet file, lossless (PNG), in one atomic write.

    Args:
        identity: of the backbone that they were made with.
    """
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
            "flipped_logits": list(synthetic.flipped_logits.numpy().astype(np.float16)),
            "seed": [seed] * len(labels),
            "loss_ce": synthetic.loss_ce.tolist(),
            "loss_prior": synthetic.loss_prior.tolist(),
        },
        schema=_SCHEMA.with_metadata({**_SCHEMA.metadata, _IDENTITY_KEY: json.dumps(dict(identity))}),
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
    except (pa.ArrowException, OSError) as error:  # an OSError: pages that do not unpack
        raise StorageError(f"synthetic images {uri}: {error}; remove it and run `lr-ray invert` again") from error
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
    class_of, adapter_of, slot_of = [], [], []
    logits: list[Tensor] = []
    flipped: list[Tensor] = []
    for adapter, table in enumerate(tables):
        slots, first, own = np.unique(table["class_index"].to_numpy(), return_index=True, return_inverse=True)
        class_of.append(own + len(class_names))
        class_names += table["class_name"].take(first).to_pylist()
        adapter_of += [adapter] * len(slots)
        slot_of += slots.tolist()
        for found, name in ((logits, "teacher_logits"), (flipped, "flipped_logits")):
            rows = _logits(table, name)
            found.append(torch.nn.functional.pad(rows, (0, widest - rows.shape[1])))
    images = [image for table in tables for image in _decoded_images(f"of {root}", table)]
    if len(sizes := {tuple(image.shape) for image in images}) > 1:
        raise StorageError(f"synthetic images {root} are of different sizes {sorted(sizes)}; invert all at one image_px")
    return ImagePool(
        images=torch.stack(images),
        class_of=np.concatenate(class_of),
        class_names=tuple(class_names),
        adapter_of=np.array(adapter_of),
        slot_of=np.array(slot_of),
        teacher_logits=torch.cat(logits),
        flipped_logits=torch.cat(flipped),
        patch_order=torch.cat([_patch_order(table) for table in tables]),
    )


def _logits(table: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(np.stack(table[name].to_numpy()).astype(np.float32))


def _patch_order(table: pa.Table) -> Tensor:
    return torch.from_numpy(np.stack(table["patch_order"].to_numpy()).astype(np.int64))


def read_index(root: str, files: Sequence[str], identity: Mapping[str, str | int]) -> tuple[ClassRef, ...]:
    """The classes of some files of a synthetic set, from the files' footers: no image is read.

    In the order of `read_pool`'s.

    Args:
        identity: of the backbone that they should have been made with.

    Raises:
        StorageError: a file that is unreadable, not a synthetic set's, made with another backbone or image size, not of the
            adapter that its name says, or with a class that another file has too.
    """
    groups: dict[str, list[ClassRef]] = {}
    seen: dict[tuple[str, int], ClassRef] = {}
    for classes in read_many(lambda file: _classes_of(root, file, identity), files):
        for ref in classes:
            if (other := seen.setdefault((ref.adapter, ref.slot), ref)) is not ref:
                raise StorageError(
                    f"synthetic images {root}: {other.file} and {ref.file} both hold class {ref.name} of adapter "
                    f"{ref.adapter}; they are of different runs: remove those of one"
                )
        groups.setdefault(classes[0].adapter, []).extend(classes)
    return tuple(ref for group in groups.values() for ref in sorted(group, key=lambda ref: ref.slot))


def _classes_of(root: str, file: str, identity: Mapping[str, str | int]) -> list[ClassRef]:
    """From the statistics of each row group, which is a class."""
    uri = join(root, file)
    metadata = _footer(uri)
    found = json.loads((metadata.metadata or {}).get(_IDENTITY_KEY, b"{}"))
    for key, value in identity.items():
        if found.get(key) != value:
            raise StorageError(
                f"synthetic images {uri} were made with a backbone of {key} {_short(found.get(key))}, but the config's has "
                f"{_short(value)}; correct the config's backbone, or run `lr-ray invert` into another --synthetic"
            )
    columns = {metadata.row_group(0).column(i).path_in_schema: i for i in range(metadata.num_columns)}
    refs = []
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        adapter, slot, name = (row_group.column(columns[key]).statistics for key in ("adapter_id", "class_index", "class_name"))
        if slot is None or not slot.has_min_max or slot.min != slot.max:
            raise StorageError(f"synthetic images {uri}: row group {group} is not one class; remove the file and invert again")
        if adapter.min != adapter_id_of(file) or adapter.max != adapter.min:
            raise StorageError(
                f"synthetic images {uri} are of adapter {adapter.min}, not of {adapter_id_of(file)} as the file's name says; "
                "give it the name that `lr-ray invert` gave it, or remove it and invert again"
            )
        refs.append(
            ClassRef(
                file=file, row_group=group, adapter=adapter.min, slot=slot.min, name=name.min, num_images=row_group.num_rows
            )
        )
    return refs


def _footer(uri: str) -> pq.FileMetaData:
    filesystem, path = arrow_filesystem(uri)
    with _reading(uri):
        metadata = pq.read_metadata(path, filesystem=filesystem)
    if not metadata.num_rows or not metadata.schema.to_arrow_schema().equals(_SCHEMA):
        raise StorageError(f"{uri} is no file of synthetic images; remove it and run `lr-ray invert` again")
    return metadata


@contextmanager
def _reading(uri: str) -> Iterator[None]:
    """What goes wrong with a file inside becomes a StorageError."""
    try:
        with storage_errors("read", uri):
            yield
    except StorageError as error:
        if isinstance(error.__cause__, pa.ArrowInvalid):
            raise StorageError(f"synthetic images {uri}: {error.__cause__}; remove it and run `lr-ray invert` again") from error
        raise


def _short(value: str | int | None) -> str:
    return str(value)[:12]


def read_classes(root: str, refs: Sequence[ClassRef]) -> list[ClassImages]:
    """The images of some classes of one file, decoded; nothing else of the file is read.

    Raises:
        StorageError: unreadable, or not what the footer said.
    """
    uri = join(root, refs[0].file)
    filesystem, path = arrow_filesystem(uri)
    with _reading(uri), pq.ParquetFile(path, filesystem=filesystem) as file:
        tables = [file.read_row_group(ref.row_group) for ref in refs]
    return [_decoded(uri, ref, table) for ref, table in zip(refs, tables, strict=True)]


def read_first_classes(root: str, files: Sequence[str], *, most: int) -> list[list[ClassImages]]:
    """Of each adapter with images in these files the first classes, so many at most; raises what the two above do."""
    groups = [list(refs)[:most] for _, refs in groupby(read_index(root, files, {}), key=lambda ref: ref.adapter)]
    shelves = [[list(refs) for _, refs in groupby(group, key=lambda ref: ref.file)] for group in groups]
    return [[found for shelf in of_adapter for found in read_classes(root, shelf)] for of_adapter in shelves]


def _decoded(uri: str, ref: ClassRef, table: pa.Table) -> ClassImages:
    if table.num_rows != ref.num_images or table["class_index"][0].as_py() != ref.slot:
        raise StorageError(f"synthetic images {uri} changed while they were read; run the same command again")
    images = _decoded_images(uri, table)
    return ClassImages(
        name=ref.name,
        adapter=ref.adapter,
        slot=ref.slot,
        images=torch.stack(images),
        teacher_logits=_logits(table, "teacher_logits"),
        flipped_logits=_logits(table, "flipped_logits"),
        patch_order=_patch_order(table),
    )


def _decoded_images(whence: str, table: pa.Table) -> list[Tensor]:
    """(3, H, W) uint8 each."""
    contents = table["image"].combine_chunks().field("bytes")
    try:
        pixels = [np.array(Image.open(io.BytesIO(content.as_py()))) for content in contents]
    except (OSError, SyntaxError, ValueError) as error:
        adapter = table["adapter_id"][0].as_py()
        raise StorageError(
            f"synthetic images {whence}: one of adapter {adapter} is damaged ({error}); remove its files and run "
            "`lr-ray invert` again"
        ) from error
    return [torch.from_numpy(image).permute(2, 0, 1) for image in pixels]


def count_images(root: str, files: Sequence[str]) -> int:
    """Rows of some files of a synthetic set, by their footers.

    Raises:
        StorageError: unreadable, or not of a synthetic set.
    """
    return sum(found.num_rows for found in read_many(_footer, [join(root, file) for file in files]))
