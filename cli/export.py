"""`lr-ray export`."""

from typing import Annotated

import typer
from lr_ray.cli.options import Json, print_json


def export(
    meta_lora: Annotated[
        str, typer.Argument(help="Folder or URI of a meta-LoRA that `lr-ray train` wrote.", show_default=False)
    ],
    kind: Annotated[
        str,
        typer.Option("--format", help="timm (safetensors), onnx, or torch (a torch.export program, .pt2).", show_default=False),
    ],
    to: Annotated[str, typer.Option("--to", help="File or URI to write.", show_default=False)],
    json: Json = False,
) -> None:
    """Write backbone + meta-LoRA as one file that is used without LR-Ray, once it gives the same features."""
    from dataclasses import asdict

    from lr_ray.export import export_model
    from lr_ray.model import load

    written = export_model(load(meta_lora), kind, to)
    if json:
        print_json(asdict(written))
    else:
        print(f"{written.uri}: {written.num_bytes} bytes, largest relative difference {written.difference:.1e}")
