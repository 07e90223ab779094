"""What inverting 100, 10,000 and 1,000,000 adapters takes: GPU hours, hours on 64 GPUs, dollars. Prints docs/cost.md.

    python -m bench.cost > docs/cost.md

Nothing is measured here. Steps a second are the paper's, or counted FLOPs at an assumed share of a GPU's peak; the busy share
of the GPUs is that of `python -m bench.scaling scheduling`; GPUs and prices are those of `lr-ray plan`, which plans other
recipes and backbones.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from lr_ray.config import ExperimentConfig
from lr_ray.planning import GPUS, SHARE_OF_PEAK, job_cost

PAPER_STEPS_PER_S = {"dense": 5.56, "{11: 0.75}": 5.81, "{6: 0.75}": 7.15}
COUNTS = (100, 10_000, 1_000_000)
NUM_GPUS = 64
SCHEDULING = Path(__file__).parent / "results" / "scaling-scheduling.json"


@dataclass(frozen=True)
class Recipe:
    """What is made of one adapter."""

    name: str
    num_images: int
    num_steps: int

    @property
    def steps(self) -> float:
        """Of 25 images."""
        return self.num_images / 25 * self.num_steps


RECIPES = (
    Recipe("the paper's: 5 classes, 20 images each, 2,000 steps", 100, 2000),
    Recipe("configs/cifar-fs.yaml's: 5 classes, 8 images each, 60 steps", 40, 60),
)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def table(recipe: Recipe, busy: float, step_tflop: float) -> list[str]:
    lines = [
        f"**Recipe: {recipe.name}** ({number(recipe.steps)} steps of 25 images an adapter)",
        "",
        "| GPU | steps/s | " + " | ".join(f"{count:,} adapters" for count in COUNTS) + " |",
        "|---|---|" + "---|" * len(COUNTS),
    ]
    rates = [(f"the paper's, {name}", rate, None) for name, rate in PAPER_STEPS_PER_S.items()]
    rates += [(gpu.name, SHARE_OF_PEAK * gpu.tflops / step_tflop, gpu.dollars_per_h) for gpu in GPUS]
    for name, rate, price in rates:
        cells = []
        for count in COUNTS:
            gpu_h = count * recipe.steps / rate / 3600 / busy
            money = f", ${number(gpu_h * price)}" if price else ""
            cells.append(f"{number(gpu_h)} GPU h ({number(gpu_h / NUM_GPUS)} h on {NUM_GPUS}){money}")
        lines.append(f"| {name} | {number(rate)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main() -> None:
    busy = json.loads(SCHEDULING.read_text())["rows"][0]["busy_percent"] / 100
    backbone = {"name": "vit_base_patch16_224", "pretrained": False}
    config = {"name": "cost", "backbone": backbone, "inversion": {"batch_size": 25, "num_steps": 1, "prior": None}}
    step_tflop = job_cost(ExperimentConfig.model_validate(config), num_classes=5).inversion.tflop
    print("# What it costs\n")
    print("Written by `python -m bench.cost`; nothing in it was run on a GPU by this project.\n")
    print(
        f"""Assumptions. A backbone of ViT-B/16 at 224 px, batches of 25, no prior network. The paper's rows are its own steps a
second on its one GPU, which it does not name. The others are the FLOPs that `lr-ray plan` counts, {step_tflop:.2f} T a step, at
{100 * SHARE_OF_PEAK:.0f} % of the data sheet's dense bf16 peak, which well-filled transformers reach; the paper's own figure is
{PAPER_STEPS_PER_S["dense"] * step_tflop:.0f} TFLOP/s. GPUs are busy {100 * busy:.1f} % of the time, as {NUM_GPUS} simulated
ones were (`python -m bench.scaling scheduling`). Prices are on-demand ones of one region, rounded, and change; spot ones, for
which `cluster/*.yaml` ask, are often a third to a half of them, and a preempted one costs at most `ray.checkpoint_every_s`.
Start-up (minutes a node), storage (an image of 224 px is about 105 kB as PNG: 100 of each of a million adapters are
10.5 TB) and traffic are not in it.
"""
    )
    for recipe in RECIPES:
        print("\n".join(table(recipe, busy, step_tflop)))


if __name__ == "__main__":
    main()
