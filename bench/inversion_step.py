"""What each choice in an inversion step is worth: one run, each variant against the one that LR-Ray uses.

    python -m bench.inversion_step [--image-px 70] [--batch-size 50] [--threads 2]

Prints a table and writes bench/results/inversion_step-PX.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lr_ray.inversion.priors import load_prior
from lr_ray.storage.manifest import versions
from lr_ray.vit.backbone import Backbone, BackboneConfig, Precision, autocast, load_backbone
from lr_ray.vit.lora import LoRAConfig, attach_lora
from lr_ray.vit.tokens import encode

ROUNDS = 5
RESULTS = Path(__file__).parent / "results"


def backbone_step(backbone: Backbone, images: Tensor, precision: Precision, keep_ratios: dict[int, float]) -> None:
    """Forward and backward to the images through the backbone alone."""
    with autocast(backbone.device, precision):
        features = encode(backbone.model, images, keep_ratios=keep_ratios).features
    features.float().square().mean().backward()


def timm_step(backbone: Backbone, images: Tensor, precision: Precision) -> None:
    """The same through timm's own forward, which runs the last MLP on every token."""
    with autocast(backbone.device, precision):
        features = backbone.model(images)
    features.float().square().mean().backward()


def fused_attention_step(backbone: Backbone, images: Tensor, precision: Precision) -> None:
    """The same through PyTorch's fused attention, which never holds the whole matrix."""
    for block in backbone.model.blocks:
        block.attn.fused_attn = True
    try:
        backbone_step(backbone, images, precision, {})
    finally:
        for block in backbone.model.blocks:
            block.attn.fused_attn = False


def measure(variants: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each variant; the rounds take turns, so that a noisy machine is noisy for all."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_index in range(ROUNDS + 1):
        for name, step in variants.items():
            start = time.perf_counter()
            step()
            if round_index:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--image-px", type=int, default=70)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    side = arguments.image_px
    backbone = load_backbone(BackboneConfig(name="embedded", image_px=side))
    plain_lora = load_backbone(BackboneConfig(name="embedded", image_px=side))
    attach_lora(plain_lora.model, LoRAConfig(), generator=torch.Generator().manual_seed(0))
    plain_lora.model.requires_grad_(False)
    prior = load_prior("efficientnet-lite0")
    images = torch.randn(arguments.batch_size, 3, side, side, requires_grad=True)

    def prior_step(memory_format: torch.memory_format) -> None:
        with prior:
            prior(images.to(memory_format=memory_format), memory_format=memory_format).backward()

    measured = measure(
        {
            "backbone, as used (merged, eager attention, bf16 where native)": lambda: backbone_step(
                backbone, images, "auto", {}
            ),
            "backbone, fp32": lambda: backbone_step(backbone, images, "fp32", {}),
            "backbone, LoRA unmerged": lambda: backbone_step(plain_lora, images, "auto", {}),
            "backbone, fused attention": lambda: fused_attention_step(backbone, images, "auto"),
            "backbone, timm's forward (last MLP on all tokens)": lambda: timm_step(backbone, images, "auto"),
            "backbone, half of the tokens dropped at block 3": lambda: backbone_step(backbone, images, "auto", {3: 0.5}),
            "prior, as used (channels last)": lambda: prior_step(torch.channels_last),
            "prior, channels first": lambda: prior_step(torch.contiguous_format),
        }
    )
    rows = []
    for name, seconds in measured.items():
        reference = next(value for key, value in measured.items() if key.startswith(name.split(",")[0]))
        rows.append({"variant": name, "step_s": round(seconds, 4), "ratio": round(seconds / reference, 3)})
    table = Table(title=f"One inversion step, {side} px, batch {arguments.batch_size}, {arguments.threads} threads")
    for column in ("variant", "s", "ratio to the one used"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(row["variant"], f"{row['step_s']:.3f}", f"{row['ratio']:.2f}")
    Console().print(table)
    result = {"image_px": side, "batch_size": arguments.batch_size, "threads": arguments.threads, "rows": rows}
    path = RESULTS / f"inversion_step-{side}.json"
    path.write_text(json.dumps(result | {"versions": versions()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
