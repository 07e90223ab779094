"""Ray Train's worker: restore, then step, validate, report, until the training is finished."""

import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lr_ray.errors import AdapterError, StorageError
from lr_ray.fewshot.metatrain import MetaTrainer
from lr_ray.fewshot.metric import fit_metric
from lr_ray.fewshot.stream import distinct_names
from lr_ray.runtime.metric import embed_classes
from lr_ray.runtime.stream import stream_batches
from lr_ray.runtime.training_job import TrainingJob, read_shelves, validation_of
from lr_ray.storage.adapters import read_adapters
from lr_ray.storage.filesystem import join, storage_errors
from lr_ray.storage.metric import write_metric
from lr_ray.vit.backbone import load_backbone
from lr_ray.vit.lora import average_updates


def train(job: TrainingJob, loader: Any, steps: Any, *, rank: int, world_size: int) -> None:
    """Train to the end, from the last checkpoint if there is one.

    Args:
        loader: handle of this worker's `BatchLoader`.
        steps: queue that the first worker tells its metrics.
    """
    import ray.train
    from ray.train.torch import get_device, prepare_model

    torch.set_num_threads(job.config.ray.cpus_per_trainer)
    checkpoint = ray.train.get_checkpoint()
    saved = None if checkpoint is None else read_checkpoint(job, checkpoint)
    batches = stream_batches(job, loader, start=saved[1]["step"] if saved else 0, world_size=world_size)
    trainer = MetaTrainer(
        load_backbone(job.config.backbone, device=get_device()),
        job.training,
        seed=job.config.seed,
        num_classes=len(distinct_names(job.refs)),
        start_updates=_start(job),
        validation=validation_of(job) if rank == 0 else None,
        world_size=world_size,
        wrap=prepare_model,
    )
    if saved is not None:
        trainer.load_state(*saved)
    began = waited = 0.0
    while not trainer.finished:
        asked = time.perf_counter()
        drawn = next(batches)
        began = began or time.perf_counter()  # the first ones are waited for while the stream starts
        waited += max(0.0, time.perf_counter() - max(asked, began))
        metrics = trainer.run_step(drawn)
        if job.training.validates_at(trainer.step):
            _validate_and_report(job, trainer, metrics, rank=rank, world_size=world_size)
        if rank == 0:
            steps.put(metrics | {"waiting_for_images": waited / (time.perf_counter() - began)})
    batches.close()
    if rank == 0:
        _write_metric(job, trainer)


def _validate_and_report(
    job: TrainingJob, trainer: MetaTrainer, metrics: dict[str, float], *, rank: int, world_size: int
) -> None:
    """The first worker validates and writes the checkpoint; the others learn from it which step is the best."""
    import ray.train
    from ray.train import Checkpoint
    from ray.train.collective import broadcast_from_rank_zero

    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            accuracy = trainer.validate()
            metrics |= {} if accuracy is None else {"validation_accuracy": accuracy}
            _write_checkpoint(trainer, Path(folder))
        if world_size > 1:
            trainer.best_step = broadcast_from_rank_zero(trainer.best_step)
        with storage_errors("write a checkpoint to", checkpoints_of(job)):
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)


def _write_metric(job: TrainingJob, trainer: MetaTrainer) -> None:
    """Fitted on images of its own, or on what was trained on, as the best weights see them; the driver commits it."""
    read, config = partial(read_shelves, replace(job, config=job.config.for_metric)), job.training.metric
    features, kind_of = embed_classes(job.metric_refs or job.refs, read, trainer.embed_by_best, config, seed=job.config.seed)
    if not torch.isfinite(features).all():
        raise AdapterError(f"{job.kind}: the trained weights give NaN or infinite features; lower training.schedule.highest")
    write_metric(checkpoints_of(job), fit_metric(features, kind_of, config))


def _start(job: TrainingJob) -> dict[str, torch.Tensor] | None:
    """The scaled average of the adapters, or None to start from zero."""
    scale = job.training.init_scale
    if not scale:
        return None
    return {name: scale * update for name, update in average_updates(read_adapters(job.config.adapters_root)).items()}


def checkpoints_of(job: TrainingJob) -> str:
    """Where Ray Train keeps them."""
    return join(job.folder, "training")


def _write_checkpoint(trainer: MetaTrainer, folder: Path) -> None:
    tensors, facts = trainer.state()
    try:
        save_file(tensors, folder / "state.safetensors")
        (folder / "state.json").write_text(json.dumps(facts))
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write a checkpoint below {folder}: {error}; make room there and run again") from error


def read_checkpoint(job: TrainingJob, checkpoint: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and facts of `MetaTrainer.state`, from wherever Ray Train has put them.

    Raises:
        StorageError: unreadable or damaged.
    """
    with storage_errors("read a checkpoint from", checkpoints_of(job)), checkpoint.as_directory() as folder:
        try:
            return load_file(Path(folder, "state.safetensors")), json.loads(Path(folder, "state.json").read_text())
        except (SafetensorError, ValueError) as error:
            remedy = "delete that folder to start over"
            raise StorageError(f"a checkpoint in {checkpoints_of(job)} is damaged ({error}); {remedy}") from error
