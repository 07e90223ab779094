"""An inversion step: LR-Ray's variants against the textbook's, in one run."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lr_ray.bench.speed import Bench, Step, Variant, measure, take_turns
from lr_ray.bench.textbook import TextbookInversion
from torch import Tensor

from lr_ray.inversion.invert import InversionBatch, InversionConfig
from lr_ray.inversion.priors import load_prior
from lr_ray.report.progress import Reporter
from lr_ray.vit.backbone import Backbone, BackboneConfig, autocast, load_backbone
from lr_ray.vit.lora import Adapter, AdapterSpec, LoRAConfig, LowRank, attach_lora, detach_lora, extract_lora, merged
from lr_ray.vit.tokens import encode

NUM_CLASSES = 5
ATTENDED: dict[str, Any] = {"sparse": {0.25: 0.5, 0.5: 0.25}, "prior_every": 4}
"""The most attended patches, and a lazy prior: bench/results/paired-speed.json has what they cost."""
HALF: dict[str, Any] = {"sparse": {0.0: 0.5}, "sparse_patches": "random"}
QUARTER: dict[str, Any] = {"sparse": {0.0: 0.25}, "sparse_patches": "random"}
"""Patches drawn anew at every step: bench/results/gain-cifar-fs-sparse.json has what they cost."""
_PAPER = {"views": {"roll": 0.125, "flip": True}, "prior_weight": 10.0}


def random_adapter(backbone: Backbone, seed: int = 0) -> Adapter:
    """Of rank 4 on query and value, as the paper's; time does not depend on its weights."""
    generator = torch.Generator().manual_seed(seed)
    attach_lora(backbone.model, LoRAConfig(), generator=generator)
    modules = {
        name: LowRank(a=found.a.clone(), b=0.01 * torch.randn(found.b.shape, generator=generator), scale=found.scale)
        for name, found in extract_lora(backbone.model).items()
    }
    detach_lora(backbone.model)
    spec = AdapterSpec(adapter_id="random", digest="", backbone="", backbone_digest="", class_names=("",) * NUM_CLASSES)
    head = 0.05 * torch.randn(NUM_CLASSES, backbone.num_features, generator=generator)
    return Adapter(spec=spec, modules=modules, head_weight=head, head_bias=torch.zeros(NUM_CLASSES))


def _textbook(backbone: BackboneConfig, batch_size: int) -> Step:
    loaded = load_backbone(backbone)
    labels = torch.arange(batch_size) % NUM_CLASSES
    generator, prior = torch.Generator().manual_seed(0), load_prior("efficientnet-lite0")
    batch = TextbookInversion(random_adapter(loaded), loaded, labels, prior, prior_weight=10, generator=generator)
    return batch.run_step


def _ours(backbone: BackboneConfig, batch_size: int, steps: int, changes: dict[str, Any]) -> Step:
    """`steps` steps of a batch, from its start if they are more than one."""
    loaded = load_backbone(backbone)
    adapter, labels = random_adapter(loaded), torch.arange(batch_size) % NUM_CLASSES
    config = InversionConfig(**{**_PAPER, "num_steps": 1_000_000 if steps == 1 else steps, **changes})
    prior = load_prior("efficientnet-lite0") if config.prior_weight else None

    def start() -> InversionBatch:
        generator = torch.Generator().manual_seed(0)
        return InversionBatch(adapter, loaded, labels, config, prior=prior, generator=generator)

    kept = start()

    def run() -> None:
        batch = kept if steps == 1 else start()
        with merged(loaded.model, adapter.updates()), prior or nullcontext():
            for _ in range(steps):
                batch.run_step()

    return run


def bench_inversion(
    backbone: BackboneConfig,
    *,
    batch_size: int,
    threads: int,
    rounds: int,
    schedule_steps: int,
    compiled: bool,
    reporter: Reporter,
) -> Bench:
    """All variants on the same canvas, labels and adapter."""

    def ours(name: str, *, steps: int = 1, **changes: Any) -> Variant:
        precision = changes.get("precision", "auto")
        make = partial(_ours, backbone, batch_size, steps, changes)
        return Variant(name=name, make=make, precision=precision, images=batch_size, steps=steps)

    torch.set_num_threads(threads)
    loaded = load_backbone(backbone)
    last = len(loaded.model.blocks) - 1
    variants = [
        Variant(name="textbook", make=partial(_textbook, backbone, batch_size), precision="fp32", images=batch_size),
        ours("dense, fp32", precision="fp32"),
        ours("dense"),
        ours("dense, without a prior", prior_weight=0.0),
        ours("dense, prior every 4th step", steps=4, prior_every=4),
        ours("dense, prior of a quarter of the images", prior_share=0.25),
        ours(f"the paper's {{6: 0.75}} and {{{last}: 0.75}}", keep_ratios={6: 0.75, last: 0.75}, prune_from=0.0),
        ours("attended patches {0.25: 0.5, 0.5: 0.25}, prior every 4", steps=schedule_steps, **ATTENDED),
        ours("half of the patches, others at every step", **HALF),
        ours("the same, prior of a quarter of the images", **HALF, prior_share=0.25),
        ours("a quarter of the patches, others at every step", **QUARTER),
        ours("the same, prior of half of the images", **QUARTER, prior_share=0.5),
    ]
    return Bench(
        name=f"inversion-{backbone.name}-{backbone.image_px}",
        title=f"An inversion step: {backbone.name}, {backbone.image_px} px, batch {batch_size}, {threads} threads",
        settings={"backbone": backbone.name, "image_px": backbone.image_px, "batch_size": batch_size, "threads": threads},
        rows=measure(variants, threads=threads, rounds=rounds, reporter=reporter),
        others={"compile": [compare_compiled(backbone, batch_size, rounds)]} if compiled else {},
    )


def compare_compiled(backbone: BackboneConfig, batch_size: int, rounds: int) -> dict[str, float]:
    """Forward and backward of the backbone alone, as it is and through `torch.compile`, and what compiling takes."""
    loaded = load_backbone(backbone)
    images = torch.randn(batch_size, 3, loaded.image_px, loaded.image_px).requires_grad_()

    def features(inputs: Tensor) -> Tensor:
        with autocast(loaded.device, "auto"):
            return encode(loaded.model, inputs).features

    def step(forward: Callable[[Tensor], Tensor]) -> None:
        forward(images).float().square().mean().backward()

    faster = torch.compile(features)
    start = time.perf_counter()
    step(faster)
    first = time.perf_counter() - start
    step(features)
    eager_s, compiled_s = take_turns([partial(step, features), partial(step, faster)], rounds, lambda _text: None)
    gain = eager_s - compiled_s
    return {
        "eager_s": round(eager_s, 3),
        "compiled_s": round(compiled_s, 3),
        "compile_s": round(first - compiled_s, 1),
        "steps_until_it_pays": -1 if gain <= 0 else math.ceil((first - compiled_s) / gain),
    }
