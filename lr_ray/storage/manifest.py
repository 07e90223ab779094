"""What an artefact is made of: resolved config, input digests, versions. Its manifest is written last, as the commit."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lr_ray.errors import AdapterError, StorageError, cut
from lr_ray.storage.filesystem import create_bytes, exists, join, list_files, read_bytes, read_if_there, read_many, write_bytes

MANIFEST_NAME = "lr_ray.json"
CONFIG_NAME, WEIGHTS_NAME, CARD_NAME = "adapter_config.json", "adapter_model.safetensors", "README.md"
"""Of the files of an adapter's folder, as PEFT calls them; the config is written last."""
METRIC_NAME = "metric.safetensors"
"""Beside them, of a meta-LoRA."""
CLAIM_NAME = "claim.json"
_PACKAGES = ("lr-ray", "torch", "timm", "ray", "numpy", "pyarrow", "safetensors")


def digest_of(inputs: Any) -> str:
    """SHA-256 of JSON-serialisable inputs, keys in order."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of the libraries that a result depends on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def read_manifest(folder: str) -> dict[str, Any] | None:
    """The manifest of a finished artefact, or None.

    Raises:
        StorageError: it is there but damaged.
    """
    uri = join(folder, MANIFEST_NAME)
    content = read_if_there(uri)
    if content is None:
        return None
    try:
        manifest: dict[str, Any] = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"manifest {uri} is damaged ({error}); delete it and run again") from error
    return manifest


def read_meta_lora_manifest(folder: str) -> dict[str, Any]:
    """That of a meta-LoRA, as `lr-ray train` finished it.

    Raises:
        AdapterError: something else is there, or nothing.
        StorageError: it is damaged.
    """
    remedy = "give the folder of a meta-LoRA that `lr-ray train` wrote, such as runs/demo/meta_lora"
    if not exists(join(folder, CONFIG_NAME)):
        raise AdapterError(f"{folder} is no adapter: it has no {CONFIG_NAME}; {remedy}")
    manifest = read_manifest(folder)
    if manifest is None:
        raise AdapterError(f"{folder} is a PEFT adapter without {MANIFEST_NAME}, so its backbone is not known; {remedy}")
    if not isinstance(manifest, dict) or "kind" not in manifest:
        raise AdapterError(f"{folder} is an adapter of its own classes, not a meta-LoRA; {remedy}")
    return manifest


def read_manifests(folders: Sequence[str]) -> list[dict[str, Any]]:
    """Of each folder, empty where there is none."""
    return [manifest or {} for manifest in read_many(read_manifest, folders)]


def write_manifest(folder: str, inputs: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Commit the artefact in `folder`: what it was made from, what is known of it, with which versions; returns that."""
    manifest = {"digest": digest_of(inputs), "inputs": inputs, **facts, "versions": versions()}
    write_bytes(join(folder, MANIFEST_NAME), json.dumps(manifest, indent=2, ensure_ascii=False).encode())
    return manifest


def claim_folder(folder: str, inputs: dict[str, Any], *, config: dict[str, Any]) -> None:
    """Take an output folder for results made from `inputs`, or take it up again.

    Args:
        config: resolved, kept beside the inputs.

    Raises:
        StorageError: it holds the results of other inputs; the message says which differ.
    """
    uri = join(folder, CLAIM_NAME)
    content = read_if_there(uri)
    if content is None:
        claim = {"inputs": inputs, "config": config, "versions": versions()}
        if create_bytes(uri, json.dumps(claim, indent=2, ensure_ascii=False).encode()):
            return
        content = read_bytes(uri)  # of another command, which came first
    try:
        found = json.loads(content)["inputs"]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{uri} is damaged ({error!r}); choose another --output, or delete {folder}") from error
    if differences := list(_differences(found, json.loads(json.dumps(inputs)), "")):
        some = "; ".join(differences[:3]) + ("; …" if len(differences) > 3 else "")
        if list_files(folder, suffix="") == [CLAIM_NAME]:
            raise StorageError(
                f"{folder} is another run's ({some}), which has no results yet; choose another --output, or, if that command "
                f"is no longer at work, delete {uri}"
            )
        raise StorageError(
            f"{folder} holds another run's results ({some}); choose another --output, or delete that folder to start over"
        )


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [f"{path} was {_shown(old)}, now {_shown(new)}"]


def _shown(value: Any) -> str:
    return cut(json.dumps(value, ensure_ascii=False), 40)
