"""How long a library of 10,000 adapters takes to list: the first time, when every manifest is read, and from then on.

    python -m bench.library

Prints a table and writes bench/results/library.json. The adapters are copies of one manifest, without weights:
nothing here reads them.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lr_ray.bench.inversion import random_adapter
from lr_ray.bench.speed import write_result
from rich.console import Console
from rich.table import Table

from lr_ray.library.add import add_sources
from lr_ray.library.index import list_entries
from lr_ray.library.market import save_as_stranger
from lr_ray.storage.adapters import list_adapters
from lr_ray.storage.manifest import CONFIG_NAME, MANIFEST_NAME
from lr_ray.vit.backbone import BackboneConfig, load_backbone

NUM_ADAPTERS = 10_000


def make_library(folder: str) -> str:
    """A library with one adapter that was added, and the others copied from it."""
    config = BackboneConfig(name="vit_tiny_patch16_224", image_px=32, pretrained=False)
    backbone = load_backbone(config)
    library = f"{folder}/library"
    source = save_as_stranger(folder, "birds", random_adapter(backbone), backbone, format_="timm")
    (first,) = list_adapters(add_sources(library, [source], config).root)
    for index in range(NUM_ADAPTERS - 1):
        copy = Path(f"{first}-{index:05d}")
        copy.mkdir()
        for name in (MANIFEST_NAME, CONFIG_NAME):
            shutil.copy(Path(first, name), copy / name)
    return library


def main() -> None:
    rows: dict[str, float] = {}

    def timed(step: str, action: Callable[[], object]) -> None:
        start = time.perf_counter()
        action()
        rows[step] = round(time.perf_counter() - start, 3)

    with tempfile.TemporaryDirectory() as folder:
        library = make_library(folder)
        command = [str(Path(sys.executable).parent / "lr-ray"), "library", "ls", library, "--json"]
        timed("listed the first time, every manifest read", lambda: list_entries(library))
        timed("listed again", lambda: list_entries(library))
        timed("lr-ray library ls --json, its start included", lambda: subprocess.run(command, check=True, capture_output=True))
        found = len(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    table = Table("step", "s", title=f"{found:,} adapters")
    for step, seconds in rows.items():
        table.add_row(step, f"{seconds:.2f}")
    Console().print(table)
    write_result("library", {"adapters": found, "seconds": rows})


if __name__ == "__main__":
    main()
