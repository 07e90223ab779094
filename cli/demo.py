"""`lr-ray demo`."""

from importlib.resources import as_file, files

from lr_ray.cli.options import Json, Output, Overrides, read_config
from lr_ray.cli.run import run_and_report


def demo(overrides: Overrides = None, output: Output = None, json: Json = False) -> None:
    """The whole job on embedded data, a few minutes on two processors: LoRAs of Latin letters learn Greek and Cyrillic."""
    with as_file(files("lr_ray.configs") / "demo.yaml") as config:
        run_and_report(read_config(config, overrides, output=output), json=json)
