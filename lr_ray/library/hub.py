"""Models of the Hugging Face Hub."""

import re
from collections.abc import Mapping
from typing import BinaryIO

from lr_ray.errors import AdapterError
from lr_ray.library.files import BESIDE, Files, say
from lr_ray.storage.manifest import CONFIG_NAME, WEIGHTS_NAME

HUB = "hf://"
_HUB_ADDRESS = re.compile(
    r"hf://(?!(?:datasets|spaces|buckets)/)(?P<repo>\w[\w.-]*/\w[\w.-]*)"
    r"(@(?P<revision>refs/(convert|pr)/\w+|[^/@]+))?(/(?P<path>.+))?"
)
_REMEDY = (
    "see that the model exists, that this machine reaches huggingface.co (HF_HUB_OFFLINE unset), and that `hf auth login` "
    "was run if it is gated"
)


def hub_files(address: str) -> Files:
    """The files of a model repository at the commit that its revision is now, each downloaded once it is asked for.

    Raises:
        AdapterError: no such address, unreachable, or nothing at that path.
    """
    found = _HUB_ADDRESS.fullmatch(address)
    if found is None:
        raise AdapterError(f"source {address!r}: no model of the hub; expected hf://OWNER/NAME[@REVISION][/FOLDER]")
    repo, below = found["repo"], (found["path"] or "").strip("/")
    commit, sizes = _look_up(address, repo, found["revision"])
    prefix, names = _choose(below, sizes)
    if not names:
        raise AdapterError(f"source {address}: no files at {below!r} in that model; correct the folder")
    known = {name: size for name in names if (size := sizes[prefix + name]) is not None}
    if len(known) != len(names):
        raise AdapterError(f"source {address}: the hub does not say how large its files are; download it and give the folder")

    def fetch(name: str) -> BinaryIO:
        return _fetch(address, repo, prefix + name, commit)

    def read(name: str) -> bytes:
        with fetch(name) as file:
            return file.read()

    source = f"{HUB}{repo}@{commit}/{prefix}".rstrip("/")
    return Files(source=source, separator="/", sizes=known, read=read, open=fetch)


def _look_up(address: str, repo: str, revision: str | None) -> tuple[str | None, dict[str, int | None]]:
    """The commit, and the size of each file in it as far as the hub says."""
    from huggingface_hub import HfApi  # a second to import, which no other source should pay for

    try:
        model = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception as error:  # of the hub, of HTTP, of its arguments: all say what failed
        raise AdapterError(f"source {address}: not found ({say(error)}); {_REMEDY}") from error
    return model.sha or revision, {file.rfilename: file.size for file in model.siblings or []}


def _choose(below: str, sizes: Mapping[str, int | None]) -> tuple[str, list[str]]:
    """A folder of the repository with a slash, and the names in it that are meant: of all files below it, or of one adapter."""
    if below not in sizes:
        prefix = f"{below}/" if below else ""
        return prefix, sorted(name.removeprefix(prefix) for name in sizes if name.startswith(prefix))
    prefix = below[: below.rfind("/") + 1]
    if below == prefix + WEIGHTS_NAME and prefix + CONFIG_NAME in sizes:
        return prefix, [name for name in (WEIGHTS_NAME, *BESIDE) if prefix + name in sizes]
    return "", [below]


def _fetch(address: str, repo: str, path: str, commit: str | None) -> BinaryIO:
    from huggingface_hub import hf_hub_download

    if ".." in path.split("/") or path.startswith("/"):
        raise AdapterError(f"source {address}: {path!r} leads outside of the model; it is not read")
    try:
        return open(hf_hub_download(repo, path, revision=commit), "rb")
    except Exception as error:  # as above
        raise AdapterError(f"source {address}: {path!r} not fetched ({say(error)}); {_REMEDY}") from error
