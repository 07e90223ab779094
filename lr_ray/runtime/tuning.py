"""`lr-ray tune`: a library of adapters of random tasks, in parallel Ray tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lr_ray.config import ExperimentConfig
from lr_ray.data.images import LabelledImages
from lr_ray.data.load import load_data
from lr_ray.errors import ConfigError, DataError, StorageError
from lr_ray.report.progress import Reporter
from lr_ray.runtime.held import held_backbone
from lr_ray.runtime.session import work_through, worker_device
from lr_ray.storage.adapters import with_digest, write_adapter
from lr_ray.storage.filesystem import join, list_uris
from lr_ray.storage.manifest import CONFIG_NAME, claim_folder, digest_of, read_manifests
from lr_ray.tuning.tune import tune
from lr_ray.vit.lora import Adapter, AdapterSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningTask:
    """One adapter to be: which classes, where it goes, everything that determines it."""

    config: ExperimentConfig
    index: int
    class_indices: tuple[int, ...]
    folder: str
    inputs: dict[str, Any]

    @property
    def uri(self) -> str:
        """Of the file that makes the adapter count."""
        return join(self.folder, CONFIG_NAME)


def tune_library(config: ExperimentConfig, reporter: Reporter) -> list[dict[str, Any]]:
    """Tune the adapters that are not there yet; returns the manifests of all, in order.

    Raises:
        ConfigError: no data to tune on.
        DataError: too few classes or images.
        StorageError: the folder holds another library.
    """
    tasks = plan_tuning(config)
    library = {key: value for key, value in tasks[0].inputs.items() if key not in ("index", "class_names")}
    claim_folder(config.adapters_root, library, config=config.resolved())
    _refuse_more(tasks, config)
    tune_missing(tasks, config, reporter)
    return read_manifests([task.folder for task in tasks])


def _refuse_more(tasks: Sequence[TuningTask], config: ExperimentConfig) -> None:
    """Raise if adapters of this library are there that the config no longer asks for: all that follows would take them."""
    planned = {task.uri for task in tasks}
    own = join(config.adapters_root, "task-")
    more = [uri for uri in list_uris(config.adapters_root, suffix=CONFIG_NAME) - planned if uri.startswith(own)]
    if more:
        raise StorageError(
            f"{config.adapters_root} holds {len(more)} adapters, such as {min(more).split('/')[-2]}, that tuning.num_adapters "
            f"{len(tasks)} does not ask for; raise it, choose another --output, or delete them"
        )


def tune_missing(tasks: Sequence[TuningTask], config: ExperimentConfig, reporter: Reporter) -> None:
    """Tune those of the tasks below `config.adapters_root` whose adapters are not there yet."""
    done = list_uris(config.adapters_root, suffix=CONFIG_NAME)
    todo = [task for task in tasks if task.uri not in done]
    reporter.say(f"tune: {len(tasks)} adapters into {config.adapters_root}, {len(tasks) - len(todo)} there already")

    def take(task: TuningTask, accuracy: float) -> str:
        return f"{task.folder.rsplit('/', 1)[-1]} {100 * accuracy:.0f} % on images it did not see"

    work_through("tune", tune_one, todo, config.ray, reporter, take)


def plan_tuning(config: ExperimentConfig) -> list[TuningTask]:
    """The tasks of the library, drawn from the seed.

    Raises:
        ConfigError: data.tune is not set.
        DataError: too few classes, or images of one.
    """
    data = _tuning_data(config)
    tuning = config.tuning
    if tuning.n_way > len(data.class_names):
        raise DataError(
            f"tuning.n_way {tuning.n_way}: {data.name} has {len(data.class_names)} classes; lower it or select more classes"
        )
    counts = np.bincount(data.labels, minlength=len(data.class_names))
    if (fewest := int(counts.min())) <= tuning.held_out_per_class:
        raise DataError(
            f"class {data.class_names[int(counts.argmin())]!r} of {data.name} has {fewest} images, but "
            f"tuning.held_out_per_class takes {tuning.held_out_per_class} and at least one must be left; lower it"
        )
    backbone = held_backbone(config.backbone)
    shared = {
        "step": "tune",
        "seed": config.seed,
        "data": data.digest(),
        "backbone": backbone.identity,
        "tuning": {k: v for k, v in tuning.model_dump(mode="json").items() if k != "num_adapters"},
    }
    tasks = []
    for index in range(tuning.num_adapters):
        rng = np.random.default_rng((config.seed, index))
        classes = tuple(sorted(int(c) for c in rng.choice(len(data.class_names), tuning.n_way, replace=False)))
        inputs = {**shared, "index": index, "class_names": [data.class_names[c] for c in classes]}
        folder = join(config.adapters_root, f"task-{index:04d}-{digest_of(inputs)[:8]}")
        tasks.append(TuningTask(config=config, index=index, class_indices=classes, folder=folder, inputs=inputs))
    return tasks


def tune_one(task: TuningTask) -> float:
    """Tune and commit one adapter; returns its accuracy on images that it did not see."""
    config, tuning = task.config, task.config.tuning
    backbone = held_backbone(config.backbone, worker_device(config.ray))
    data = _tuning_data(config)
    rng = np.random.default_rng((config.seed, task.index, 1))
    train, held_out = [], []
    for c in task.class_indices:
        members = rng.permutation(np.flatnonzero(data.labels == c))
        held_out.append(members[: tuning.held_out_per_class])
        train.append(members[tuning.held_out_per_class :][: tuning.images_per_class])
    weights = tune(
        backbone,
        tuning,
        images=data.pixels(np.concatenate(train), backbone.image_px),
        labels=torch.arange(len(train)).repeat_interleave(torch.tensor([len(part) for part in train])),
        held_out_images=data.pixels(np.concatenate(held_out), backbone.image_px),
        held_out_labels=torch.arange(len(held_out)).repeat_interleave(tuning.held_out_per_class),
        generator=torch.Generator().manual_seed(config.seed * 1_000_003 + task.index),
    )
    spec = AdapterSpec(
        adapter_id=task.folder.rsplit("/", 1)[-1],
        digest="",
        backbone=backbone.name,
        backbone_digest=backbone.digest,
        class_names=tuple(data.class_names[c] for c in task.class_indices),
        image_px=backbone.image_px,
    )
    adapter = with_digest(
        Adapter(spec=spec, modules=weights.modules, head_weight=weights.head_weight, head_bias=weights.head_bias)
    )
    facts = {"held_out_accuracy": weights.accuracy, "config": config.resolved()}
    write_adapter(task.folder, adapter, inputs=task.inputs, facts=facts)
    return weights.accuracy


def _tuning_data(config: ExperimentConfig) -> LabelledImages:
    if config.data.tune is None:
        raise ConfigError("data.tune is not set: name the real images to tune on, with --data or in the config")
    return load_data(config.data.tune)
