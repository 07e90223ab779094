"""`--fast auto`: about a minute of inversion steps on the machine that will do them, and what that says to choose."""

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from lr_ray.config import ExperimentConfig, RayConfig
from lr_ray.errors import ClusterError, InversionError, LrRayError, StorageError, gpu_is_full
from lr_ray.inversion.invert import InversionBatch, InversionConfig
from lr_ray.inversion.priors import BatchNormPrior
from lr_ray.report.progress import Reporter
from lr_ray.runtime.barrier import start_barrier
from lr_ray.runtime.inversion import load_prior_of
from lr_ray.runtime.session import map_tasks, ray_session, worker_device
from lr_ray.storage.filesystem import exists, join, read_if_there, write_bytes
from lr_ray.storage.manifest import CLAIM_NAME, versions
from lr_ray.vit.backbone import Backbone, Precision, load_backbone
from lr_ray.vit.lora import Adapter, AdapterSpec

CHOICE_NAME = "fast.json"
_BATCHES = (10, 20, 40, 80, 160)
_TRIAL_S = 2.5
_TOGETHER_S = 300.0
"""In which all actors of an arrangement must have started, or finished the variant before."""
_CLOSE = 0.97
"""Of the best speed: a smaller batch, or the arrangement as configured, is kept for that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrangement:
    """Actors side by side on one device: all the processors, or one GPU."""

    actors: int
    cpus_per_actor: int
    num_gpus_per_actor: float

    def __str__(self) -> str:
        each = (
            f"{self.num_gpus_per_actor:g} GPU"
            if self.num_gpus_per_actor
            else f"{self.cpus_per_actor} processor{'s' if self.cpus_per_actor > 1 else ''}"
        )
        return f"{self.actors} actor{'s' if self.actors > 1 else ''} of {each}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trial:
    """What one of the actors of an arrangement is to try; the barrier lets all begin each variant together."""

    config: ExperimentConfig
    variants: tuple[tuple[Precision, int], ...]
    seconds: float
    actors: int
    barrier: Any


def choose_by_probe(config: ExperimentConfig, reporter: Reporter) -> ExperimentConfig:
    """The config, for its inversion, with the fastest batch size, precision and actors that a probe found.

    Kept in OUTPUT/fast.json. Batch size and precision change the images a little, so a run that goes on takes what was chosen
    when it began; the actors only on a machine of as many processors and GPUs.

    Raises:
        LrRayError: the backbone or the prior cannot be loaded, or not even the smallest batch fits.
        StorageError: the images were begun without `--fast`, or what was chosen then cannot be read.
    """
    uri = join(config.output_root, CHOICE_NAME)
    content = read_if_there(uri)
    with ray_session(config.ray):
        machine = _largest_node()
        if content is None:
            for root in (config.synthetic_root, config.for_metric.synthetic_root):
                if exists(join(root, CLAIM_NAME)):
                    raise StorageError(f"{root} was begun without --fast; leave it out, or choose another --output")
            found = _probe(config, reporter) | {"machine": machine}
            write_bytes(uri, json.dumps(found | {"versions": versions()}, indent=2).encode())
        else:
            found = _read_choice(content, uri)
            reporter.say(f"fast: as chosen before, {uri}: {found['chosen']}")
    chosen = found["chosen"]
    actors = chosen["ray"] if found["machine"] == machine else {}
    metric = config.metric_inversion
    return config.model_copy(
        update={
            "inversion": config.inversion.model_copy(update=chosen["inversion"]),
            "metric_inversion": None if metric is None else metric.model_copy(update=chosen["inversion"]),
            "ray": config.ray.model_copy(update=actors),
        }
    )


class _Chosen(BaseModel):
    inversion: dict[str, Any]
    ray: dict[str, Any]


class _Choice(BaseModel):
    """What of the file is read."""

    chosen: _Chosen
    machine: dict[str, float]


def _read_choice(content: bytes, uri: str) -> dict[str, Any]:
    """Raises: StorageError, it is not what was written."""
    try:
        return _Choice.model_validate_json(content).model_dump()
    except ValidationError as error:
        raise StorageError(f"{uri} is damaged; choose another --output, or delete it and the images") from error


def _largest_node() -> dict[str, float]:
    """The processors and GPUs that one actor may find on one machine."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return {name: max(found.get(name, 0.0) for found in resources) for name in ("CPU", "GPU")}


def _probe(config: ExperimentConfig, reporter: Reporter) -> dict[str, Any]:
    precisions: tuple[Precision, ...] = ("bf16", "fp32")
    most = config.tuning.n_way * config.inversion.images_per_class
    batches = sorted({*(size for size in _BATCHES if size < most), most})
    arrangements = _arrangements(config)
    plain = _speeds(config, arrangements[0], tuple((precision, batches[0]) for precision in precisions))
    precision = max(precisions, key=lambda name: plain[name, batches[0]])
    others = "; ".join(f"{name} {speed:.1f}" for (name, _), speed in plain.items())
    reporter.say(f"fast: precision {precision} (images/s of the machine: {others})")
    tried: dict[tuple[Arrangement, int], float] = {}
    for arrangement in arrangements:
        of_batches = _speeds(config, arrangement, tuple((precision, size) for size in batches))
        tried |= {(arrangement, size): speed for (_, size), speed in of_batches.items()}
    best = max(tried.values())
    if not best:
        raise ClusterError(f"--fast auto: no batch of {batches[0]} images fits into memory; lower backbone.image_px")
    arrangement, batch_size = next(pair for pair, speed in tried.items() if speed >= _CLOSE * best)
    told = "; ".join(f"{where}, batches of {size}: {speed:.1f}" for (where, size), speed in tried.items())
    reporter.say(f"fast: {arrangement}, batches of {batch_size}: within {100 * (1 - _CLOSE):.0f} % of the best ({told})")
    return {
        "chosen": {
            "inversion": {"precision": precision, "batch_size": batch_size},
            "ray": {"cpus_per_actor": arrangement.cpus_per_actor, "num_gpus_per_actor": arrangement.num_gpus_per_actor},
        },
        "tried": [
            *({"precision": name, "batch_size": size, "images_per_s": round(s, 2)} for (name, size), s in plain.items()),
            *({**asdict(where), "batch_size": size, "images_per_s": round(s, 2)} for (where, size), s in tried.items()),
        ],
    }


def _arrangements(config: ExperimentConfig) -> list[Arrangement]:
    """As configured first; of one machine, and on a machine with GPUs of one of them.

    Raises:
        ClusterError: no machine has a processor.
    """
    node, given = _largest_node(), config.ray
    cpus = int(node["CPU"])
    if cpus < 1:
        raise ClusterError("--fast auto: no machine of this Ray has a processor yet; start one, or leave --fast out")
    if given.num_gpus_per_actor:
        of_a_gpu = cpus // max(1, int(node["GPU"]))
        most = _at_most(given, max(1, of_a_gpu // given.cpus_per_actor))
        shares = dict.fromkeys([given.num_gpus_per_actor, *(share for share in (1.0, 0.5, 0.25) if 1 / share <= most)])
        return [
            Arrangement(actors=min(most, max(1, int(1 / share))), cpus_per_actor=given.cpus_per_actor, num_gpus_per_actor=share)
            for share in shares
        ]
    sizes = dict.fromkeys([min(given.cpus_per_actor, cpus), 1, cpus])
    return [Arrangement(actors=_at_most(given, cpus // size), cpus_per_actor=size, num_gpus_per_actor=0.0) for size in sizes]


def _at_most(given: RayConfig, actors: int) -> int:
    return min(actors, given.max_actors or actors)


def _speeds(
    config: ExperimentConfig, arrangement: Arrangement, variants: Sequence[tuple[Precision, int]]
) -> dict[tuple[Precision, int], float]:
    """Images optimised by one step, a second, of all actors of the arrangement together; 0 of what ran out of memory."""
    held = {"cpus_per_actor": arrangement.cpus_per_actor, "num_gpus_per_actor": arrangement.num_gpus_per_actor}
    ray_config = config.ray.model_copy(update=held | {"max_failures": 0})
    barrier = start_barrier(arrangement.actors, timeout_s=_TOGETHER_S)
    changed = config.model_copy(update={"ray": ray_config})
    count = arrangement.actors
    trial = _Trial(config=changed, variants=tuple(variants), seconds=_TRIAL_S, actors=count, barrier=barrier)
    total = dict.fromkeys(variants, 0.0)
    lost: LrRayError | None = None
    for _, speeds in map_tasks(_try, [trial] * arrangement.actors, ray_config):
        if isinstance(speeds, LrRayError):
            lost = lost or speeds
            barrier.abort.remote()
            continue
        for variant, speed in zip(variants, speeds, strict=True):
            total[variant] += speed
    if isinstance(lost, ClusterError):  # a processor's memory ran out: without the largest batch
        fewer = _speeds(config, arrangement, variants[:-1]) if len(variants) > 1 else {}
        return fewer | {variants[-1]: 0.0}
    if lost is not None:
        raise lost
    return total


def _try(trial: _Trial) -> list[float]:
    """Images a second of each variant, by this actor; 0 of one that needs more memory than the device has."""
    import ray

    config = trial.config
    device = worker_device(config.ray)
    backbone, prior = load_backbone(config.backbone, device=device), load_prior_of(config, device)
    found = []
    for precision, batch_size in trial.variants:
        if not ray.get(trial.barrier.wait.remote()):
            raise InversionError(
                f"--fast auto: {trial.actors} actors did not all get to work at once; other work holds the processors: "
                "wait for it, or leave --fast out"
            )
        inversion = config.inversion.model_copy(update={"precision": precision, "num_steps": 1_000_000})
        try:
            found.append(_images_per_s(inversion, backbone, prior, batch_size, trial.seconds))
        except RuntimeError as error:
            if not gpu_is_full(error):
                raise
            found.append(0.0)
    return found


def _images_per_s(
    inversion: InversionConfig, backbone: Backbone, prior: BatchNormPrior | None, batch_size: int, seconds: float
) -> float:
    spec = AdapterSpec(adapter_id="probe", digest="", backbone="", backbone_digest="", class_names=("", ""))
    head = torch.randn(2, backbone.num_features, device=backbone.device)
    batch = InversionBatch(
        Adapter(spec=spec, modules={}, head_weight=head),
        backbone,
        torch.arange(batch_size) % 2,
        inversion,
        prior=prior,
        generator=torch.Generator().manual_seed(0),
    )
    with prior or nullcontext():
        batch.run_step()
        steps, start = 0, time.perf_counter()
        while steps < 2 or time.perf_counter() - start < seconds:
            batch.run_step().sum().item()  # a GPU is done only then
            steps += 1
    return steps * batch_size / (time.perf_counter() - start)
