"""`lr-ray invert`."""

from lr_ray.cli.options import Adapters, Config, Json, Output, Overrides, Synthetic, print_json, read_config, reporter


def invert(
    config: Config,
    overrides: Overrides = None,
    adapters: Adapters = None,
    synthetic: Synthetic = None,
    output: Output = None,
    json: Json = False,
) -> None:
    """Invert every adapter into synthetic images of its classes."""
    experiment = read_config(config, overrides, output=output, adapters=adapters, synthetic=synthetic)
    from lr_ray.runtime.inversion import invert_library

    uris = invert_library(experiment, reporter(quiet=json))
    if json:
        print_json(uris)
    else:
        print(f"synthetic images of {len(uris)} adapters in {experiment.synthetic_root}")
