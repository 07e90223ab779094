"""`lr-ray train`: meta-training by Ray Train, from synthetic images or, for the oracle, from real ones."""

import json
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lr_ray.config import ExperimentConfig
from lr_ray.data.images import LabelledImages
from lr_ray.data.load import load_data
from lr_ray.errors import ClusterError, ConfigError, EpisodeError, LrRayError, StorageError
from lr_ray.fewshot.distill import TrainConfig
from lr_ray.fewshot.episodes import EpisodeShape, ImagePool
from lr_ray.fewshot.metatrain import MetaTrainer, Validation, best_modules
from lr_ray.fewshot.relations import RelationsConfig
from lr_ray.report.progress import Reporter
from lr_ray.runtime.relations import relation_targets, see_with_every_adapter
from lr_ray.runtime.session import ray_session, user_error
from lr_ray.storage.adapters import CONFIG_NAME, list_adapters, read_adapters, read_specs, with_digest, write_adapter
from lr_ray.storage.filesystem import arrow_filesystem, exists, join, storage_errors
from lr_ray.storage.manifest import claim_folder, digest_of, read_manifest
from lr_ray.storage.synthetic import adapter_id_of, by_adapter, list_synthetic, read_pool
from lr_ray.vit.backbone import Backbone, load_backbone
from lr_ray.vit.lora import Adapter, AdapterSpec, average_deltas


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingJob:
    """One meta-LoRA to be.

    Attributes:
        kind: `meta_lora`, from synthetic images, or `oracle`, from the real ones that the adapters were tuned on.
        training: the config's section, for the oracle without what needs a teacher.
        folder: where the result goes.
        files: of the synthetic set, to train on.
        feature_uris: what each adapter makes of these, where relations are learnt.
        holdout_files: of the synthetic set, to validate on.
        real_classes: the classes that the oracle trains on.
        inputs: everything that determines the result.
    """

    kind: str
    config: ExperimentConfig
    training: TrainConfig
    folder: str
    files: tuple[str, ...]
    feature_uris: tuple[str, ...]
    holdout_files: tuple[str, ...]
    real_classes: tuple[str, ...]
    inputs: dict[str, Any]


def train_meta_lora(config: ExperimentConfig, reporter: Reporter) -> dict[str, Any]:
    """Meta-train on the synthetic images; returns the manifest of the meta-LoRA.

    Raises:
        StorageError: no synthetic images, or the folder holds another run's meta-LoRA.
        EpisodeError: too few classes or images for the episodes.
        ClusterError: workers were lost more often than `ray.max_failures`.
    """
    backbone = load_backbone(config.backbone)
    files = list_synthetic(config.synthetic_root)
    num_holdout = 0 if config.data.validation else config.training.holdout_adapters
    groups = by_adapter(files)
    if num_holdout >= len(groups):
        raise EpisodeError(
            f"training.holdout_adapters {num_holdout} of {len(groups)} adapters leaves none to train on; lower it"
        )
    kept, held_out = groups[: len(groups) - num_holdout], groups[len(groups) - num_holdout :]
    teachers: list[AdapterSpec] = []
    if config.training.init_scale or config.training.relations.share:
        teachers = read_specs(list_adapters(config.adapters_root))
        _check_synthetic(config, files, teachers)
    job = TrainingJob(
        kind="meta_lora",
        config=config,
        training=config.training,
        folder=config.meta_lora_root,
        files=tuple(chain.from_iterable(kept)),
        feature_uris=(),
        holdout_files=tuple(chain.from_iterable(held_out)),
        real_classes=(),
        inputs={
            **_shared_inputs(config, config.training, backbone),
            "synthetic": files,
            "adapters": [spec.digest for spec in teachers],
        },
    )
    return _train(job, backbone, reporter)


def _check_synthetic(config: ExperimentConfig, files: Sequence[str], teachers: Sequence[AdapterSpec]) -> None:
    """Raise if some images are of an adapter that is not in the library any more."""
    known = {spec.adapter_id for spec in teachers}
    for file in files:
        if adapter_id_of(file) not in known:
            raise StorageError(
                f"synthetic images {join(config.synthetic_root, file)} are of an adapter that {config.adapters_root} does not "
                "hold; remove the file, or put the adapter back"
            )


def train_oracle(config: ExperimentConfig, reporter: Reporter) -> dict[str, Any]:
    """The same meta-training, from zero and without teachers, on the real images of the adapters' classes.

    Raises:
        ConfigError: no real images are given.
    """
    if config.data.tune is None:
        raise ConfigError("data.tune is not set: the oracle trains on the real images; set it or leave oracle out")
    backbone = load_backbone(config.backbone)
    training = config.training.model_copy(
        update={"init_scale": 0.0, "adapter_share": 0.0, "keep_ratio": 1.0, "relations": RelationsConfig()}
    )
    data = load_data(config.data.tune)
    known = {name for spec in read_specs(list_adapters(config.adapters_root)) for name in spec.class_names}
    classes = tuple(name for name in data.class_names if name in known)
    if not classes:
        raise ConfigError(f"data.tune {data.name} has none of the adapters' classes; the oracle needs the adapters' own data")
    job = TrainingJob(
        kind="oracle",
        config=config,
        training=training,
        folder=config.oracle_root,
        files=(),
        feature_uris=(),
        holdout_files=(),
        real_classes=classes,
        inputs={**_shared_inputs(config, training, backbone), "data": data.digest(), "classes": list(classes)},
    )
    return _train(job, backbone, reporter)


def _shared_inputs(config: ExperimentConfig, training: TrainConfig, backbone: Backbone) -> dict[str, Any]:
    validation = config.data.validation
    return {
        "step": "train",
        "seed": config.seed,
        "backbone": backbone.identity,
        "training": training.model_dump(mode="json"),
        "validation": load_data(validation).digest() if validation else None,
    }


def _train(job: TrainingJob, backbone: Backbone, reporter: Reporter) -> dict[str, Any]:
    claim_folder(job.folder, job.inputs, config=job.config.resolved())
    if exists(join(job.folder, CONFIG_NAME)):
        reporter.say(f"train: {job.folder} is finished already")
        return read_manifest(job.folder) or {}
    reporter.say(
        f"train: {job.kind} on "
        + (f"{len(by_adapter(job.files))} adapters" if job.files else f"{len(job.real_classes)} real classes")
    )
    with ray_session(job.config.ray):
        if job.training.relations.share:
            job = replace(job, feature_uris=see_with_every_adapter(job.config, job.files, reporter))
        tensors, facts = _fit(job, reporter)
    write_adapter(
        job.folder,
        _meta_lora(job, backbone, tensors),
        inputs=job.inputs,
        facts={
            "kind": job.kind,
            "best_step": facts["best_step"],
            "validation_accuracy": facts["best_accuracy"] if facts["best_accuracy"] >= 0 else None,
            "history": facts["history"],
            "config": job.config.resolved(),
        },
    )
    return read_manifest(job.folder) or {}


def _fit(job: TrainingJob, reporter: Reporter) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run Ray Train and show its steps; what the last checkpoint holds. A run of the same name goes on by itself."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Empty, Queue

    config = job.config.ray
    filesystem, path = arrow_filesystem(_checkpoints(job))
    steps: Any = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"job": job, "steps": steps},
        torch_config=TorchConfig(backend="nccl" if config.use_gpu_in_training else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.training.num_workers,
            use_gpu=config.use_gpu_in_training,
            resources_per_worker={"CPU": config.cpus_per_trainer},
        ),
        run_config=RunConfig(
            name=f"{job.kind}-{digest_of(job.inputs)[:12]}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except Exception as error:  # handed to the main thread, which raises it
            outcome.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    with reporter.track(f"train {job.kind}", job.training.num_steps) as advance:
        shown = 0
        while thread.is_alive() or not steps.empty():
            try:
                metrics = steps.get(timeout=1)
            except Empty:
                continue
            if isinstance(metrics, LrRayError):
                outcome.append(metrics)
                continue
            for _ in range(metrics["step"] - shown):
                advance(", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in metrics.items() if key != "step"))
            shown = max(shown, metrics["step"])
    thread.join()
    steps.shutdown()
    result = outcome[0]
    if isinstance(result, LrRayError):
        raise result
    if isinstance(result, Exception):
        if isinstance(result, ray.exceptions.RayError):
            raise user_error(result) from result
        failures = getattr(result, "worker_failures", {})
        for failure in failures.values():
            raise user_error(failure) from result
        with storage_errors("write to", _checkpoints(job)):
            if isinstance(failure := getattr(result, "controller_failure", None), OSError):
                raise failure
        raise ClusterError(f"meta-training failed: {result}") from result
    return _read_checkpoint(job, result.checkpoint)


def _checkpoints(job: TrainingJob) -> str:
    return join(job.folder, "training")


def train_loop_per_worker(arguments: dict[str, Any]) -> None:
    """Ray Train's worker; an error that trying again cannot mend goes to the driver, and the run ends."""
    try:
        _train_loop(arguments["job"], arguments["steps"])
    except LrRayError as error:
        arguments["steps"].put(error)


def _train_loop(job: TrainingJob, steps: Any) -> None:
    """Restore, then step, validate, report, until the steps are done."""
    import ray.train
    from ray.train import Checkpoint
    from ray.train.torch import get_device, prepare_model

    training = job.training
    torch.set_num_threads(job.config.ray.cpus_per_trainer)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    backbone = load_backbone(job.config.backbone, device=get_device())
    pool = _pool(job, backbone)
    trainer = MetaTrainer(
        backbone,
        pool,
        training,
        seed=job.config.seed,
        start_deltas=_start(job),
        relations=relation_targets(job.config, pool, job.feature_uris, backbone) if job.feature_uris else None,
        validation=_validation(job, backbone) if rank == 0 else None,
        rank=rank,
        world_size=world_size,
        wrap=prepare_model,
    )
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        trainer.load_state(*_read_checkpoint(job, checkpoint))
    while trainer.step < training.num_steps:
        metrics = trainer.run_step()
        if trainer.step % training.validate_every == 0 or trainer.step == training.num_steps:
            with tempfile.TemporaryDirectory() as folder:
                accuracy = trainer.validate() if rank == 0 else None
                metrics |= {} if accuracy is None else {"validation_accuracy": accuracy}
                if rank == 0:
                    _write_checkpoint(trainer, Path(folder))
                with storage_errors("write a checkpoint to", _checkpoints(job)):
                    ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)
        if rank == 0:
            steps.put(metrics)


def _pool(job: TrainingJob, backbone: Backbone) -> ImagePool:
    if job.files:
        return read_pool(job.config.synthetic_root, job.files)
    assert job.config.data.tune is not None
    data = load_data(job.config.data.tune).select(job.real_classes)
    num_classes = len(data.class_names)
    return ImagePool(
        images=data.pixels(np.arange(len(data)), backbone.image_px),
        class_of=data.labels,
        class_names=data.class_names,
        adapter_of=np.zeros(num_classes, dtype=int),
        slot_of=np.arange(num_classes),
    )


def _start(job: TrainingJob) -> dict[str, torch.Tensor] | None:
    """The scaled average of the adapters, or None to start from zero."""
    scale = job.training.init_scale
    if not scale:
        return None
    return {name: scale * delta for name, delta in average_deltas(read_adapters(job.config.adapters_root)).items()}


def _validation(job: TrainingJob, backbone: Backbone) -> Validation | None:
    shape = job.training.episode
    if job.config.data.validation is not None:
        data: LabelledImages = load_data(job.config.data.validation)
        images = data.pixels(np.arange(len(data)), backbone.image_px)
        return Validation(images=images, labels=data.labels, shape=_within(shape, data.labels))
    if not job.holdout_files:
        return None
    pool = read_pool(job.config.synthetic_root, job.holdout_files)
    return Validation(images=pool.images, labels=pool.class_of, shape=_within(shape, pool.class_of))


def _within(shape: EpisodeShape, labels: np.ndarray) -> EpisodeShape:
    """The training episodes' shape, its way no larger than the classes at hand."""
    return shape.model_copy(update={"n_way": min(shape.n_way, len(np.unique(labels)))})


def _write_checkpoint(trainer: MetaTrainer, folder: Path) -> None:
    tensors, facts = trainer.state()
    try:
        save_file(tensors, folder / "state.safetensors")
        (folder / "state.json").write_text(json.dumps(facts))
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write a checkpoint below {folder}: {error}; make room there and run again") from error


def _read_checkpoint(job: TrainingJob, checkpoint: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """From wherever Ray Train has put it."""
    with storage_errors("read a checkpoint from", _checkpoints(job)), checkpoint.as_directory() as folder:
        return load_file(Path(folder, "state.safetensors")), json.loads(Path(folder, "state.json").read_text())


def _meta_lora(job: TrainingJob, backbone: Backbone, tensors: dict[str, torch.Tensor]) -> Adapter:
    spec = AdapterSpec(adapter_id=job.kind, digest="", backbone=backbone.name, backbone_digest=backbone.digest, class_names=())
    return with_digest(Adapter(spec=spec, modules=best_modules(backbone, job.training.lora, tensors)))
