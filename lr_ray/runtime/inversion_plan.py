"""What an inversion has to do: its pieces of work, and their names."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from lr_ray.config import ExperimentConfig
from lr_ray.errors import AdapterError, StorageError
from lr_ray.runtime.held import held_backbone
from lr_ray.section import match_classes
from lr_ray.storage.adapters import list_adapters, read_adapter
from lr_ray.storage.filesystem import delete, join, list_uris, read_many
from lr_ray.storage.manifest import claim_folder, digest_of
from lr_ray.storage.synthetic import adapter_id_of, synthetic_name
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import AdapterSpec, check_adapter
from lr_ray.vit.tokens import check_blocks

PARTIAL = ".partial"
"""Ends the name of the state of an inversion under way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InversionItem:
    """Classes of one adapter to invert, and where their images go.

    Attributes:
        classes: class indices of the adapter.
        uri: derived from all that determines the images.
        part: of the job that it belongs to: 0 for images to train on, 1 for those of the metric.
    """

    adapter_folder: str
    adapter_id: str
    classes: tuple[int, ...]
    uri: str
    seed: int
    part: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class InversionPlan:
    """What there is to do.

    Attributes:
        items: of all adapters that can be inverted.
        todo: those whose images are not there yet, the largest first.
        left_out: how many adapters are sound but have no head, or none of the classes that were asked for.
    """

    items: tuple[InversionItem, ...]
    todo: tuple[InversionItem, ...]
    left_out: int


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectedLibrary:
    """The adapters that there are, each looked at once.

    Attributes:
        identity: of the backbone that they were checked against.
        specs: of the sound ones, by folder.
        rejected: {adapter's folder: why it cannot be inverted}.
    """

    identity: dict[str, Any]
    specs: dict[str, AdapterSpec]
    rejected: dict[str, str]


def inspect_library(config: ExperimentConfig, *, strict: bool = True) -> InspectedLibrary:
    """Read and check every adapter.

    Raises:
        AdapterError: no adapters; two of the same id; with `strict`, one that is unusable, else if none can be inverted.
        ConfigError: patches to be dropped in a block that the backbone does not have.
    """
    backbone = held_backbone(config.backbone)
    for inversion in (config.inversion, config.metric_inversion):
        check_blocks(backbone.model, inversion.keep_ratios if inversion else {})
    folders = list_adapters(config.adapters_root)
    inspected = dict(zip(folders, read_many(partial(_inspect, backbone=backbone), folders), strict=True))
    rejected = {folder: str(found) for folder, found in inspected.items() if isinstance(found, AdapterError)}
    if rejected and (strict or len(rejected) == len(folders)):
        raise AdapterError(next(iter(rejected.values())))
    specs = {folder: found for folder, found in inspected.items() if isinstance(found, AdapterSpec)}
    seen: dict[str, str] = {}
    for folder, spec in specs.items():
        if spec.adapter_id in seen:
            raise AdapterError(
                f"adapters {folder} and {seen[spec.adapter_id]} have the same id {spec.adapter_id!r}; rename or remove "
                "one, or give a folder of adapters alone, such as a run's adapters/"
            )
        seen[spec.adapter_id] = folder
    return InspectedLibrary(identity=backbone.identity, specs=specs, rejected=rejected)


def plan_inversion(config: ExperimentConfig, library: InspectedLibrary | None = None, *, part: int = 0) -> InversionPlan:
    """The work items; an item's name derives from adapter, classes, backbone, config and seed.

    Args:
        library: default: as `inspect_library` finds it now.
        part: of the items.

    Raises:
        AdapterError: no adapter has classes to invert; and those of `inspect_library`.
        StorageError: the folder holds images made with another config, backbone or seed, or from another version of an
            adapter.
    """
    library = library or inspect_library(config)
    inversion = config.inversion.model_dump(mode="json")
    classes_per_item, asked = inversion.pop("classes_per_item"), inversion.pop("classes")
    shared = {"step": "invert", "seed": config.seed, "backbone": library.identity, "inversion": inversion}
    chosen = {folder: chosen_classes(spec, asked) for folder, spec in library.specs.items()}
    items = [
        item
        for folder, classes in chosen.items()
        for item in _items_of(folder, library.specs[folder], classes, shared, config, part)
    ]
    if not items:
        of_what = "has a head with classes" if asked is None else f"has a class that inversion.classes {', '.join(asked)} means"
        count = len(library.specs) + len(library.rejected)
        raise AdapterError(f"adapters {config.adapters_root}: none of {count} {of_what}; there is nothing to invert")
    claim = shared | {"classes_per_item": classes_per_item} | ({"classes": asked} if asked is not None else {})
    claim_folder(config.synthetic_root, claim, config=config.resolved())
    there = committed(config)
    known = {spec.adapter_id for spec in library.specs.values()}
    _refuse_other_versions(there - {item.uri for item in items}, known)
    for left_over in list_uris(config.synthetic_root, suffix=PARTIAL):
        if left_over.removesuffix(PARTIAL) in there:
            delete(left_over)  # its worker was lost between the commit and this
    todo = sorted((item for item in items if item.uri not in there), key=lambda item: -len(item.classes))
    left_out = sum(not classes for classes in chosen.values())
    return InversionPlan(items=tuple(items), todo=tuple(todo), left_out=left_out)


def _refuse_other_versions(others: set[str], known: Container[str]) -> None:
    """Raise if files that are none of the plan's are of adapters that are: their images would be there twice."""
    if stale := sorted(uri for uri in others if adapter_id_of(uri) in known):
        raise StorageError(
            f"{stale[0]} was made from another version of adapter {adapter_id_of(stale[0])!r}, as {len(stale)} files were; "
            "delete them, or choose another --synthetic"
        )


def committed(config: ExperimentConfig) -> set[str]:
    """URIs of the files of images that are there."""
    return list_uris(config.synthetic_root, suffix=".parquet")


def _inspect(folder: str, *, backbone: Backbone) -> AdapterSpec | AdapterError:
    """What the adapter is, or why it cannot be inverted."""
    try:
        adapter = read_adapter(folder)
        check_adapter(adapter, backbone)
    except AdapterError as error:
        return error
    return adapter.spec


def chosen_classes(spec: AdapterSpec, asked: Sequence[str] | None) -> list[int]:
    """Which of the adapter's classes to invert: those that the patterns mean, or all."""
    if asked is None:
        return list(range(len(spec.class_names)))
    return sorted({index for pattern in asked for index in match_classes(spec.class_names, pattern)})


def _items_of(
    folder: str, spec: AdapterSpec, chosen: Sequence[int], shared: dict[str, Any], config: ExperimentConfig, part: int
) -> Iterator[InversionItem]:
    """The chosen classes, in pieces of work."""
    bounds = config.inversion.piece_bounds(len(chosen))
    for first, last in pairwise(bounds):
        subset: dict[str, Any] = {"classes": [first, last]} if len(bounds) > 2 else {}
        if len(chosen) < len(spec.class_names):
            subset = {"classes": list(chosen[first:last]), "of": len(spec.class_names)}
        digest = digest_of({**shared, "adapter": spec.digest} | subset)
        yield InversionItem(
            adapter_folder=folder,
            adapter_id=spec.adapter_id,
            classes=tuple(chosen[first:last]),
            uri=join(config.synthetic_root, synthetic_name(spec.adapter_id, digest)),
            seed=int(digest[:12], 16),
            part=part,
        )
