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

from lr_ray.errors import ConfigError


def train(
    config: Config,
    overrides: Overrides = None,
    adapters: Adapters = None,
    synthetic: Synthetic = None,
    output: Output = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Train on the real images of data.tune instead: what recycling aims at.")
    ] = False,
    joint: Annotated[
        bool, typer.Option("--joint", help="Plain supervision on the synthetic images instead of episodes, to compare with.")
    ] = False,
    cluster: Cluster = None,
    up: Up = False,
    json: Json = False,
) -> None:
    """Meta-train one meta-LoRA on episodes of the synthetic images."""
    experiment = read_config(config, overrides, output=output, adapters=adapters, synthetic=synthetic)
    if oracle and joint:
        raise ConfigError("--oracle and --joint are two trainings; give one of them")
    options = [name for name, given in (("--oracle", oracle), ("--joint", joint)) if given]
    reads = ("tune", "validation") if oracle else ("validation",)
    hand_over(experiment, cluster, "train", *options, "--config", up=up, json=json, reads=reads)
    from lr_ray.runtime.training import train_joint, train_meta_lora, train_oracle

    train_one, folder, title = train_meta_lora, experiment.meta_lora_root, "meta-LoRA"
    if oracle:
        train_one, folder, title = train_oracle, experiment.oracle_root, "oracle"
    elif joint:
        train_one, folder, title = train_joint, experiment.joint_root, "meta-LoRA by plain supervision"
    manifest = train_one(experiment, reporter(quiet=json))
    if json:
        print_json({"folder": folder} | {key: manifest[key] for key in ("best_step", "validation_accuracy")})
    else:
        print(f"{title} of step {manifest['best_step']} in {folder}")
