"""A grid: one experiment in many variants, each over several seeds."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from lr_ray.config import ExperimentConfig, explain, load_config, read_yaml
from lr_ray.data.images import DataConfig
from lr_ray.data.procedural import ProceduralName
from lr_ray.errors import ConfigError
from lr_ray.section import Section
from lr_ray.storage.filesystem import absolute_path, join
from lr_ray.storage.manifest import digest_of


class StandInConfig(Section):
    """Images in the place of the inverted ones: controls, which show what inversion adds, and ceilings."""

    kind: Literal["shuffled", "real", "mixed"] | ProceduralName
    """`noise`, `dead-leaves`, `strokes`, `fractals`, `gradients`: procedural. `shuffled`: the inverted ones, each with its
    patches in random order. `real`: images of `data`. `mixed`: the inverted ones and `per_class` real ones a class."""
    data: DataConfig | None = None
    """Of `real`: unrelated images, which have none of the adapters' classes; default `data.tune`, what they were tuned on."""
    per_class: int | None = Field(default=None, gt=0)
    """Of `mixed`, and of `real` without `data`: different real images a class; default `inversion.images_per_class`. Fewer are
    repeated."""

    @model_validator(mode="after")
    def _check(self) -> "StandInConfig":
        own = self.kind == "mixed" or (self.kind == "real" and self.data is None)
        if self.per_class is not None and not own:
            raise ValueError(
                f"per_class {self.per_class}: `{self.kind}` images here have no classes of their own; leave it out"
            )
        if self.data is not None and self.kind != "real":
            raise ValueError(f"data does not go with kind `{self.kind}`; leave it out, or make the kind `real`")
        return self


_OWN = ("name", "seed", "output", "synthetic", "metric_synthetic", "relations")
"""Keys of an experiment that a grid gives to each cell itself."""


def _distinct_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds {list(seeds)}: none, or the same one twice; each may be given once")
    return seeds


class CellConfig(Section):
    """One variant."""

    set: dict[str, Any] = {}
    """{section.key: value} over the grid's base."""
    seeds: tuple[int, ...] | None = None
    """Default the grid's."""
    images: StandInConfig | None = None
    """In the place of the inverted images; default the inverted ones."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if seeds is None else _distinct_seeds(seeds)


class GridConfig(Section):
    """Variants of a base experiment, the same seeds for all."""

    name: str
    """Of the grid."""
    base: Path
    """YAML file of the experiment; a relative path starts at the grid's folder."""
    output: str | None = None
    """Folder or URI of everything it writes; default `runs/NAME`."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each determines LoRAs, images, training and test episodes anew."""
    set: dict[str, Any] = {}
    """{section.key: value} over the base, for all cells."""
    cells: dict[str, CellConfig] = Field(min_length=1)
    """{name: variant}."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return _distinct_seeds(seeds)

    @property
    def output_root(self) -> str:
        return self.output or f"runs/{self.name}"


def load_grid(path: str | Path, *, output: str | None = None) -> GridConfig:
    """Read a YAML file.

    Raises:
        ConfigError: unreadable, an unknown key, or a value that is not allowed.
    """
    content = read_yaml(path)
    content.setdefault("name", Path(path).stem)
    if output is not None:
        content["output"] = output
    try:
        grid = GridConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(explain(error, str(path), GridConfig)) from error
    return grid.model_copy(update={"base": Path(path).parent / grid.base, "output": absolute_path(grid.output_root)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One variant and seed, ready to run.

    Attributes:
        config: of the experiment; its folders lie below the grid's output and are named by digests of what determines
            them, so that cells that agree on adapters or images share them.
        stand_in: images in the place of the inverted ones, or None.
        tune: whether the adapters are made here; else they are given.
        inverted_root: where the inverted images of these adapters go.
    """

    name: str
    seed: int
    config: ExperimentConfig
    stand_in: StandInConfig | None
    tune: bool
    inverted_root: str


def plan_cell(grid: GridConfig, name: str, seed: int) -> Cell:
    """Cell `name` of the grid with a seed.

    Raises:
        ConfigError: a key or value that is not allowed, or no data to measure on.
    """
    cell = grid.cells[name]
    for key in (*grid.set, *cell.set):
        if key.partition(".")[0] in _OWN:
            raise ConfigError(f"cell {name!r}: set.{key}: the grid itself says what {key} is; leave it out")
    values = [("name", name), *grid.set.items(), *cell.set.items(), ("seed", seed)]  # in this order, for keys may nest
    try:
        config = load_config(
            grid.base, [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in values]
        )
    except ConfigError as error:
        raise ConfigError(f"cell {name!r}: {error}") from error
    if config.data.test is None:
        raise ConfigError(f"cell {name!r}: data.test is not set: name the real images of unseen classes")
    drawn = {"seed": seed, "backbone": config.backbone.model_dump(mode="json")}
    tune = config.data.tune
    library = {**drawn, "tuning": config.tuning.model_dump(mode="json"), "data": tune.model_dump(mode="json") if tune else None}
    inverted = {**drawn, "adapters": config.adapters or library, "inversion": config.inversion.model_dump(mode="json")}
    images = {**inverted, "images": cell.images.model_dump(mode="json")} if cell.images else inverted
    if cell.images:  # in the place of all that are inverted
        if own := [key for key in cell.set if key.partition(".")[0] == "metric_inversion" and cell.set[key] is not None]:
            raise ConfigError(
                f"cell {name!r}: images, in the place of all that are inverted, do not go with {own[0]}; leave it out"
            )
        config = config.model_copy(update={"metric_inversion": None})
    measured = {**images, "training": config.training.determining()}
    if config.data.validation is not None:
        measured["validation"] = config.data.validation.model_dump(mode="json")
    if for_metric := config.metric_inversion and {**inverted, "inversion": config.metric_inversion.model_dump(mode="json")}:
        measured["for_metric"] = for_metric

    def folder(kind: str, inputs: dict[str, Any]) -> str:
        return join(grid.output_root, kind, digest_of(inputs)[:12])

    adapters = config.adapters or folder("adapters", library)
    slug = re.sub(r"[^\w.-]+", "-", name)
    output = join(grid.output_root, "cells", f"{slug}-{digest_of(measured)[:12]}")
    paths = {
        "adapters": adapters,
        "synthetic": folder("synthetic", images),
        "metric_synthetic": folder("synthetic", for_metric) if for_metric else None,
        "relations": join(grid.output_root, "relations"),
        "output": output,
    }
    return Cell(
        name=name,
        seed=seed,
        config=config.model_copy(update=paths),
        stand_in=cell.images,
        tune=config.adapters is None,
        inverted_root=folder("synthetic", inverted),
    )
