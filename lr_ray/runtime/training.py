"""`lr-ray train`: meta-training by Ray Train, from synthetic images or, for the oracle, from real ones."""

import json
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch

from lr_ray.config import ExperimentConfig, RayConfig
from lr_ray.errors import ClusterError, LrRayError, StorageError
from lr_ray.fewshot.metatrain import kept_modules
from lr_ray.report.card import model_card
from lr_ray.report.curves import Curves
from lr_ray.report.progress import Advance, Reporter
from lr_ray.report.trackers import TrackedRun, Tracker, open_trackers
from lr_ray.runtime.held import held_backbone
from lr_ray.runtime.relations import see_with_every_adapter
from lr_ray.runtime.session import ray_session, this_node, user_error
from lr_ray.runtime.train_entry import train_loop_per_worker
from lr_ray.runtime.train_loop import checkpoints_of, read_checkpoint
from lr_ray.runtime.training_job import TrainingJob, joint_job, meta_lora_job, oracle_job
from lr_ray.storage.adapters import with_digest, write_adapter
from lr_ray.storage.filesystem import (
    arrow_filesystem,
    delete,
    exists,
    join,
    read_bytes,
    read_if_there,
    storage_errors,
    write_bytes,
)
from lr_ray.storage.manifest import CONFIG_NAME, METRIC_NAME, claim_folder, digest_of, read_manifest
from lr_ray.storage.measurements import read_tensors
from lr_ray.storage.synthetic import by_adapter
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import Adapter, AdapterSpec

Kind = Literal["meta_lora", "joint", "oracle"]
"""What `TrainingJob.kind` says."""
Result = TypeVar("Result")

_RECORD = "checkpoint_manager_snapshot.json"
"""Ray Train's, in a run's folder: written in place, and read before anything else."""
_END_S = 10.0
"""So long a training may take to end that one of its workers has given up."""
KINDS: tuple[Kind, ...] = get_args(Kind)
_BACKBONE = threading.Lock()
"""A LoRA sits on it for a moment, and trainings side by side share it."""
_JOBS: dict[Kind, Callable[[ExperimentConfig, Backbone], TrainingJob]] = {
    "meta_lora": meta_lora_job,
    "joint": joint_job,
    "oracle": oracle_job,
}


def train_meta_lora(config: ExperimentConfig, reporter: Reporter) -> dict[str, Any]:
    """Meta-train on the synthetic images; returns the manifest of the meta-LoRA.

    Raises:
        StorageError: the images cannot be used, or the folder holds another run's meta-LoRA.
        EpisodeError: too few classes or images for the episodes.
        ClusterError: too few machines, or workers were lost more often than `ray.max_failures`.
    """
    return train_together(config, ["meta_lora"], reporter)[0]


def train_oracle(config: ExperimentConfig, reporter: Reporter) -> dict[str, Any]:
    """The same meta-training, from zero and without teachers, on the real images of the adapters' classes.

    Raises:
        ConfigError: no real images are given, or none of the adapters' classes.
        EpisodeError, StorageError, ClusterError: as of `train_meta_lora`.
    """
    return train_together(config, ["oracle"], reporter)[0]


def train_joint(config: ExperimentConfig, reporter: Reporter) -> dict[str, Any]:
    """Plain supervision on the synthetic images, with which the episodes are compared; raises what `train_meta_lora` does."""
    return train_together(config, ["joint"], reporter)[0]


def train_together(config: ExperimentConfig, kinds: Sequence[Kind], reporter: Reporter) -> list[dict[str, Any]]:
    """Several trainings, side by side where Ray has room for all of them, else in turn; their manifests.

    Raises:
        LrRayError: what the first of them that failed raises, side by side when the others are done; before any begins, if its
            images or its folder cannot be used.
    """
    backbone = held_backbone(config.backbone)
    jobs = [_JOBS[kind](config, backbone) for kind in kinds]
    for job in jobs:
        claim_folder(job.folder, job.inputs, config=job.config.resolved())
    stop = threading.Event()
    trainings = {job.kind: partial(_train, job, backbone, reporter, stop) for job in jobs}
    if len(trainings) == 1:
        return [training() for training in trainings.values()]
    with ray_session(config.ray):
        if _room_for_workers(config) < len(trainings) * config.training.num_workers:
            return [training() for training in trainings.values()]
        return side_by_side(trainings, stop, reporter)


def side_by_side(trainings: Mapping[str, Callable[[], Result]], stop: threading.Event, reporter: Reporter) -> list[Result]:
    """What they return, each run in a thread; what fails is said, does not keep the others, and is raised when all are done.

    Args:
        stop: set when this is interrupted; those that look at it may end what they have open before the interrupt goes on.
    """
    finished: queue.SimpleQueue[tuple[str, Result | BaseException]] = queue.SimpleQueue()

    def run(name: str) -> None:
        try:
            finished.put((name, trainings[name]()))
        except BaseException as error:  # handed to the caller, which raises it
            finished.put((name, error))

    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in trainings]
    for thread in threads:
        thread.start()
    results: dict[str, Result] = {}
    failures: list[BaseException] = []
    try:
        for _ in trainings:
            name, result = finished.get()
            if isinstance(result, BaseException):
                failures.append(result)
                reporter.say(f"train {name}: failed: {' '.join(str(result).split())}")
            else:
                results[name] = result
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join(_END_S)
        raise
    if failures:
        raise failures[0]
    return [results[name] for name in trainings]


def _train(job: TrainingJob, backbone: Backbone, reporter: Reporter, stop: threading.Event) -> dict[str, Any]:
    if exists(join(job.folder, CONFIG_NAME)):
        reporter.say(f"train: {job.folder} is finished already")
        return read_manifest(job.folder) or {}
    reporter.say(f"train: {job.kind} on {_material(job)}")
    run = TrackedRun(name=job.config.name, kind=job.kind, digest=digest_of(job.inputs), config=job.config.resolved())
    with open_trackers(job.config.tracking, run, reporter) as trackers, ray_session(job.config.ray):
        _check_workers(job, reporter)
        if job.training.relations.share:
            job = replace(job, feature_uris=see_with_every_adapter(job.config, job.files, reporter))
        tensors, facts = _fit(job, trackers, reporter, stop)
    if exists(join(job.folder, CONFIG_NAME)):  # another command was faster, and what it wrote belongs together
        reporter.say(f"train: {job.folder} was finished meanwhile")
        return read_manifest(job.folder) or {}
    fitted = join(checkpoints_of(job), METRIC_NAME)
    metric = read_tensors(fitted)[1]["digest"]
    write_bytes(join(job.folder, METRIC_NAME), read_bytes(fitted))
    common = {"kind": job.kind, "history": facts["history"], "config": job.config.resolved()}
    last = _meta_lora(job, backbone, tensors, which="last")
    write_adapter(join(job.folder, "last"), last, inputs=job.inputs, facts={"step": facts["step"], **common})
    write_adapter(
        job.folder,
        _meta_lora(job, backbone, tensors, which="best"),
        inputs=job.inputs,
        facts={
            "best_step": facts["best_step"],
            "validation_accuracy": facts["best_accuracy"] if facts["best_accuracy"] >= 0 else None,
            "metric": metric,
            **job.facts,
            **common,
        },
        card=model_card,
    )
    return read_manifest(job.folder) or {}


def _material(job: TrainingJob) -> str:
    """What it trains on, and how much of it is in memory at a time."""
    of = f"{len(by_adapter(job.files))} adapters" if job.files else "real images"
    held = min(len(job.refs), job.training.stream.buffer_classes)
    image_bytes = 3 * job.image_px**2
    size = held * max(ref.num_images for ref in job.refs) * image_bytes / 1e6
    return f"{len(job.refs)} classes of {of}, of which {held} in memory ({size:.0f} MB a worker)"


def _check_workers(job: TrainingJob, reporter: Reporter) -> None:
    """Raise if this machine cannot hold the workers; say so if a cluster cannot yet.

    Raises:
        ClusterError: too few processors or GPUs.
    """
    config, room = job.config.ray, _room_for_workers(job.config)
    least = job.training.min_workers or job.training.num_workers
    if room >= least:
        return
    need = " and ".join(f"{count} {name}" for name, count in _needs_of_worker(config).items())
    problem = f"training.num_workers {job.training.num_workers}: there is room for {room} workers of {need} each"
    if config.address == "local":
        raise ClusterError(f"{problem}; lower it, or ray.cpus_per_trainer, or raise ray.num_cpus")
    reporter.say(f"{problem}; waiting for more machines")


def _room_for_workers(config: ExperimentConfig) -> int:
    """How many workers the nodes hold that Ray has now."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(name, 0) // need) for name, need in _needs_of_worker(config.ray).items()) for node in nodes)


def _needs_of_worker(config: RayConfig) -> dict[str, int]:
    return {"CPU": config.cpus_per_trainer} | ({"GPU": 1} if config.use_gpu_in_training else {})


def _fit(
    job: TrainingJob, trackers: Sequence[Tracker], reporter: Reporter, stop: threading.Event
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run Ray Train and show its steps; what the last checkpoint holds. A run of the same name goes on by itself."""
    from ray.util.queue import Queue

    beside_the_driver = {"num_cpus": 0, "scheduling_strategy": this_node()}  # lost with it, and only then
    steps: Any = Queue(actor_options=beside_the_driver)
    trainer = _trainer_of(job, steps, reporter)
    outcome: list[Any] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except Exception as error:  # handed to the main thread, which raises it
            outcome.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    refused, unwritten = _show(job, thread, steps, trackers, reporter, stop)
    thread.join(_END_S if refused else None)  # where one worker has ended, others may wait for it
    steps.shutdown()
    if refused is not None:
        raise refused
    checkpoint = _checkpoint_of(job, outcome[0])
    if unwritten is not None:
        raise unwritten
    return read_checkpoint(job, checkpoint)


def _trainer_of(job: TrainingJob, steps: Any, reporter: Reporter) -> Any:
    """Ray Train's, whose workers put the metrics of each step into the queue."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config, most = job.config.ray, job.training.num_workers
    filesystem, path = arrow_filesystem(checkpoints_of(job))
    name = f"{job.kind}-{digest_of(job.inputs)[:12]}"
    _drop_if_torn(join(checkpoints_of(job), name, _RECORD), reporter)
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"job": ray.put(job), "steps": steps, "max_failures": config.max_failures},
        torch_config=TorchConfig(backend="nccl" if config.use_gpu_in_training else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(least, most) if (least := job.training.min_workers) and least < most else most,
            use_gpu=config.use_gpu_in_training,
            resources_per_worker={"CPU": config.cpus_per_trainer},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )


def _show(
    job: TrainingJob,
    training: threading.Thread,
    steps: Any,
    trackers: Sequence[Tracker],
    reporter: Reporter,
    stop: threading.Event,
) -> tuple[LrRayError | None, StorageError | None]:
    """Show each step, as long as the training lasts; what a worker gave up with, and why curves could not be written.

    Raises:
        KeyboardInterrupt: in the thread of a training, when the main one was interrupted.
    """
    from ray.util.queue import Empty

    shown, unwritten = 0, None
    with ExitStack() as bar, Curves(job.folder) as curves:
        advance: Advance | None = None
        while training.is_alive() or not steps.empty():
            if stop.is_set():
                raise KeyboardInterrupt
            try:
                metrics = steps.get(timeout=1)
            except Empty:
                continue
            if isinstance(metrics, LrRayError):
                return metrics, unwritten
            if metrics["step"] <= shown:  # done again, after a worker was lost
                continue
            validated = job.training.validates_at(metrics["step"])
            for tracker in trackers:
                tracker.add(metrics)
                if validated:
                    tracker.commit()
            curves.add(metrics)
            if validated:
                try:
                    curves.commit()
                except StorageError as error:  # a failure of the training itself comes before it
                    unwritten = unwritten or error
            if advance is None:
                shown = metrics["step"] - 1  # an earlier run had done
                advance = bar.enter_context(reporter.track(f"train {job.kind}", job.training.num_steps, done=shown))
            for _ in range(metrics["step"] - shown):
                advance(", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in metrics.items() if key != "step"))
            shown = metrics["step"]
    return None, unwritten


def _checkpoint_of(job: TrainingJob, result: Any) -> Any:
    """The last one of a training that ended well; else what it ended with is raised."""
    import ray

    if not isinstance(result, Exception):
        return result.checkpoint
    if isinstance(result, ray.exceptions.RayError):
        raise user_error(result) from result
    for failure in getattr(result, "worker_failures", {}).values():
        raise user_error(failure) from result
    with storage_errors("write to", checkpoints_of(job)):
        if isinstance(failure := getattr(result, "controller_failure", None), OSError):
            raise failure
    raise ClusterError(f"meta-training failed: {result}") from result


def _drop_if_torn(uri: str, reporter: Reporter) -> None:
    """Delete Ray Train's record of its checkpoints if its writer was killed over it, for with it nothing starts."""
    content = read_if_there(uri)
    if content is None:
        return
    try:
        json.loads(content)
    except ValueError:
        reporter.say(f"train: {uri}, which tells the checkpoints, is damaged; beginning anew")
        delete(uri)


def _meta_lora(
    job: TrainingJob, backbone: Backbone, tensors: dict[str, torch.Tensor], *, which: Literal["best", "last"]
) -> Adapter:
    spec = AdapterSpec(adapter_id=job.kind, digest="", backbone=backbone.name, backbone_digest=backbone.digest, class_names=())
    with _BACKBONE:
        modules = kept_modules(backbone, job.training.lora, tensors, which=which)
    return with_digest(Adapter(spec=spec, modules=modules))
