"""An experiment, from one YAML file and overrides."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from lr_ray.data.datasets.library import default_root, names_dataset
from lr_ray.data.images import DataConfig
from lr_ray.data.load import EMBEDDED_DATA
from lr_ray.errors import ConfigError, cut
from lr_ray.fewshot.distill import TrainConfig
from lr_ray.fewshot.episodes import EpisodeShape
from lr_ray.fewshot.protocol import TestShape
from lr_ray.inversion.invert import InversionConfig
from lr_ray.section import Section
from lr_ray.storage.filesystem import absolute_path, join
from lr_ray.tuning.tune import TuneConfig
from lr_ray.vit.backbone import BackboneConfig, Precision

FolderName = Annotated[str, Field(min_length=1)] | None
"""A path or URI; None is its default."""


class DataSection(Section):
    """Which real images each step may see."""

    tune: DataConfig | None = None
    """Tunes the adapters, and the oracle."""
    validation: DataConfig | None = None
    """Validates meta-training; default: no real images, synthetic ones of adapters held out from training."""
    test: DataConfig | None = None
    """Measures; its classes should be in none of the others."""


class EvaluationConfig(Section):
    """What is measured."""

    methods: tuple[str, ...] = Field(default=("nn", "loras-avg", "recycle"), min_length=1)
    """Names of lr_ray/fewshot/methods, a method's settings after a colon: `loras-avg:2`, `bpa:features=recycle`.
    `all`: every one, with its defaults."""
    shapes: tuple[TestShape, ...] = Field(default=(EpisodeShape(n_shot=1), EpisodeShape(n_shot=5)), min_length=1)
    """Of the test episodes; `meta-dataset`: ways and shots that vary from episode to episode as they do there."""
    episodes: int = Field(default=600, gt=0)
    """Test episodes of every shape (the paper: 600)."""
    tuned_episodes: int = Field(default=100, gt=0)
    """How many of them, the first, methods meet that are trained on every episode: an episode takes them seconds."""
    batch_size: int = Field(default=100, gt=0)
    """Images of one forward pass."""
    precision: Precision = "auto"
    """Of those passes."""


class RayConfig(Section):
    """Where it runs and how much each piece takes."""

    address: str = "local"
    """`local` starts Ray on this machine; else the address of a running cluster, or `auto`."""
    num_cpus: int | None = Field(default=None, gt=0)
    """Processors that a local Ray may use; default all."""
    dashboard: bool = True
    """Whether a local Ray has a dashboard; without it, it starts seconds sooner."""
    num_gpus_per_actor: float = Field(default=0.0, ge=0)
    """GPUs (or a share of one) held by each tuning, inversion and evaluation actor; heads on features hold none."""
    cpus_per_actor: int = Field(default=1, gt=0)
    """Processors held by each of them."""
    min_actors: int = Field(default=1, gt=0)
    """Fewest inversion actors, held from the start to the end."""
    max_actors: int | None = Field(default=None, gt=0)
    """Most inversion actors at once, for which an autoscaling cluster starts nodes; default: as many as it holds now."""
    checkpoint_every_s: float = Field(default=120.0, gt=0)
    """Seconds after which an inversion under way saves its state: what a lost node costs at most."""
    use_gpu_in_training: bool = False
    """Give each training worker a GPU."""
    cpus_per_trainer: int = Field(default=1, gt=0)
    """Processors held by each training worker."""
    max_failures: int = Field(default=3, ge=0)
    """How often a piece of work is tried again when its worker is lost."""


class TrackingConfig(Section):
    """Where the curves of a meta-training go, besides its own folder."""

    wandb: str | None = None
    """A project of Weights & Biases: `PROJECT` or `ENTITY/PROJECT`."""
    mlflow: str | None = None
    """The tracking URI of an MLflow server."""


class ExperimentConfig(Section):
    """From adapters to a measured meta-LoRA. Every artefact is saved with the resolved form of this."""

    name: str
    """Of the experiment."""
    output: FolderName = None
    """Folder or URI of everything it writes; default `runs/NAME`."""
    adapters: FolderName = None
    """Folder or URI of adapters in PEFT's format; default `OUTPUT/adapters`, where `lr-ray tune` puts them."""
    synthetic: FolderName = None
    """Folder or URI of the synthetic images; default `OUTPUT/synthetic`."""
    metric_synthetic: FolderName = Field(default=None, exclude_if=lambda folder: folder is None)
    """Folder or URI of the images of `metric_inversion`; default `OUTPUT/metric_synthetic`."""
    relations: FolderName = None
    """Folder or URI of what the adapters make of those images, where relations are learnt; default `OUTPUT/relations`."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Determines everything that is drawn."""
    backbone: BackboneConfig = BackboneConfig()
    data: DataSection = DataSection()
    tuning: TuneConfig = TuneConfig()
    inversion: InversionConfig = InversionConfig()
    metric_inversion: InversionConfig | None = Field(
        default=None, exclude_if=lambda section: section is None
    )  # older digests hold
    """Of more images, that nothing is trained on: the metric is learnt from them; default from those of `inversion`."""
    training: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    ray: RayConfig = RayConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def output_root(self) -> str:
        return self.output or f"runs/{self.name}"

    @property
    def adapters_root(self) -> str:
        return self.adapters or join(self.output_root, "adapters")

    @property
    def synthetic_root(self) -> str:
        return self.synthetic or join(self.output_root, "synthetic")

    @property
    def for_metric(self) -> "ExperimentConfig":
        """The same experiment with the images that the metric is learnt from in the place of those to train on."""
        if self.metric_inversion is None:
            return self
        root = self.metric_synthetic or join(self.output_root, "metric_synthetic")
        others = {"synthetic": root, "inversion": self.metric_inversion}
        return self.model_copy(update={**others, "metric_synthetic": None, "metric_inversion": None})

    @property
    def relations_root(self) -> str:
        return self.relations or join(self.output_root, "relations")

    @property
    def meta_lora_root(self) -> str:
        return join(self.output_root, "meta_lora")

    @property
    def joint_root(self) -> str:
        return join(self.output_root, "joint")

    @property
    def oracle_root(self) -> str:
        return join(self.output_root, "oracle")

    @model_validator(mode="before")
    @classmethod
    def _fill_empty_sections(cls, values: Any) -> Any:
        """`data:` with nothing below it, which YAML reads as null, is a section of defaults."""
        if not isinstance(values, dict):
            return values
        sections = {name for name, field in cls.model_fields.items() if isinstance(field.default, Section)}
        return {name: {} if value is None and name in sections else value for name, value in values.items()}

    @model_validator(mode="after")
    def _check(self) -> "ExperimentConfig":
        if self.metric_synthetic is not None and self.metric_inversion is None:
            raise ValueError("metric_synthetic is a folder for the images of metric_inversion, which is not set; set it")
        return self

    def resolved(self) -> dict[str, Any]:
        """As JSON, defaults included."""
        return self.model_dump(mode="json")


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.2 numbers: `6:10` is a range of classes and not 370 in base 60, `1e-3` is a number. A key that is given twice is
    an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _value in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


_BASE_60_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _BASE_60_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER_STARTS = list("-+.0123456789")
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), _NUMBER_STARTS)
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"(?:[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    _NUMBER_STARTS,
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: unreadable, or no mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _YamlLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"config {path}: {error}; give a YAML file such as configs/demo.yaml") from error
    if not isinstance(content, dict):
        raise ConfigError(f"config {path}: a mapping is needed at the top, not {type(content).__name__}")
    return content


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read a YAML file and apply `section.key=value` overrides, whose values are YAML.

    Raises:
        ConfigError: unreadable, an unknown key, or a value that is not allowed.
    """
    content = read_yaml(path)
    content.setdefault("name", Path(path).stem)
    for override in overrides:
        _apply(content, override)
    try:
        config = ExperimentConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(explain(error, str(path), ExperimentConfig)) from error
    return _with_absolute_paths(config)


def _with_absolute_paths(config: ExperimentConfig) -> ExperimentConfig:
    """Local paths made absolute, since workers have other working directories."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else absolute_path(path)

    def located(data: DataConfig | None) -> DataConfig | None:
        if data is None or data.source in EMBEDDED_DATA:
            return data
        if names_dataset(data.source):
            return data.model_copy(update={"root": absolute(data.root or default_root(data.source))})
        return data.model_copy(update={"source": absolute(data.source)})

    data = {name: located(getattr(config.data, name)) for name in DataSection.model_fields}
    paths = {name: absolute(getattr(config, name)) for name in ("adapters", "synthetic", "metric_synthetic", "relations")}
    backbone = config.backbone.model_copy(update={"weights": absolute(config.backbone.weights)})
    sections = {"data": config.data.model_copy(update=data), "backbone": backbone}
    return config.model_copy(update={**sections, **paths, "output": absolute(config.output_root)})


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected section.key=value, such as inversion.num_steps=200")
    *parents, last = key.split(".")
    for parent in parents:
        if content.get(parent) is None:  # a section with nothing below it is null in YAML
            content[parent] = {}
        content = content[parent]
        if not isinstance(content, dict):
            raise ConfigError(f"--set {override!r}: {parent} is a value, not a section")
    try:
        content[last] = yaml.load(value, _YamlLoader)
    except (ValueError, yaml.YAMLError) as error:  # ValueError: a date that does not exist
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error


def explain(error: ValidationError, source: str, root: type[Section]) -> str:
    """The first problem in one line; for an unknown key, the keys that are allowed there."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        sections = [root]
        for part in (part for part in first["loc"][:-1] if isinstance(part, str)):  # not positions in a list
            fields = [section.model_fields[part] for section in sections if part in section.model_fields]
            sections = [section for field in fields for section in _sections_of(field.annotation)]
        allowed = "; or ".join(", ".join(section.model_fields) for section in sections) or "other keys"
        return f"config {source}: unknown key {where!r}; allowed there: {allowed}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "missing":
        return f"config {source}: {where} is missing{more}"
    problem = "a section of `key: value` is needed" if first["type"] == "model_type" else first["msg"]
    found = cut(repr(first["input"]), 80)
    return f"config {source}: {where or 'values'} = {found}: {problem.removeprefix('Value error, ')}{more}"


def _sections_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold, also behind `| None` or in a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_of(inner)]
