"""Classified images at rest: Parquet files, a row an image."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lr_ray.errors import StorageError
from lr_ray.storage.filesystem import arrow_filesystem, storage_errors
from lr_ray.storage.parquet import write_parquet

_SCHEMA = pa.schema(
    [
        ("file", pa.string()),
        ("class", pa.string()),
        ("probability", pa.float32()),
        ("distance", pa.float32()),
        ("none_of_these", pa.bool_()),
        ("error", pa.string()),
    ]
)


def write_classified(uri: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Commit rows as one Parquet file, in one atomic write; a column that a row lacks is null."""
    write_parquet(uri, pa.Table.from_pylist(list(rows), schema=_SCHEMA))


def count_errors(uri: str) -> int:
    """How many rows of a file have an error, by its footer.

    Raises:
        StorageError: unreadable, or no such file.
    """
    filesystem, path = arrow_filesystem(uri)
    try:
        with storage_errors("read", uri):
            metadata = pq.read_metadata(path, filesystem=filesystem)
    except StorageError as error:
        if isinstance(error.__cause__, pa.ArrowInvalid):
            raise StorageError(f"{uri} is damaged ({error.__cause__}); delete it and run again") from error
        raise
    if not metadata.schema.to_arrow_schema().equals(_SCHEMA):
        raise StorageError(f"{uri} holds no classified images; delete it and run again")
    column = _SCHEMA.get_field_index("error")
    groups = [metadata.row_group(index).column(column) for index in range(metadata.num_row_groups)]
    return sum(group.num_values - group.statistics.null_count for group in groups)
