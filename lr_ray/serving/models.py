"""Which models a service has: meta-LoRAs of one backbone, by name, and that backbone without any."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lr_ray.errors import ConfigError, RequestError, shown

BACKBONE = "backbone"
"""Name of the plain backbone among the models."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_USUAL_FOLDER = "meta_lora"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """One of them.

    Attributes:
        name: as requests give it.
        digest: of all that its features depend on; tasks belong to it.
    """

    name: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalogue:
    """All of them.

    Attributes:
        models: the default first, the plain backbone last.
        num_features: D, the length of a feature vector.
    """

    models: tuple[ServedModel, ...]
    num_features: int

    @property
    def default(self) -> ServedModel:
        """That of requests which name none."""
        return self.models[0]

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(model.digest for model in self.models)

    def find(self, name: str | None) -> ServedModel:
        """The model of that name; None for the default.

        Raises:
            RequestError: 422 there is none.
        """
        if name is None:
            return self.default
        for model in self.models:
            if model.name == name:
                return model
        allowed = ", ".join(model.name for model in self.models)
        raise RequestError(f"model {shown(name)} is not served here; give one of {allowed}", 422)

    def of_digest(self, digest: str) -> ServedModel:
        """The first model of that digest, which is that of a task that the store has read."""
        return next(model for model in self.models if model.digest == digest)


def check_names(names: Collection[str]) -> None:
    """Raise where meta-LoRAs cannot have these names.

    Raises:
        ConfigError: there are none, or one that cannot be.
    """
    if not names:
        raise ConfigError("no meta-LoRA; give the folder of one that `lr-ray train` wrote, such as runs/demo/meta_lora")
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"model name {name!r}: give 1 to 63 of A-Z, a-z, 0-9, '.', '_' and '-', the first a letter or digit"
            )
        if name == BACKBONE:
            raise ConfigError(f"model name {name!r} means the plain backbone, which is always served; give another")


def name_meta_loras(arguments: Sequence[str]) -> dict[str, str]:
    """Paths by name, of `PATH` or `NAME=PATH`, in their order.

    A path's own name is its folder's, of `…/demo/meta_lora` the parent's, with a number behind it where it is taken.

    Raises:
        ConfigError: none at all; a name that cannot be, or is given twice.
    """
    given = [(match["name"], match["path"]) if (match := _GIVEN.fullmatch(text)) else (None, text) for text in arguments]
    named = [name for name, _ in given if name is not None]
    if twice := [name for name in named if named.count(name) > 1]:
        raise ConfigError(f"model name {twice[0]!r} is given twice; give another, as NAME=PATH")
    taken = [BACKBONE, *named]
    found = {}
    for name, path in given:
        if name is None:
            taken.append(name := _free_name(path, taken))
        found[name] = path
    check_names(found)
    return found


_GIVEN = re.compile(r"(?P<name>[^/\\:=]*)=(?P<path>.+)", re.DOTALL)
"""A name holds no separator, so that `./a=b` and `s3://bucket/a=b` are paths."""


def _free_name(path: str, taken: Sequence[str]) -> str:
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
    folder = parts[-2] if len(parts) > 1 and parts[-1] == _USUAL_FOLDER else "".join(parts[-1:])
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", folder).strip("-._")[:60] or "model"
    return next(name for name in (stem, *(f"{stem}-{i}" for i in range(2, len(taken) + 3))) if name not in taken)
