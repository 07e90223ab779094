"""What a library of adapters holds, read without its weights.

`LIBRARY/GROUP/ADAPTER/` holds an adapter in LR-Ray's normal form, under a name that derives from its content, and its
manifest. `LIBRARY/index.parquet` only spares reading 10,000 manifests: what it lacks is read from them, and what is gone
leaves it.
"""

import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lr_ray.errors import AdapterError, StorageError
from lr_ray.storage.filesystem import delete, join, list_files, read_if_there, read_many
from lr_ray.storage.manifest import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, read_manifest
from lr_ray.storage.parquet import write_parquet

SKETCH = "sketch"
_INDEX_NAME = "index.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What is known of an adapter of a library without reading its weights.

    Attributes:
        group: of its backbone and image size.
        tensors_digest: of its weights, classes and how it sees images.
        source, source_digest: where it came from, and SHA-256 of the weights' file that was there.
        format: how it was saved there.
        ranks: of its low-rank products, each once.
        targets: what it changes in the blocks (q, k, v, proj, fc1, fc2, a parameter's name), and other modules' names.
        num_classes: 0 of one without a head.
        notes: checks that found something to say, and what was left out or assumed.
    """

    adapter_id: str
    group: str
    tensors_digest: str
    source: str
    source_digest: str
    format: str
    base_model: str
    backbone: str
    backbone_digest: str
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    num_classes: int
    license: str
    notes: tuple[str, ...]
    num_bytes: int

    @property
    def name(self) -> str:
        """Of its folder in the library."""
        return f"{self.group}/{self.adapter_id}"


_COLUMNS = [field.name for field in fields(Entry)]


def list_entries(library: str) -> list[Entry]:
    """All adapters, in the order of their names.

    Raises:
        StorageError: unreadable, or a manifest is damaged.
    """
    return [
        Entry(**{**row, **{name: tuple(row[name]) for name in ("ranks", "targets", "notes")}})
        for row in read_rows(library, _COLUMNS)
    ]


def find_entry(library: str, adapter_id: str) -> Entry:
    """The adapter of that id, or of the only one that begins so.

    Raises:
        AdapterError: there is none, or more than one.
    """
    if not adapter_id:
        raise AdapterError("an adapter's id, or how it begins, is needed, not ''; `lr-ray library ls` lists them")
    entries = list_entries(library)
    found = [e for e in entries if adapter_id in (e.adapter_id, e.name)] or [
        e for e in entries if e.adapter_id.startswith(adapter_id)
    ]
    if len(found) != 1:
        some = ", ".join(entry.name for entry in (found or entries)[:3])
        raise AdapterError(
            f"library {library}: {len(found) or 'no'} adapters are called {adapter_id!r}; it holds {len(entries)}"
            f"{', such as ' + some if some else ''}: `lr-ray library ls` lists them"
        )
    return found[0]


def remove_entry(library: str, entry: Entry) -> None:
    """Take an adapter out: first the config, without which it does not count.

    Raises:
        StorageError: it cannot be removed.
    """
    folder = join(library, entry.name)
    first = (CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME)
    for name in (*first, *(name for name in list_files(folder, suffix="") if name not in first)):
        delete(join(folder, name))


def checks_of(library: str, entry: Entry) -> list[dict[str, Any]]:
    """Rows of name, verdict, says and value: what was found when it was added."""
    found: list[dict[str, Any]] = (read_manifest(join(library, entry.name)) or {}).get("checks", [])
    return found


def read_rows(library: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Of the index, brought up to date, in the order of the adapters' names.

    Raises:
        StorageError: unreadable, or a manifest is damaged.
    """
    names = [file.removesuffix(f"/{CONFIG_NAME}") for file in list_files(library, suffix=f"/{CONFIG_NAME}")]
    names = [name for name in names if name.count("/") == 1]
    index = _read_index(library)
    known = {} if index is None else {f"{group}/{name}": row for row, (group, name) in enumerate(_keys(index))}
    if known.keys() == set(names) and index is not None:
        rows = index.select(list(columns)).to_pylist()
        return [rows[known[name]] for name in names]
    kept = {} if index is None else {name: index.slice(known[name], 1).to_pylist()[0] for name in names if name in known}
    new = [name for name in names if name not in kept]
    kept |= dict(zip(new, read_many(lambda name: _row_of(library, name), new), strict=True))
    rows = [kept[name] for name in names]
    if rows or index is not None:
        with suppress(StorageError):  # of a library that may only be read, the index is made anew each time
            write_parquet(join(library, _INDEX_NAME), pa.Table.from_pylist(rows, schema=_SCHEMA))
    return [{column: row[column] for column in columns} for row in rows]


def _keys(index: pa.Table) -> list[tuple[str, str]]:
    return list(zip(index["group"].to_pylist(), index["adapter_id"].to_pylist(), strict=True))


def _read_index(library: str) -> pa.Table | None:
    """None if it is not there, or not of this version."""
    content = read_if_there(join(library, _INDEX_NAME))
    if content is None:
        return None
    try:
        table = pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError):
        return None
    return table if table.schema.equals(_SCHEMA) else None


def _row_of(library: str, name: str) -> dict[str, Any]:
    """From an adapter's own manifest."""
    folder = join(library, name)
    manifest = read_manifest(folder)
    if manifest is None:
        raise StorageError(f"{folder} has no {MANIFEST_NAME}; delete the folder, and add its adapter again")
    try:
        group, adapter_id = name.split("/")
        notes = [f"{row['name']}: {row['says']}" for row in manifest["checks"] if row["verdict"] == "noted"]
        entry = Entry(
            adapter_id=adapter_id,
            group=group,
            num_classes=len(manifest["class_names"]),
            notes=(*notes, *manifest["notes"]),
            **{field: manifest[field] for field in _COLUMNS if field in manifest and field not in ("adapter_id", "notes")},
        )
    except (KeyError, TypeError) as error:
        raise StorageError(
            f"{join(folder, MANIFEST_NAME)} is not of a library ({error!r}); put folders of adapters into a library by `lr-ray "
            "library add`"
        ) from error
    return {**asdict(entry), SKETCH: manifest[SKETCH]}


_TYPES = {"ranks": pa.list_(pa.int32()), "targets": pa.list_(pa.string()), "notes": pa.list_(pa.string())}
_SCHEMA = pa.schema(
    [(name, _TYPES.get(name, pa.int64() if name.startswith("num_") else pa.string())) for name in _COLUMNS]
    + [(SKETCH, pa.list_(pa.float32()))]
)
