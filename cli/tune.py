"""`lr-ray tune`."""

from lr_ray.cli.options import Classes, Config, Data, Json, Output, Overrides, print_json, read_config, reporter


def tune(
    config: Config,
    overrides: Overrides = None,
    data: Data = None,
    classes: Classes = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Tune a library of LoRA adapters on random tasks of real images."""
    experiment = read_config(config, overrides, output=output, data=("tune", data, classes))
    from lr_ray.runtime.tuning import tune_library

    manifests = tune_library(experiment, reporter(quiet=json))
    if json:
        print_json([{key: m[key] for key in ("adapter_id", "class_names", "held_out_accuracy")} for m in manifests])
    else:
        mean = sum(m["held_out_accuracy"] for m in manifests) / len(manifests)
        print(f"{len(manifests)} adapters in {experiment.adapters_root}, {100 * mean:.1f} % on images they did not see")
