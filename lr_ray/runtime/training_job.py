"""What a meta-training has to do, planned and checked before anything is started."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from lr_ray.config import ExperimentConfig
from lr_ray.data.images import LabelledImages
from lr_ray.data.load import load_data
from lr_ray.errors import ConfigError, EpisodeError, StorageError
from lr_ray.fewshot.distill import TrainConfig
from lr_ray.fewshot.episodes import ClassImages, ClassRef, EpisodeShape, check_classes
from lr_ray.fewshot.metatrain import Validation
from lr_ray.fewshot.metric import MetricConfig
from lr_ray.fewshot.relations import RelationsConfig
from lr_ray.fewshot.stream import Shelf
from lr_ray.storage.adapters import list_adapters, read_specs
from lr_ray.storage.filesystem import join, read_many
from lr_ray.storage.synthetic import adapter_id_of, by_adapter, list_synthetic, read_classes, read_index, read_pool
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import AdapterSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingJob:
    """One meta-LoRA to be.

    Attributes:
        kind: `meta_lora`, episodes of synthetic images; `joint`, plain supervision on them; or `oracle`, episodes of the real
            ones that the adapters were tuned on.
        training: the config's section, for the oracle without what needs a teacher.
        folder: where the result goes.
        refs: the classes to train on.
        grid_size: patches of an image along (H, W).
        image_px: its side in pixels.
        files: of the synthetic set, to train on; none for the oracle.
        feature_uris: what each adapter makes of these, where relations are learnt.
        holdout_files: of the synthetic set, to validate on.
        metric_refs: the classes that the metric is learnt from, where they have images of their own for that.
        inputs: everything that determines the result.
        facts: what else is known of what it is made of.
    """

    kind: str
    config: ExperimentConfig
    training: TrainConfig
    folder: str
    refs: tuple[ClassRef, ...]
    grid_size: tuple[int, int]
    image_px: int
    files: tuple[str, ...] = ()
    feature_uris: tuple[str, ...] = ()
    holdout_files: tuple[str, ...] = ()
    metric_refs: tuple[ClassRef, ...] = ()
    inputs: dict[str, Any]
    facts: dict[str, Any]


def joint_job(config: ExperimentConfig, backbone: Backbone) -> TrainingJob:
    """Plain supervision on the synthetic images, in the place of episodes; raises what `meta_lora_job` does."""
    changes = {"objective": "joint", "relations": RelationsConfig()}
    training = config.training.model_copy(update=changes)
    job = meta_lora_job(config.model_copy(update={"training": training}), backbone)
    return replace(job, kind="joint", config=config, folder=config.joint_root)


def meta_lora_job(config: ExperimentConfig, backbone: Backbone) -> TrainingJob:
    """Meta-training on the synthetic images.

    Raises:
        AdapterError: one that it starts from or learns from is damaged or made for another backbone.
        StorageError: no synthetic images, or some of another backbone or image size, or of an adapter that is gone.
        EpisodeError: too few adapters, classes or images.
    """
    files = list_synthetic(config.synthetic_root)
    kept, held_out = _held_apart(config, files)
    teachers: list[AdapterSpec] = []
    if config.training.init_scale or config.training.relations.share:
        teachers = read_specs(list_adapters(config.adapters_root), on=backbone)
        _check_teachers(config, files, teachers)
    refs = read_index(config.synthetic_root, files, backbone.identity)
    trained = tuple(ref for ref in refs if ref.file in set(kept))
    _check_episodes(trained, config.training)
    _check_validation(config, [ref for ref in refs if ref.file in set(held_out)])
    inputs = {**_shared_inputs(config, config.training, backbone), "synthetic": files, "adapters": [t.digest for t in teachers]}
    metric_refs: tuple[ClassRef, ...] = ()
    if config.metric_inversion is not None:
        root = config.for_metric.synthetic_root
        inputs["for_metric"] = list_synthetic(root)
        _check_known(
            root, inputs["for_metric"], {adapter_id_of(file) for file in files}, f"{config.synthetic_root} does not have"
        )
        metric_refs = read_index(root, inputs["for_metric"], backbone.identity)
    return TrainingJob(
        kind="meta_lora",
        config=config,
        training=config.training,
        folder=config.meta_lora_root,
        refs=trained,
        grid_size=backbone.model.patch_embed.grid_size,
        image_px=backbone.image_px,
        files=kept,
        holdout_files=held_out,
        metric_refs=metric_refs,
        inputs=inputs,
        facts=_facts(trained, adapters=_adapter_facts(files, teachers)),
    )


def _held_apart(config: ExperimentConfig, files: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files that are trained on, and those that validate.

    Raises:
        EpisodeError: none would be left.
    """
    num_holdout = 0 if config.data.validation else config.training.holdout_adapters
    groups = by_adapter(files)
    if num_holdout >= len(groups):
        raise EpisodeError(
            f"training.holdout_adapters {num_holdout} of {len(groups)} adapters leaves none to train on; lower it"
        )
    kept, held_out = groups[: len(groups) - num_holdout], groups[len(groups) - num_holdout :]
    return tuple(chain.from_iterable(kept)), tuple(chain.from_iterable(held_out))


def metric_files(config: ExperimentConfig) -> list[str]:
    """The files of the images that the metric is fitted on; raises EpisodeError where none is left."""
    files = list_synthetic(config.for_metric.synthetic_root)
    return files if config.metric_inversion is not None or not files else list(_held_apart(config, files)[0])


def _facts(refs: Sequence[ClassRef], *, adapters: list[dict[str, str]]) -> dict[str, Any]:
    return {"num_classes": len(refs), "num_images": sum(ref.num_images for ref in refs), "adapters": adapters}


def _adapter_facts(files: Sequence[str], teachers: Sequence[AdapterSpec]) -> list[dict[str, str]]:
    """Of each adapter; the id alone where the images stand for them and the library is not read."""
    if not teachers:
        return [{"adapter_id": adapter_id_of(group[0]), "digest": "", "license": ""} for group in by_adapter(files)]
    return [{"adapter_id": spec.adapter_id, "digest": spec.digest, "license": spec.license} for spec in teachers]


def _check_teachers(config: ExperimentConfig, files: Sequence[str], teachers: Sequence[AdapterSpec]) -> None:
    """Raise if some images are of an adapter that is not in the library any more."""
    known = {spec.adapter_id for spec in teachers}
    _check_known(config.synthetic_root, files, known, f"{config.adapters_root} does not hold")


def _check_known(root: str, files: Sequence[str], known: Collection[str], where: str) -> None:
    for file in files:
        if adapter_id_of(file) not in known:
            raise StorageError(
                f"synthetic images {join(root, file)} are of an adapter that {where}; remove the file, or put the adapter back"
            )


def oracle_job(config: ExperimentConfig, backbone: Backbone) -> TrainingJob:
    """The same meta-training, from zero and without teachers, on the real images of the adapters' classes.

    Raises:
        ConfigError: no real images are given.
        EpisodeError: too few classes or images.
    """
    if config.data.tune is None:
        raise ConfigError("data.tune is not set: the oracle trains on the real images; set it or leave oracle out")
    training = config.training.model_copy(
        update={
            "init_scale": 0.0,
            "adapter_share": 0.0,
            "keep_ratio": 1.0,
            "relations": RelationsConfig(),
            "metric": MetricConfig(power=config.training.metric.power, shrinkage=config.training.metric.shrinkage),
        }
    )
    data = load_data(config.data.tune)
    known = {name for spec in read_specs(list_adapters(config.adapters_root)) for name in spec.class_names}
    classes = tuple(name for name in data.class_names if name in known)
    if not classes:
        raise ConfigError(f"data.tune {data.name} has none of the adapters' classes; the oracle needs the adapters' own data")
    refs = tuple(ref for ref in _refs_of(data) if ref.name in known)
    _check_episodes(refs, training)
    _check_validation(config, [])
    return TrainingJob(
        kind="oracle",
        config=config,
        training=training,
        folder=config.oracle_root,
        refs=refs,
        grid_size=backbone.model.patch_embed.grid_size,
        image_px=backbone.image_px,
        inputs={**_shared_inputs(config, training, backbone), "data": data.digest(), "classes": list(classes)},
        facts=_facts(refs, adapters=[]),
    )


def _shared_inputs(config: ExperimentConfig, training: TrainConfig, backbone: Backbone) -> dict[str, Any]:
    validation = config.data.validation
    return {
        "step": "train",
        "seed": config.seed,
        "backbone": backbone.identity,
        "training": training.determining(),
        "validation": load_data(validation).digest() if validation else None,
    }


def _refs_of(data: LabelledImages) -> list[ClassRef]:
    """Its classes; those without images are none."""
    labels, counts = np.unique(data.labels, return_counts=True)
    return [
        ClassRef(file="", row_group=int(c), adapter="", slot=int(c), name=data.class_names[c], num_images=int(count))
        for c, count in zip(labels, counts, strict=True)
    ]


def _check_episodes(refs: Sequence[ClassRef], training: TrainConfig) -> None:
    check_classes(refs, training.episode, adapter_share=training.adapter_share)
    room, most = training.stream.buffer_classes, max(Counter(ref.file for ref in refs).values())
    if training.adapter_share and len(refs) > room and most < training.episode.n_way:
        raise EpisodeError(
            f"{training.episode.n_way}-way episodes of one adapter: {len(refs)} classes are read by the file, {most} at most, "
            f"since training.stream.buffer_classes is {room}; raise that, or lower n_way"
        )


def _check_validation(config: ExperimentConfig, held_out: Sequence[ClassRef]) -> None:
    """Raise unless episodes can be drawn from what validates."""
    validation, shape = config.data.validation, config.training.episode
    refs = _refs_of(load_data(validation)) if validation else held_out
    if not refs:
        return
    if len(refs) < 2:
        which = "data.validation has" if validation else "the images of training.holdout_adapters have"
        raise EpisodeError(f"{which} the class {refs[0].name!r} alone, but validation needs two; give more, or hold out none")
    check_classes(refs, shape.model_copy(update={"n_way": 2}), adapter_share=0)


def read_shelves(job: TrainingJob, shelves: Sequence[Shelf]) -> list[list[ClassImages]]:
    """The images of some classes; several files at once.

    Raises:
        StorageError: unreadable.
    """
    if job.files:
        return read_many(partial(read_classes, job.config.synthetic_root), shelves)
    assert job.config.data.tune is not None
    data = load_data(job.config.data.tune)
    return [[_real(data, ref, job.image_px) for ref in shelf] for shelf in shelves]


def _real(data: LabelledImages, ref: ClassRef, image_px: int) -> ClassImages:
    images = data.pixels(np.flatnonzero(data.labels == ref.slot), image_px)
    return ClassImages(name=ref.name, adapter="", slot=ref.slot, images=images)


def validation_of(job: TrainingJob) -> Validation | None:
    """Real images where the config names some, else the held-out adapters' synthetic ones, else none."""
    shape = job.training.episode
    if job.config.data.validation is not None:
        data = load_data(job.config.data.validation)
        images = data.pixels(np.arange(len(data)), job.image_px)
        return Validation(images=images, labels=data.labels, shape=_within(shape, data.labels))
    if not job.holdout_files:
        return None
    pool = read_pool(job.config.synthetic_root, job.holdout_files)
    return Validation(images=pool.images, labels=pool.class_of, shape=_within(shape, pool.class_of))


def _within(shape: EpisodeShape, labels: np.ndarray) -> EpisodeShape:
    """The training episodes' shape, its way no larger than the classes at hand."""
    return shape.model_copy(update={"n_way": min(shape.n_way, len(np.unique(labels)))})
