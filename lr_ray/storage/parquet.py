"""Tables at rest. Apart from `filesystem`, which commands import that read no table."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from lr_ray.storage.filesystem import write_bytes


def write_parquet(uri: str, table: pa.Table) -> None:
    """Commit a table as `write_bytes` does."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes(uri, buffer.getvalue())
