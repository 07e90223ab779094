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
        typer.Option(
            "--format",
            help="A file: timm (safetensors), onnx, or torch (a torch.export program, .pt2). A folder: peft (for timm's model) "
            "or peft-hf (for that of transformers).",
            show_default=False,
        ),
    ],
    to: Annotated[str, typer.Option("--to", help="File, or folder, or URI to write.", show_default=False)],
    json: Json = False,
) -> None:
    """Write backbone + meta-LoRA as one file, or the meta-LoRA as a PEFT folder, once it gives the same features."""
    from dataclasses import asdict

    from lr_ray.export.write import export_model

    written = export_model(meta_lora, kind, to)
    if json:
        print_json(asdict(written))
    else:
        print(f"{written.uri}: {written.num_bytes} bytes, largest relative difference {written.difference:.1e}")
