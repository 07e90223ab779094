"""`lr-ray train`."""

from typing import Annotated

import typer
from lr_ray.cli.options import (
    Adapters,
    Cluster,
    Config,
    Json,
    Output,
    Overrides,
    Synthetic,
    Up,
    hand_over,
    print_json,
    read_config,
    reporter,
)


def train(
    config: Config,
    overrides: Overrides = None,
    adapters: Adapters = None,
    synthetic: Synthetic = None,
    output: Output = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Train on the real images of data.tune instead: what recycling aims at.")
    ] = False,
    cluster: Cluster = None,
    up: Up = False,
    json: Json = False,
) -> None:
    """Meta-train one meta-LoRA on episodes of the synthetic images."""
    experiment = read_config(config, overrides, output=output, adapters=adapters, synthetic=synthetic)
    oracle_option, reads = (["--oracle"], ("tune", "validation")) if oracle else ([], ("validation",))
    hand_over(experiment, cluster, "train", *oracle_option, "--config", up=up, json=json, reads=reads)
    from lr_ray.runtime.training import train_meta_lora, train_oracle

    train_one = train_oracle if oracle else train_meta_lora
    manifest = train_one(experiment, reporter(quiet=json))
    folder = experiment.oracle_root if oracle else experiment.meta_lora_root
    if json:
        print_json({"folder": folder} | {key: manifest[key] for key in ("best_step", "validation_accuracy")})
    else:
        print(f"{'oracle' if oracle else 'meta-LoRA'} of step {manifest['best_step']} in {folder}")
