"""A meta-LoRA and its card on the Hugging Face hub, in one commit."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, get_token
from huggingface_hub.errors import HfHubHTTPError
from timm.data import resolve_model_data_config

from lr_ray.errors import ExportError
from lr_ray.export.adapter import metric_file
from lr_ray.export.write import ALONE, card_of, check_kind, make_files
from lr_ray.model import Parts, load_parts
from lr_ray.storage.manifest import CARD_NAME
from lr_ray.vit.backbone import architecture_of

KINDS = ["peft", "peft-hf", "timm"]
_REPO_ID = re.compile(r"(?!.*(?:--|\.\.))(?!.*[-.](?:/|$))(?!.*\.git$)\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HTTP_ERROR: type[Exception] = vars(errors)["HTTPError"]
"""Of what the client sends by: requests, httpx or httpx2, by its version."""
_TOKEN = "set HF_TOKEN to one with the right to write (https://huggingface.co/settings/tokens), or run `hf auth login`"
_REMEDIES = {
    401: f"the hub does not accept the token; {_TOKEN}",
    403: f"the token has no right to write there; correct OWNER/NAME, or {_TOKEN}",
    404: f"the hub shows no such owner or repository to this token; correct OWNER/NAME, or {_TOKEN}",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """What was sent, or would be.

    Attributes:
        url: of the repository.
        files: {name: bytes}.
        difference: of the features of these files from the model's, relative to the largest of them.
        commit: its hash; None for a dry run.
    """

    repo_id: str
    url: str
    files: dict[str, int]
    difference: float
    private: bool
    commit: str | None


def push_meta_lora(meta_lora: str, repo_id: str, kind: str = "peft", *, private: bool = False, dry_run: bool = False) -> Pushed:
    """Send a form of the meta-LoRA, once it gives the model's features; other files of the repository stay.

    The hub is that of HF_ENDPOINT, the token that of HF_TOKEN or `hf auth login`.

    Args:
        meta_lora: folder or URI that `lr-ray train` wrote.
        repo_id: OWNER/NAME; created if it is not there.
        kind: one of `KINDS`.
        private: nobody but its owner sees it; an error where it is there already and public.
        dry_run: send nothing, not even the token.

    Raises:
        ExportError: no usable repo_id or token, no right, the hub is not reached, or what `export_model` raises.
        StorageError, AdapterError, BackboneError: as of `export_model`.
    """
    check_kind(kind, KINDS)
    _check_repo_id(repo_id)
    parts = load_parts(meta_lora)
    if not dry_run and get_token() is None:
        raise ExportError(f"push {repo_id}: there is no token; {_TOKEN}")
    files, difference = make_files(parts, kind)
    if kind == "timm":
        files = {"config.json": _timm_config(parts), "model.safetensors": files[ALONE], **metric_file(parts)}
    files = {CARD_NAME: card_of(parts, meta_lora, kind, where=repo_id).encode(), **files}
    return Pushed(
        repo_id=repo_id,
        url=f"{constants.ENDPOINT}/{repo_id}",
        files={name: len(content) for name, content in files.items()},
        difference=difference,
        private=private,
        commit=None if dry_run else _send(repo_id, files, kind, private=private),
    )


def _check_repo_id(repo_id: str) -> None:
    if _REPO_ID.fullmatch(repo_id) is None or len(repo_id) > 96:
        raise ExportError(
            f"{repo_id!r} is no repository of the hub; give OWNER/NAME of letters, digits and single - _ . inside, at most 96"
        )


def _send(repo_id: str, files: dict[str, bytes], kind: str, *, private: bool) -> str:
    """Create the repository if need be, and commit the files; returns the commit's hash."""
    api = HfApi(endpoint=constants.ENDPOINT)
    with _hub_errors(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ExportError(f"push {repo_id}: --private, but it is there already and public; make it private or give another")
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        done = api.create_commit(repo_id, operations, commit_message=f"Meta-LoRA by LR-Ray, --format {kind}")
    return str(done.oid)


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """What the hub's client raises becomes one line with what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = _REMEDIES.get(status, f"{error}; nothing was committed: run again")
        raise ExportError(f"push {repo_id}: {reason}") from error
    except (_HTTP_ERROR, OSError, RuntimeError, ValueError) as error:
        raise ExportError(
            f"push {repo_id}: {constants.ENDPOINT} gave no usable answer ({type(error).__name__}: {error}); check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE, and run again"
        ) from error


def _timm_config(parts: Parts) -> bytes:
    """`config.json`, by which `timm.create_model("hf-hub:OWNER/NAME")` makes the model."""
    backbone = parts.backbone
    architecture, arguments = architecture_of(backbone.name)
    data: dict[str, Any] = resolve_model_data_config(backbone.model)
    seen = {
        "input_size": [3, backbone.image_px, backbone.image_px],
        "mean": backbone.mean.tolist(),
        "std": backbone.std.tolist(),
        "interpolation": data["interpolation"],
        "crop_pct": data["crop_pct"],
        "num_classes": 0,
        "custom_load": False,
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",  # which timm fits to other channels; and the layer that it may leave unloaded
        "classifier": "head",
    }
    config = {
        "architecture": architecture.partition(".")[0],
        "num_classes": 0,
        "num_features": backbone.num_features,
        "global_pool": "token",
        "model_args": arguments | {"img_size": backbone.image_px},
        "pretrained_cfg": seen,
        "timm_version": timm.__version__,
    }
    return json.dumps(config, indent=2).encode()
