"""Adapters from anywhere into a library, and a look at those that are there."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from lr_ray.errors import AdapterError, StorageError
from lr_ray.library.checks import Check, check, duplicate_of, failure_of, sketch_of
from lr_ray.library.formats import base_model_of, convert
from lr_ray.library.groups import claim_group, facts_of, group_of, read_group, read_sketches
from lr_ray.library.index import Entry, list_entries
from lr_ray.library.sources import RawAdapter, read_sources
from lr_ray.storage.adapters import read_adapter, with_digest, write_adapter
from lr_ray.storage.filesystem import join
from lr_ray.storage.manifest import read_manifest
from lr_ray.vit.backbone import Backbone, BackboneConfig, load_backbone


@dataclass(kw_only=True, slots=True)
class Added:
    """What came of it.

    Attributes:
        root: of the group: the `adapters` of a run.
        taken: names of adapters that are new.
        present: names of those that were there.
        refused: a line for each that was not taken.
    """

    root: str = ""
    taken: list[str] = field(default_factory=list)
    present: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def add_sources(
    library: str, sources: Sequence[str], config: BackboneConfig, *, say: Callable[[str], None] = lambda _line: None
) -> Added:
    """Take the adapters of these sources that are sound and of this backbone; those that are there stay as they are.

    Args:
        library: folder or URI.
        sources: as of `read_sources`.
        config: of the backbone.
        say: is told of every adapter.

    Raises:
        BackboneError: the backbone cannot be had.
        StorageError: the library is not readable or writable.
    """
    backbone = load_backbone(config)
    added = Added(root=join(library, group_of(backbone)))
    group = added.root.rsplit("/", 1)[-1]
    known = {entry.tensors_digest: entry.adapter_id for entry in list_entries(library) if entry.group == group}
    sketches = read_sketches(library, group)
    for raw in (raw for source in sources for raw in _read(source)):
        try:
            if isinstance(raw, AdapterError):
                raise raw
            _take(raw, backbone, added, known, sketches, say)
            if len(added.taken) + len(added.present) == 1:
                claim_group(added.root, backbone, config)
        except AdapterError as error:
            added.refused.append(str(error))
    return added


def _read(source: str) -> Iterator[RawAdapter | AdapterError]:
    """As `read_sources`; a source that cannot be read at all is one that is refused, so that the others have their turn."""
    try:
        yield from read_sources(source)
    except (AdapterError, StorageError) as error:
        yield AdapterError(str(error))


def _take(
    raw: RawAdapter,
    backbone: Backbone,
    added: Added,
    known: dict[str, str],
    sketches: dict[str, Tensor],
    say: Callable[[str], None],
) -> None:
    """Commit one adapter under a name of its content.

    Args:
        known: {digest: id} of those that are there.
        sketches: {folder: sketch} of the same.

    Raises:
        AdapterError: it is not taken.
    """
    converted = convert(raw, backbone)
    adapter, base_model = converted.adapter, base_model_of(raw)
    checks = check(adapter, backbone, base_model=base_model)
    if why := failure_of(checks):
        raise AdapterError(f"adapter {raw.source}: {why}")
    spec = replace(adapter.spec, backbone=backbone.name, backbone_digest=backbone.digest)
    adapter = with_digest(replace(adapter, spec=spec))
    adapter_id = f"{spec.adapter_id}-{adapter.spec.digest[:8]}"
    adapter = replace(adapter, spec=replace(adapter.spec, adapter_id=adapter_id))
    if (present := known.get(adapter.spec.digest)) is not None:
        added.present.append(present)
        say(f"{present}: there already")
        return
    folder = join(added.root, adapter_id)
    sketch = sketch_of(adapter)
    checks.append(duplicate_of(adapter, folder, sketch, sketches))
    source_digest = hashlib.sha256(raw.weights).hexdigest()
    facts = facts_of(
        adapter,
        checks,
        notes=converted.notes,
        sketch=sketch.tolist(),
        source=raw.source,
        source_digest=source_digest,
        format=converted.format,
        base_model=base_model,
        revision=str(raw.config.get("revision") or ""),
    )
    inputs = {"step": "library", "source_digest": source_digest, "adapter": adapter.spec.digest, "backbone": backbone.identity}
    write_adapter(folder, adapter, inputs=inputs, facts=facts | {"num_bytes": len(raw.weights)})
    known[adapter.spec.digest], sketches[folder] = adapter_id, sketch
    added.taken.append(adapter_id)
    noted = [f"{found.name}: {found.says}" for found in checks if found.verdict == "noted"]
    say("; ".join([f"{adapter_id}: taken", *noted, *converted.notes]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """An adapter of a library, looked at again."""

    entry: Entry
    checks: tuple[Check, ...]


def check_library(library: str, *, only: Sequence[Entry] | None = None) -> Iterator[Checked]:
    """Read and check the adapters of a library anew, group by group.

    Args:
        only: these; default all.

    Raises:
        BackboneError: a group's backbone cannot be had.
        StorageError: the library is not readable.
    """
    entries = list_entries(library) if only is None else only
    for group in dict.fromkeys(entry.group for entry in entries):
        backbone = load_backbone(read_group(library, group))
        sketches = read_sketches(library, group)
        for entry in (entry for entry in entries if entry.group == group):
            yield Checked(entry=entry, checks=tuple(_check_again(library, entry, backbone, sketches)))


def _check_again(library: str, entry: Entry, backbone: Backbone, sketches: dict[str, Tensor]) -> list[Check]:
    folder = join(library, entry.name)
    try:
        adapter = read_adapter(folder)
        stated = (read_manifest(folder) or {}).get("tensors_digest")
    except (AdapterError, StorageError) as error:
        return [Check(name="readable", verdict="failed", says=str(error))]
    if stated != adapter.spec.digest:
        says = (
            f"its weights changed since it was added (digest {adapter.spec.digest[:12]}, was {str(stated)[:12]}); add it again"
        )
        return [Check(name="digest", verdict="failed", says=says)]
    found = [Check(name="digest", verdict="passed"), *check(adapter, backbone, base_model=entry.base_model)]
    if not failure_of(found):
        found.append(duplicate_of(adapter, folder, sketch_of(adapter), sketches))
    return found
