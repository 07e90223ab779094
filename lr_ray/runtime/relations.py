"""What every adapter makes of the synthetic images of all: features, in parallel Ray tasks, each committing its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lr_ray.config import ExperimentConfig
from lr_ray.errors import StorageError
from lr_ray.fewshot.relations import RelationTargets, directions, project
from lr_ray.report.progress import Reporter
from lr_ray.runtime.held import held_backbone
from lr_ray.runtime.session import work_through, worker_device
from lr_ray.storage.adapters import list_adapters, read_adapter, read_specs
from lr_ray.storage.filesystem import join, list_uris, read_bytes, write_bytes
from lr_ray.storage.manifest import digest_of
from lr_ray.storage.synthetic import read_pool
from lr_ray.vit.augment import draw_views
from lr_ray.vit.backbone import autocast
from lr_ray.vit.lora import as_tuned, check_adapter, merged
from lr_ray.vit.tokens import encode, num_kept

_BATCH = 100
_TRAINING_ONLY = {"share", "batch_size", "temperature", "width"}
"""Keys of `training.relations` that the adapters' features do not depend on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RelationTask:
    """One adapter that looks at the images of `files`, and where its features go."""

    config: ExperimentConfig
    adapter_folder: str
    files: tuple[str, ...]
    uri: str


def see_with_every_adapter(config: ExperimentConfig, files: Sequence[str], reporter: Reporter) -> tuple[str, ...]:
    """Commit the features that are not there yet; returns the URIs of all, in the adapters' order.

    Args:
        files: of the synthetic set.

    Raises:
        AdapterError: an adapter that does not fit the backbone.
        StorageError: the features cannot be written.
    """
    shared = {
        "step": "relations",
        "seed": config.seed,
        "backbone": held_backbone(config.backbone).identity,
        "relations": config.training.relations.model_dump(mode="json", exclude=_TRAINING_ONLY),
        "augmentation": config.training.augmentation.model_dump(mode="json"),
        "keep_ratio": config.training.keep_ratio,
        "precision": config.training.precision,
        "files": list(files),
    }
    tasks = []
    folders = list_adapters(config.adapters_root)
    for folder, spec in zip(folders, read_specs(folders), strict=True):
        name = f"{spec.adapter_id}-{digest_of({**shared, 'adapter': spec.digest})[:12]}.safetensors"
        uri = join(config.relations_root, name)
        tasks.append(RelationTask(config=config, adapter_folder=folder, files=tuple(files), uri=uri))
    done = list_uris(config.relations_root, suffix=".safetensors")
    todo = [task for task in tasks if task.uri not in done]
    reporter.say(f"relations: {len(tasks)} adapters see the images of all, {len(tasks) - len(todo)} have already")

    def take(task: RelationTask, num_views: int) -> str:
        return f"{task.adapter_folder.rsplit('/', 1)[-1]} saw {num_views} views"

    work_through("relations", see_with_one_adapter, todo, config.ray, reporter, take)
    return tuple(task.uri for task in tasks)


def see_with_one_adapter(task: RelationTask) -> int:
    """Commit the (M, D) features, in half precision, of all views; returns M."""
    config = task.config
    backbone = held_backbone(config.backbone, worker_device(config.ray))
    adapter = read_adapter(task.adapter_folder).to(backbone.device)
    check_adapter(adapter, backbone)
    backbone = as_tuned(adapter, backbone)
    views, keep_indices = _views(config, task.files, backbone.model.patch_embed.grid_size)
    scale, parts = config.training.relations.teacher_scale, []
    with (
        merged(backbone.model, {name: scale * update for name, update in adapter.updates().items()}),
        autocast(backbone.device, config.training.precision),
        torch.inference_mode(),
    ):
        for start in range(0, len(views), _BATCH):
            batch = slice(start, start + _BATCH)
            kept = None if keep_indices is None else keep_indices[batch]
            parts.append(encode(backbone.model, backbone.normalize(views[batch]), keep_indices=kept).features.half().cpu())
    write_bytes(task.uri, save_safetensors({"features": torch.cat(parts)}))
    return len(views)


def relation_targets(
    config: ExperimentConfig, files: Sequence[str], feature_uris: Sequence[str], grid_size: tuple[int, int]
) -> RelationTargets:
    """The views of all images and the projected features of all adapters; memory does not grow with the adapters' number.

    Args:
        files: of the synthetic set, that the adapters saw.
        grid_size: patches along (H, W).

    Raises:
        StorageError: unreadable images or features.
    """
    views, keep_indices = _views(config, files, grid_size)
    total = torch.zeros(len(views), config.training.relations.width)
    for index, uri in enumerate(feature_uris):
        try:
            features = load_safetensors(read_bytes(uri))["features"]
        except (KeyError, SafetensorError) as error:
            raise StorageError(f"features {uri}: damaged ({error}); delete the file and run again") from error
        total += project(
            directions(features.float()), width=config.training.relations.width, seed=config.seed * 1_000_003 + index
        )
    return RelationTargets(images=views, keep_indices=keep_indices, features=total)


def _views(config: ExperimentConfig, files: Sequence[str], grid_size: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    training, pool = config.training, read_pool(config.synthetic_root, files)
    kept = num_kept(pool.patch_order.shape[1], training.keep_ratio)
    return draw_views(
        pool.images,
        pool.patch_order[:, :kept] if training.keep_ratio < 1 else None,
        training.augmentation,
        views_per_image=training.relations.views_per_image,
        grid_size=grid_size,
        seed=config.seed,
    )
