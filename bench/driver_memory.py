"""Whether the driver's memory grows with the number of adapters: peak resident memory of planning an inversion.

    python bench/driver_memory.py

Prints a table and writes bench/results/driver_memory.json. Each size is planned in a process of its own.
"""

import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lr_ray.config import ExperimentConfig
from lr_ray.runtime.inversion_plan import plan_inversion
from lr_ray.storage.adapters import with_digest, write_adapter
from lr_ray.storage.manifest import versions
from lr_ray.vit.backbone import load_backbone
from lr_ray.vit.lora import Adapter, AdapterSpec, LoRAConfig, attach_lora, extract_lora

SIZES = (10, 100, 300)
RESULT = Path(__file__).parent / "results" / "driver_memory.json"


def experiment(root: str) -> ExperimentConfig:
    return ExperimentConfig.model_validate({"name": "memory", "output": root, "backbone": {"name": "embedded", "image_px": 42}})


def plan(root: str) -> None:
    """Print the number of work items and this process's peak memory in MiB."""
    items = plan_inversion(experiment(root)).items
    print(json.dumps([len(items), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))


def make_library(root: str, count: int) -> None:
    """`count` adapters of rank 4 with five classes each, alike but for their names."""
    config = experiment(root)
    backbone = load_backbone(config.backbone)
    attach_lora(backbone.model, LoRAConfig(), generator=torch.Generator().manual_seed(0))
    spec = AdapterSpec(
        adapter_id="", digest="", backbone="embedded", backbone_digest=backbone.digest, class_names=tuple("abcde")
    )
    adapter = Adapter(
        spec=spec,
        modules=extract_lora(backbone.model),
        head_weight=torch.zeros(5, backbone.num_features),
        head_bias=torch.zeros(5),
    )
    for index in range(count):
        named = with_digest(replace(adapter, spec=replace(spec, adapter_id=f"adapter-{index:04d}")))
        write_adapter(f"{config.adapters_root}/{named.spec.adapter_id}", named, inputs={"index": index}, facts={})


def main() -> None:
    rows = []
    for count in SIZES:
        with tempfile.TemporaryDirectory() as root:
            make_library(root, count)
            done = subprocess.run([sys.executable, __file__, root], capture_output=True, text=True, check=True)
        num_items, peak_mib = json.loads(done.stdout)
        assert num_items == count
        rows.append({"adapters": count, "peak_mib": round(peak_mib)})
    table = Table("adapters", "peak memory of the driver, MiB")
    for row in rows:
        table.add_row(str(row["adapters"]), str(row["peak_mib"]))
    Console().print(table)
    RESULT.write_text(json.dumps({"rows": rows, "versions": versions()}, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        plan(sys.argv[1])
    else:
        main()
