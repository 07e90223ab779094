"""Tiny adapters as files, packed in every way, and what is expected of reading them."""

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save

from lr_ray.errors import AdapterError, StorageError
from lr_ray.library.sources import RawAdapter, read_sources

WEIGHTS = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, 2)}, metadata={"format": "pt", "made": "here"})
CONFIG = {"peft_type": "LORA", "r": 2, "id2label": {"0": "of the config"}}
LABELS = {str(index): f"class {index}" for index in (10, 2, 1, 0, 3, 4, 5, 6, 7, 8, 9)}
CARD = "---\r\nlicense: apache-2.0\r\nbase_model: google/vit-base\r\n---\r\n# A card\r\n---\r\nlicense: none\r\n---\r\n"
ADAPTER = {
    "adapter_config.json": json.dumps(CONFIG).encode(),
    "adapter_model.safetensors": WEIGHTS,
    "config.json": json.dumps({"id2label": LABELS}).encode(),
    "preprocessor_config.json": b'{"image_mean": [0.5, 0.5, 0.5]}',
    "lr_ray.json": b'{"about": {"backbone": "vit"}}',
    "README.md": CARD.encode(),
}
BARE = {name: ADAPTER[name] for name in ("adapter_config.json", "adapter_model.safetensors")}


def below(folder: str, files: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name}": content for name, content in files.items()}


def write_files(root: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return str(root)


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as unpacked:
        for name, content in files.items():
            unpacked.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


PACK: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    ".tar": tar_of,
    ".tar.gz": lambda files: tar_of(files, "w:gz"),
    ".tgz": lambda files: tar_of(files, "w:gz"),
    ".zip": zip_of,
}


def adapters(source: str | Path) -> dict[str, RawAdapter]:
    """By name; no error among them."""
    found = list(read_sources(str(source)))
    assert [item for item in found if isinstance(item, AdapterError)] == []
    return {item.source: item for item in found if isinstance(item, RawAdapter)}


def only_error(source: str | Path) -> str:
    """What is said of the one thing that a source holds, or of the source itself; in one line."""
    try:
        (found,) = read_sources(str(source))
    except (AdapterError, StorageError) as error:
        found = error
    assert isinstance(found, AdapterError | StorageError)
    assert str(found).isprintable()
    assert len(str(found)) < 1500
    return str(found)


def refuses(source: str | Path, pattern: str) -> None:
    assert re.search(pattern, only_error(source)), only_error(source)


def assert_whole(adapter: RawAdapter) -> None:
    """All of `ADAPTER` was read."""
    assert adapter.config == CONFIG
    assert adapter.weights == WEIGHTS
    assert adapter.metadata == {"format": "pt", "made": "here"}
    assert adapter.preprocessor == {"image_mean": [0.5, 0.5, 0.5]}
    assert adapter.manifest == {"about": {"backbone": "vit"}}
    assert adapter.card == {"license": "apache-2.0", "base_model": "google/vit-base"}
    assert adapter.class_names == tuple(f"class {index}" for index in range(11))


def assert_alone(adapter: RawAdapter) -> None:
    """Weights with nothing beside them."""
    assert adapter.weights == WEIGHTS
    assert adapter.metadata == {"format": "pt", "made": "here"}
    assert (adapter.config, adapter.preprocessor, adapter.manifest, adapter.card, adapter.class_names) == ({}, {}, {}, {}, ())
