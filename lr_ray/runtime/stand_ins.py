"""Sets of images in the place of the inverted ones, each adapter's looked at and labelled by that adapter."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lr_ray.config import ExperimentConfig
from lr_ray.data.images import LabelledImages
from lr_ray.data.load import load_data
from lr_ray.data.procedural import PROCEDURAL
from lr_ray.errors import ConfigError, DataError
from lr_ray.grid import StandInConfig
from lr_ray.inversion.invert import describe, described
from lr_ray.report.progress import Reporter
from lr_ray.runtime.held import held_backbone
from lr_ray.runtime.inversion_plan import chosen_classes
from lr_ray.runtime.session import work_through, worker_device
from lr_ray.storage.adapters import list_adapters, read_adapter, read_specs
from lr_ray.storage.filesystem import join, list_uris
from lr_ray.storage.manifest import claim_folder, digest_of
from lr_ray.storage.synthetic import adapter_id_of, list_synthetic, read_pool, synthetic_name, write_synthetic
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import Adapter, as_tuned, check_adapter, merged

_CANDIDATES = 4
"""Images without classes are chosen out of this many times as many, by what the adapter makes of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StandInTask:
    """One adapter's set, and where it goes."""

    config: ExperimentConfig
    stand_in: StandInConfig
    inverted_root: str
    adapter_folder: str
    uri: str
    seed: int


def make_stand_ins(config: ExperimentConfig, stand_in: StandInConfig, inverted_root: str, reporter: Reporter) -> None:
    """Fill `config.synthetic_root` with one file an adapter, in the format and number of the inverted images.

    Args:
        inverted_root: where the inverted images of the same adapters are, for `shuffled` and `mixed`.

    Raises:
        ConfigError: real images are asked for and none named.
        DataError: a class without images.
    """
    data = _real_images(config, stand_in)
    inputs = {
        "step": "stand-in",
        "seed": config.seed,
        "backbone": held_backbone(config.backbone).identity,
        "inversion": config.inversion.model_dump(mode="json"),
        "images": stand_in.model_dump(mode="json"),
        "data": data.digest() if data else None,
    }
    claim_folder(config.synthetic_root, inputs, config=config.resolved())
    tasks = []
    folders = list_adapters(config.adapters_root)
    done = list_uris(config.synthetic_root, suffix=".parquet")
    for folder, spec in zip(folders, read_specs(folders), strict=True):
        digest = digest_of({**inputs, "adapter": spec.digest})
        uri = join(config.synthetic_root, synthetic_name(spec.adapter_id, digest))
        if uri not in done and chosen_classes(spec, config.inversion.classes):
            task = StandInTask(
                config=config,
                stand_in=stand_in,
                inverted_root=inverted_root,
                adapter_folder=folder,
                uri=uri,
                seed=int(digest[:12], 16),
            )
            tasks.append(task)

    def take(task: StandInTask, num_images: int) -> str:
        return f"{task.adapter_folder.rsplit('/', 1)[-1]}: {num_images} images"

    work_through(stand_in.kind, make_one, tasks, config.ray, reporter, take)


def _real_images(config: ExperimentConfig, stand_in: StandInConfig) -> LabelledImages | None:
    if stand_in.kind not in ("real", "mixed"):
        return None
    chosen = stand_in.data or config.data.tune
    if chosen is None:
        raise ConfigError(f"images.kind {stand_in.kind}: name the real images, in images.data or data.tune")
    return load_data(chosen)


def make_one(task: StandInTask) -> int:
    """Commit one adapter's set; returns the number of its images."""
    config = task.config
    untuned = held_backbone(config.backbone, worker_device(config.ray))
    adapter = read_adapter(task.adapter_folder).to(untuned.device)
    check_adapter(adapter, untuned)
    backbone = as_tuned(adapter, untuned)
    rng = np.random.default_rng(task.seed)
    with merged(backbone.model, adapter.updates()):
        images, labels = _images(task, adapter, backbone, rng)
        stand_ins = described(adapter, backbone, images, labels, torch.zeros(len(labels)), config.inversion)
    write_synthetic(task.uri, stand_ins, adapter.spec, seed=config.seed, identity=untuned.identity)
    return len(labels)


def _images(task: StandInTask, adapter: Adapter, backbone: Backbone, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) uint8 and (B,) labels."""
    config, stand_in = task.config, task.stand_in
    each = config.inversion.images_per_class
    if stand_in.kind in ("shuffled", "mixed"):
        mine = [file for file in list_synthetic(task.inverted_root) if adapter_id_of(file) == adapter.spec.adapter_id]
        pool = read_pool(task.inverted_root, mine)
        images, labels = pool.images, torch.from_numpy(pool.slot_of[pool.class_of].astype(np.int64))
        if stand_in.kind == "shuffled":
            return _shuffle_patches(images, backbone.patch_px, rng), labels
        real, real_labels = _of_own_classes(task, adapter, backbone, stand_in.per_class or each, rng)
        return torch.cat([images, real]), torch.cat([labels, real_labels])
    if stand_in.kind == "real" and stand_in.data is None:
        images, labels = _of_own_classes(task, adapter, backbone, stand_in.per_class or each, rng)
        few = stand_in.per_class or each
        if few < each:
            repeated = torch.arange(len(images) // few)[:, None] * few + torch.arange(each) % few
            images, labels = images[repeated.flatten()], labels[repeated.flatten()]
        return images, labels
    return _chosen_by_adapter(task, adapter, backbone, rng)


def _of_own_classes(
    task: StandInTask, adapter: Adapter, backbone: Backbone, per_class: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Real images of those of the adapter's classes that are inverted, class by class."""
    data = _real_images(task.config, task.stand_in)
    assert data is not None
    picks, chosen = [], chosen_classes(adapter.spec, task.config.inversion.classes)
    for name in (adapter.spec.class_names[index] for index in chosen):
        members = np.flatnonzero(data.labels == data.class_names.index(name)) if name in data.class_names else np.zeros(0, int)
        if len(members) < per_class:
            raise DataError(
                f"class {name!r} has {len(members)} images in {data.name}, but {per_class} are asked for; lower per_class"
            )
        picks.append(rng.choice(members, per_class, replace=False))
    labels = torch.tensor(chosen).repeat_interleave(per_class)
    return data.pixels(np.concatenate(picks), backbone.image_px), labels


def _chosen_by_adapter(
    task: StandInTask, adapter: Adapter, backbone: Backbone, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Images without a class, out of several times as many: for each class those that the adapter finds most like it."""
    each = task.config.inversion.images_per_class
    chosen = chosen_classes(adapter.spec, task.config.inversion.classes)
    count = _CANDIDATES * each * len(chosen)
    kind = task.stand_in.kind
    if kind == "real":
        data = _real_images(task.config, task.stand_in)
        assert data is not None
        candidates = data.pixels(rng.choice(len(data), min(count, len(data)), replace=False), backbone.image_px)
    else:
        assert kind in PROCEDURAL
        drawn = [np.array(PROCEDURAL[kind](rng, backbone.image_px)) for _ in range(count)]
        candidates = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)
    if len(candidates) < each * len(chosen):
        raise DataError(f"images.data has {len(candidates)} images, but {each * len(chosen)} are needed; give more")
    logits, _, _ = describe(adapter, backbone, candidates, task.config.inversion)
    scores = logits.log_softmax(dim=1)
    picks = []
    for c in chosen:
        best = scores[:, c].topk(each).indices
        picks.append(best)
        scores[best] = -torch.inf
    return candidates[torch.cat(picks)], torch.tensor(chosen).repeat_interleave(each)


def _shuffle_patches(images: Tensor, patch_px: int, rng: np.random.Generator) -> Tensor:
    """Each image's patches in a random order of its own."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_px, width // patch_px
    patches = images.view(batch, channels, rows, patch_px, columns, patch_px).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    orders = torch.from_numpy(rng.permuted(np.tile(np.arange(rows * columns), (batch, 1)), axis=1))
    shuffled = patches[torch.arange(batch)[:, None], orders].view(batch, rows, columns, channels, patch_px, patch_px)
    return shuffled.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
