"""A library of adapters: a folder or URI with a group for every backbone and image size, which is a run's `adapters`.

`LIBRARY/GROUP/ADAPTER/` holds an adapter in LR-Ray's normal form, under a name that derives from its content, and its
manifest; `LIBRARY/GROUP/group.json` the backbone. `LIBRARY/index.parquet` only spares reading 10,000 manifests: what it
lacks is read from them, and what is gone leaves it.
"""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from lr_ray.errors import AdapterError, StorageError
from lr_ray.library.checks import Check, as_rows, from_rows
from lr_ray.storage.adapters import CONFIG_NAME, WEIGHTS_NAME
from lr_ray.storage.filesystem import delete, join, list_files, read_bytes, read_if_there, read_many, write_bytes
from lr_ray.storage.manifest import MANIFEST_NAME, read_manifest
from lr_ray.vit.backbone import Backbone, BackboneConfig
from lr_ray.vit.lora import Adapter

GROUP_NAME = "group.json"
_INDEX_NAME = "index.parquet"
_SKETCH = "sketch"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What is known of an adapter of a library without reading its weights.

    Attributes:
        group: of its backbone and image size.
        source, source_digest: where it came from, and SHA-256 of the weights' file that was there.
        format: how it was saved there.
        ranks: of its low-rank products, each once.
        targets: kinds of timm modules that it changes.
        num_classes: 0 of one without a head.
        notes: checks that found something to say, and what was left out or assumed.
    """

    adapter_id: str
    group: str
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


def group_of(backbone: Backbone) -> str:
    """The name of the group of adapters that are tuned on this backbone at this image size."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", backbone.name)
    return f"{slug}-{backbone.image_px}px-{backbone.digest[:6]}"


def claim_group(library: str, backbone: Backbone, config: BackboneConfig) -> str:
    """The root of the backbone's group, with its config in it, from which `read_group` gives the backbone again."""
    root = join(library, group_of(backbone))
    content = json.dumps({"backbone": config.model_dump(mode="json"), "digest": backbone.digest}, indent=2).encode()
    if read_if_there(uri := join(root, GROUP_NAME)) != content:
        write_bytes(uri, content)
    return root


def read_group(library: str, group: str) -> BackboneConfig:
    """The backbone of a group.

    Raises:
        StorageError: unreadable or damaged.
    """
    uri = join(library, group, GROUP_NAME)
    try:
        return BackboneConfig.model_validate(json.loads(read_bytes(uri))["backbone"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise StorageError(f"{uri} is damaged ({error!r}); delete it, and add an adapter of that backbone again") from error


def facts_of(
    adapter: Adapter, checks: Sequence[Check], *, notes: Sequence[str], sketch: Sequence[float], **source: str
) -> dict[str, Any]:
    """What a manifest holds besides what `write_adapter` knows.

    Args:
        source: fields of `Entry` that tell where it came from.
    """
    alphas = {name: low.scale * len(low.a) for name, low in adapter.modules.items()}
    return {
        **source,
        "ranks": sorted({len(low.a) for low in adapter.modules.values()}),
        "alphas": sorted(set(alphas.values())),
        "targets": sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in (*adapter.modules, *adapter.shifts)}),
        "license": adapter.spec.license,
        "checks": as_rows(checks),
        "notes": list(notes),
        _SKETCH: [float(f"{value:.5g}") for value in sketch],
    }


def list_entries(library: str) -> list[Entry]:
    """All adapters, in the order of their names.

    Raises:
        StorageError: unreadable, or a manifest is damaged.
    """
    return [
        Entry(**{**row, **{name: tuple(row[name]) for name in ("ranks", "targets", "notes")}})
        for row in _rows(library, _COLUMNS)
    ]


def read_sketches(library: str, group: str) -> list[tuple[str, list[float]]]:
    """(adapter's folder, its sketch) of every adapter of a group."""
    rows = _rows(library, ["adapter_id", "group", _SKETCH])
    return [(join(library, group, row["adapter_id"]), row[_SKETCH]) for row in rows if row["group"] == group]


def find_entry(library: str, adapter_id: str) -> Entry:
    """The adapter of that id, or of the only one that begins so.

    Raises:
        AdapterError: there is none, or more than one.
    """
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


def checks_of(library: str, entry: Entry) -> list[Check]:
    """What was found when it was added."""
    return from_rows((read_manifest(join(library, entry.name)) or {}).get("checks", []))


def _rows(library: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Of the index, brought up to date."""
    names = [file.removesuffix(f"/{CONFIG_NAME}") for file in list_files(library, suffix=f"/{CONFIG_NAME}")]
    names = [name for name in names if name.count("/") == 1]
    index = _read_index(library)
    known = {} if index is None else {f"{group}/{name}": row for row, (group, name) in enumerate(_keys(index))}
    if known.keys() == set(names) and index is not None:
        return _in_order(index.select(list(columns)).to_pylist(), columns, known, names)
    kept = {} if index is None else {name: index.slice(known[name], 1).to_pylist()[0] for name in names if name in known}
    new = [name for name in names if name not in kept]
    kept |= dict(zip(new, read_many(lambda name: _row_of(library, name), new), strict=True))
    rows = [kept[name] for name in names]
    if rows or index is not None:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), buffer)
        write_bytes(join(library, _INDEX_NAME), buffer.getvalue())
    return [{column: row[column] for column in columns} for row in rows]


def _in_order(
    rows: list[dict[str, Any]], columns: Sequence[str], known: dict[str, int], names: Sequence[str]
) -> list[dict[str, Any]]:
    return [rows[known[name]] for name in names]


def _keys(index: pa.Table) -> list[tuple[str, str]]:
    return list(zip(index["group"].to_pylist(), index["adapter_id"].to_pylist(), strict=True))


def _read_index(library: str) -> pa.Table | None:
    """None if it is not there, or not of this version."""
    content = read_if_there(join(library, _INDEX_NAME))
    if content is None:
        return None
    try:
        table = pq.read_table(io.BytesIO(content))
    except pa.ArrowException:
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
    return {**asdict(entry), _SKETCH: manifest[_SKETCH]}


_TYPES = {"ranks": pa.list_(pa.int32()), "targets": pa.list_(pa.string()), "notes": pa.list_(pa.string())}
_SCHEMA = pa.schema(
    [(name, _TYPES.get(name, pa.int64() if name.startswith("num_") else pa.string())) for name in _COLUMNS]
    + [(_SKETCH, pa.list_(pa.float32()))]
)
