"""Where the label is in a synthetic image: cross-entropy of the teacher on its most attended half, and on the rest.

    python -m bench.foreground configs/cifar-fs.yaml

The paper's Table 6: during inversion the foreground's falls from 10.78 to 0.12, the background's from 10.78 to 10.72. Of the
config's run, which must have been inverted. "Start" is the canvas before the first step, its halves those of the finished
image. Writes bench/results/foreground-NAME.json.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from lr_ray.bench.speed import write_result
from torch import Tensor

from lr_ray.config import load_config
from lr_ray.inversion.canvas import CANVASES
from lr_ray.storage.adapters import list_adapters, read_adapter
from lr_ray.storage.synthetic import adapter_id_of, by_adapter, list_synthetic, read_pool
from lr_ray.vit.backbone import Backbone, load_backbone
from lr_ray.vit.lora import Adapter, as_tuned, merged
from lr_ray.vit.tokens import encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    config = load_config(arguments.config, [f"output={arguments.output}"] if arguments.output else [])
    backbone = load_backbone(config.backbone)
    folders = {read_adapter(folder).spec.adapter_id: folder for folder in list_adapters(config.adapters_root)}
    canvas_type = CANVASES[config.inversion.canvas]
    losses: dict[str, list[Tensor]] = {}
    for index, files in enumerate(by_adapter(list_synthetic(config.synthetic_root))):
        pool = read_pool(config.synthetic_root, files)
        adapter = read_adapter(folders[adapter_id_of(files[0])])
        seen = as_tuned(adapter, backbone)
        labels = torch.from_numpy(pool.slot_of[pool.class_of])
        generator = torch.Generator().manual_seed(config.seed + index)
        start = canvas_type(len(labels), backbone, generator=generator).draw().detach()
        half = pool.patch_order.shape[1] // 2
        parts = {"all": None, "foreground": pool.patch_order[:, :half], "background": pool.patch_order[:, half:]}
        for moment, images in (("start", start), ("end", seen.normalize(pool.images))):
            for part, kept in parts.items():
                losses.setdefault(f"{part}, {moment}", []).append(loss_of(backbone, adapter, images, kept, labels))
    result = {name: round(float(torch.cat(found).mean()), 3) for name, found in losses.items()}
    print(json.dumps(result, indent=2))
    write_result(f"foreground-{config.name}", {"cross_entropy": result, "adapters": index + 1})


@torch.inference_mode()
def loss_of(backbone: Backbone, adapter: Adapter, images: Tensor, kept: Tensor | None, labels: Tensor) -> Tensor:
    """(B,) cross-entropy of the adapter on normalised images of which some patches are kept."""
    with merged(backbone.model, adapter.updates()):
        features = encode(backbone.model, images, keep_indices=kept, pool=adapter.pool).features
    return F.cross_entropy(adapter.logits(features), labels, reduction="none")


if __name__ == "__main__":
    main()
