from typing import Annotated

import typer
from lr_ray.cli.options import Json, print_json


def push(
    meta_lora: Annotated[
        str, typer.Argument(help="Folder or URI of a meta-LoRA that `lr-ray train` wrote.", show_default=False)
    ],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub.", show_default=False)],
    kind: Annotated[
        str,
        typer.Option(
            "--format", help="peft (for timm's model), peft-hf (for that of transformers), or timm (merged, backbone and all)."
        ),
    ] = "peft",
    private: Annotated[bool, typer.Option("--private", help="Only for its owner to see.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    json: Json = False,
) -> None:
    """Put a meta-LoRA and its card on the Hugging Face hub, in one commit; the token is that of HF_TOKEN or `hf auth login`."""
    from dataclasses import asdict

    from lr_ray.export.push import push_meta_lora

    pushed = push_meta_lora(meta_lora, repo_id, kind, private=private, dry_run=dry_run)
    if json:
        print_json(asdict(pushed))
        return
    for name, size in pushed.files.items():
        print(f"{name}: {size} bytes")
    visible = "private" if private else "public unless its owner's default is private"
    if dry_run:
        print(f"nothing was sent; without --dry-run: to {pushed.url}, created if it is not there ({visible})")
    else:
        print(f"{pushed.url}: {sum(pushed.files.values())} bytes in commit {pushed.commit}")
