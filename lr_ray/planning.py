"""What a job will take on GPUs that are not here: FLOPs and memory of its steps, counted without running them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lr_ray.config import ExperimentConfig
from lr_ray.errors import BackboneError
from lr_ray.vit.backbone import BackboneConfig, architecture_of, check_architecture
from lr_ray.vit.embedded import EMBEDDED_PRIOR
from lr_ray.vit.tokens import encode, num_kept

SHARE_OF_PEAK = 0.3
"""Of a GPU's dense bf16 peak that a step is assumed to reach."""
_CONTEXT_GIB = 0.6
"""That CUDA itself takes for a process."""
_FRAGMENTS = 1.25
"""Of what torch reserves to what its tensors need."""
_LEAST_STEP_S = 0.01
"""A step launches about a thousand kernels, 10 µs each: below this one actor leaves a GPU idle, however small its work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """`tflops`: dense bf16 peak of its data sheet; `dollars_per_h`: of one GPU, on demand, rounded, one region's."""

    name: str
    memory_gib: float
    tflops: float
    dollars_per_h: float


GPUS = (
    Gpu(name="L4", memory_gib=22.5, tflops=121, dollars_per_h=0.80),
    Gpu(name="A10G", memory_gib=22.5, tflops=70, dollars_per_h=1.01),
    Gpu(name="A100 40 GB", memory_gib=39.5, tflops=312, dollars_per_h=2.75),
    Gpu(name="H100", memory_gib=79.0, tflops=989, dollars_per_h=6.90),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Of one optimiser step.

    Attributes:
        tflop: there and back.
        kept_mib: activations that the forward pass keeps for the backward pass.
    """

    tflop: float
    kept_mib: float


@dataclass(frozen=True, kw_only=True, slots=True)
class JobCost:
    """Of a config.

    Attributes:
        weights_mib: of the networks, fp32.
        inversion: its mean step, those for the metric included, and the memory of its largest.
        inversion_steps: of one adapter of `num_classes` classes.
        training: a step of all its episodes on one worker, and the memory of one episode.
    """

    weights_mib: float
    inversion: StepCost
    inversion_steps: int
    training: StepCost
    training_steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuPlan:
    """What that is on one kind of GPU.

    Attributes:
        actors: inversions at once that fill it, as far as its memory holds them; 0: not one.
        steps_per_s: of all of them.
        inversion_h: GPU hours of all adapters.
        training_h: hours of the meta-training on one GPU. Each is None where its memory does not do, and then `dollars` too.
    """

    gpu: str
    actors: int
    actor_mib: int
    steps_per_s: float
    inversion_h: float | None
    training_h: float | None
    dollars: float | None


def job_cost(config: ExperimentConfig, *, num_classes: int) -> JobCost:
    """Count the FLOPs and the memory of a config's steps; no weights are loaded and nothing is computed.

    Raises:
        BackboneError: timm does not know the backbone or the prior.
    """
    cost = _cost_of(config, num_classes)
    if config.metric_inversion is None:
        return cost
    more = _cost_of(config.for_metric, num_classes)
    steps = cost.inversion_steps + more.inversion_steps
    tflop = sum(part.inversion.tflop * part.inversion_steps for part in (cost, more)) / steps
    kept_mib = max(cost.inversion.kept_mib, more.inversion.kept_mib)
    return replace(
        cost,
        weights_mib=max(cost.weights_mib, more.weights_mib),
        inversion=StepCost(tflop=tflop, kept_mib=kept_mib),
        inversion_steps=steps,
    )


def _cost_of(config: ExperimentConfig, num_classes: int) -> JobCost:
    """Without the images for the metric."""
    inversion, training = config.inversion, config.training
    bounds = inversion.piece_bounds(num_classes)
    images = [(last - first) * inversion.images_per_class for first, last in pairwise(bounds)]
    batch = min(inversion.batch_size, max(images))
    batches = sum(math.ceil(count / inversion.batch_size) for count in images)
    filled = sum(images) / (batches * batch)  # the last batch of a piece may be a small one
    model = _vit(config.backbone)
    prior, weights = StepCost(tflop=0, kept_mib=0), _weights_mib(model)
    if inversion.prior_in_use is not None:
        network = _prior(inversion.prior_in_use)
        forward, side = getattr(network, "forward_features", network), _side_of(model)
        seen = num_kept(batch, inversion.prior_share)
        prior, weights = _cost(network, forward, seen, side, mixed=False), weights + _weights_mib(network)
    stages: dict[tuple[float, bool], int] = {}
    for step in range(inversion.num_steps):
        stage = (inversion.keep_ratio_at(step), step >= inversion.prune_from * inversion.num_steps)
        stages[stage] = stages.get(stage, 0) + 1
    costs = {(keep, pruned): _vit_cost(model, batch, keep, inversion.keep_ratios if pruned else {}) for keep, pruned in stages}
    mean = sum(costs[stage].tflop * count for stage, count in stages.items()) / inversion.num_steps
    shape = training.episode
    episode = shape.n_way * (shape.n_shot + shape.n_query)
    of_episode = _vit_cost(model, episode, training.keep_ratio, {}, recompute=training.recompute)
    return JobCost(
        weights_mib=weights,
        inversion=StepCost(
            tflop=filled * (mean + prior.tflop / inversion.prior_every),
            kept_mib=max(cost.kept_mib for cost in costs.values()) + prior.kept_mib,
        ),
        inversion_steps=batches * inversion.num_steps,
        training=StepCost(tflop=of_episode.tflop * training.episodes_per_step, kept_mib=of_episode.kept_mib),
        training_steps=training.num_steps,
    )


def plan_on(gpu: Gpu, cost: JobCost, *, num_adapters: int) -> GpuPlan:
    """A job on one kind of GPU, at `SHARE_OF_PEAK`, which the actors on it share."""
    actor_mib = _CONTEXT_GIB * 1024 + _FRAGMENTS * (cost.weights_mib + cost.inversion.kept_mib)
    rate = SHARE_OF_PEAK * gpu.tflops
    most = rate / cost.inversion.tflop
    actors = min(int(gpu.memory_gib * 1024 / actor_mib), math.ceil(most * _LEAST_STEP_S))
    steps_per_s = min(most, actors / _LEAST_STEP_S)
    inversion_h = num_adapters * cost.inversion_steps / steps_per_s / 3600 if actors else None
    trainer_mib = _CONTEXT_GIB * 1024 + _FRAGMENTS * (cost.weights_mib + cost.training.kept_mib)
    trains = trainer_mib <= gpu.memory_gib * 1024
    training_h = cost.training_steps * max(cost.training.tflop / rate, _LEAST_STEP_S) / 3600 if trains else None
    return GpuPlan(
        gpu=gpu.name,
        actors=actors,
        actor_mib=round(actor_mib),
        steps_per_s=steps_per_s,
        inversion_h=inversion_h,
        training_h=training_h,
        dollars=None if inversion_h is None or training_h is None else (inversion_h + training_h) * gpu.dollars_per_h,
    )


def _vit(config: BackboneConfig) -> VisionTransformer:
    architecture, arguments = architecture_of(config.name)
    size = {"img_size": check_architecture(architecture, config), "num_classes": 0}
    with torch.device("meta"):
        model = timm.create_model(architecture, **{**arguments, **size})
    return model.eval().requires_grad_(False)


def _prior(name: str) -> nn.Module:
    architecture = EMBEDDED_PRIOR.architecture if name == "efficientnet-lite0" else name
    try:
        with torch.device("meta"):
            network: nn.Module = timm.create_model(architecture)
    except RuntimeError as error:
        raise BackboneError(f"prior {name!r}: {error}; inversion.prior is 'efficientnet-lite0' or a timm CNN") from error
    return network.eval().requires_grad_(False)


def _weights_mib(network: nn.Module) -> float:
    return 4 * sum(int(value.nelement()) for value in network.state_dict().values()) / 2**20


def _vit_cost(
    model: VisionTransformer, batch: int, keep_ratio: float, keep_ratios: dict[int, float], *, recompute: bool = False
) -> StepCost:
    patches = model.patch_embed.num_patches
    kept = None if keep_ratio == 1 else num_kept(patches, keep_ratio)

    def run(images: Tensor) -> Tensor:
        keep_indices = None if kept is None else torch.zeros(batch, kept, dtype=torch.long)
        found = encode(model, images, keep_indices=keep_indices, keep_ratios=keep_ratios, recompute=recompute)
        return found.features

    for block in model.blocks:
        block.attn.fused_attn = False  # whose FLOPs are counted
    tflop = _cost(model, run, batch, _side_of(model)).tflop
    for block in model.blocks:
        block.attn.fused_attn = True  # which a GPU runs, and which keeps no matrix
    return StepCost(tflop=tflop, kept_mib=_cost(model, run, batch, _side_of(model)).kept_mib)


def _side_of(model: VisionTransformer) -> int:
    """Of its images, in pixels."""
    return int(model.patch_embed.img_size[0])


def _cost(network: nn.Module, run: Callable[[Tensor], Tensor], batch: int, side: int, *, mixed: bool = True) -> StepCost:
    """Forward and backward to the images, on tensors that have shapes and no values."""
    kept: dict[int, Any] = {}
    with FakeTensorMode(), _imagined(network):
        weights = {value.untyped_storage()._cdata for value in network.state_dict(keep_vars=True).values()}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept[storage._cdata] = storage
            return tensor

        images = torch.empty(batch, 3, side, side, requires_grad=True)
        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                features = run(images)
            features.float().square().mean().backward()
        nbytes = sum(storage.nbytes() for storage in kept.values())
    return StepCost(tflop=counter.get_total_flops() / 1e12, kept_mib=nbytes / 2**20)


@contextmanager
def _imagined(network: nn.Module) -> Iterator[None]:
    """The network's tensors on a processor, without values; those of before are put back."""
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in network.modules()]
    try:
        for module, parameters, buffers in before:
            for name, parameter in parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape), requires_grad=False)
            for name, buffer in buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
