"""An inversion step: LR-Ray's variants against the textbook's, in one run."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lr_ray.bench.speed import Bench, Step, Variant, measure
from lr_ray.bench.textbook import TextbookInversion

from lr_ray.inversion.invert import InversionBatch, InversionConfig
from lr_ray.inversion.priors import load_prior
from lr_ray.report.progress import Reporter
from lr_ray.vit.backbone import Backbone, BackboneConfig, load_backbone
from lr_ray.vit.lora import Adapter, AdapterSpec, LoRAConfig, LowRank, attach_lora, detach_lora, extract_lora, merged

NUM_CLASSES = 5
SCHEDULE_STEPS = 8
SPARSE: dict[str, Any] = {"sparse": {0.25: 0.5, 0.5: 0.25}, "prior_every": 4}
"""The schedule that is used where speed is asked for: `bench/gain/speed.yaml` measures what it costs."""
_PAPER = {"views": {"roll": 0.125, "flip": True}, "prior_weight": 10.0}


def random_adapter(backbone: Backbone) -> Adapter:
    """Of rank 4 on query and value, as the paper's."""
    generator = torch.Generator().manual_seed(0)
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
        with merged(loaded.model, adapter.deltas()), prior or nullcontext():
            for _ in range(steps):
                batch.run_step()

    return run


def bench_inversion(backbone: BackboneConfig, *, batch_size: int, threads: int, rounds: int, reporter: Reporter) -> Bench:
    """All variants on the same canvas, labels and adapter."""

    def ours(name: str, *, steps: int = 1, **changes: Any) -> Variant:
        precision = changes.get("precision", "auto")
        make = partial(_ours, backbone, batch_size, steps, changes)
        return Variant(name=name, make=make, precision=precision, images=batch_size, steps=steps)

    last = len(load_backbone(backbone).model.blocks) - 1
    variants = [
        Variant(name="textbook", make=partial(_textbook, backbone, batch_size), precision="fp32", images=batch_size),
        ours("dense, fp32", precision="fp32"),
        ours("dense"),
        ours("dense, without a prior", prior_weight=0.0),
        ours("dense, prior every 4th step", steps=4, prior_every=4),
        ours(f"the paper's {{6: 0.75}} and {{{last}: 0.75}}", keep_ratios={6: 0.75, last: 0.75}, prune_from=0.0),
        ours("half of the patches from the input on", sparse={0.0: 0.5}),
        ours("a quarter of the patches from the input on", sparse={0.0: 0.25}),
        ours(f"the whole schedule {_text(SPARSE)}", steps=SCHEDULE_STEPS, **SPARSE),
    ]
    return Bench(
        name=f"inversion-{backbone.name}-{backbone.image_px}",
        title=f"An inversion step: {backbone.name}, {backbone.image_px} px, batch {batch_size}, {threads} threads",
        settings={"backbone": backbone.name, "image_px": backbone.image_px, "batch_size": batch_size, "threads": threads},
        rows=measure(variants, threads=threads, rounds=rounds, reporter=reporter),
    )


def _text(schedule: dict[str, Any]) -> str:
    stages = ", ".join(f"{share}: {kept}" for share, kept in schedule["sparse"].items())
    return f"{{{stages}}}, prior every {schedule['prior_every']}"
