"""Whether memory grows with the number of adapters: peaks of the driver and of Ray's object store in an inversion.

    python -m bench.driver_memory

Prints a table and writes bench/results/driver_memory.json. Each size is inverted, by one step an image, in a process of its
own.
"""

import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace

import torch
from lr_ray.bench.speed import write_result
from rich.console import Console
from rich.table import Table

from lr_ray.config import ExperimentConfig
from lr_ray.report.progress import Reporter
from lr_ray.runtime.cost import peak_memory_mib
from lr_ray.runtime.inversion import invert_library
from lr_ray.runtime.session import ray_session
from lr_ray.storage.adapters import with_digest, write_adapter
from lr_ray.vit.backbone import load_backbone
from lr_ray.vit.lora import Adapter, AdapterSpec, LoRAConfig, attach_lora, extract_lora

SIZES = (10, 100, 1000)


def experiment(root: str) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {
            "name": "memory",
            "output": root,
            "backbone": {"name": "embedded", "image_px": 42},
            "inversion": {"images_per_class": 4, "num_steps": 1, "prior": None},
        }
    )


def invert(root: str) -> None:
    """Print the number of files, the peak memory of this process, and that of the object store, in MiB."""
    config = experiment(root)
    with ray_session(config.ray):
        over, used = threading.Event(), [0]
        watcher = threading.Thread(target=watch_object_store, args=(over, used), daemon=True)
        watcher.start()
        report = invert_library(config, Reporter(quiet=True), strict=True)
        over.set()
        watcher.join()
    print(json.dumps([len(report.uris), peak_memory_mib(torch.device("cpu")), max(used) / 2**20]))


def watch_object_store(over: threading.Event, used: list[int]) -> None:
    """Append the bytes in use, ten times a second, until it is over."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    while not over.wait(0.1):
        used.append(get_memory_info_reply(state).store_stats.object_store_bytes_used)


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
        num_files, driver_mib, store_mib = json.loads(done.stdout)
        assert num_files == count
        rows.append({"adapters": count, "driver_mib": round(driver_mib), "object_store_mib": round(store_mib, 1)})
    table = Table("adapters", "peak of the driver, MiB", "peak of the object store, MiB")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    write_result("driver_memory", {"rows": rows})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        invert(sys.argv[1])
    else:
        main()
