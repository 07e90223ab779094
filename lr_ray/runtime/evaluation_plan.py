"""What an evaluation has to do, planned and checked before anything is started."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lr_ray.config import ExperimentConfig
from lr_ray.data.images import LabelledImages
from lr_ray.data.load import load_data
from lr_ray.errors import ConfigError, EpisodeError
from lr_ray.fewshot.methods import ChosenMethod, FeatureMethod, Ingredient, TunedMethod, expand, find_method
from lr_ray.fewshot.methods.features import RAW_PIXELS, needs_of
from lr_ray.fewshot.metric import MetricConfig
from lr_ray.fewshot.protocol import TestShape, draw_episodes, most_ways
from lr_ray.runtime.held import held_backbone
from lr_ray.runtime.training_job import metric_files
from lr_ray.storage.adapters import list_adapters, read_specs
from lr_ray.storage.filesystem import exists, join
from lr_ray.storage.manifest import CONFIG_NAME, digest_of
from lr_ray.storage.measurements import file_name
from lr_ray.storage.metric import metric_digest, read_metric

REFERENCE = "recycle"
"""The method that all others are compared with."""
_TUNED_EPISODES_A_TASK, _ON_A_GPU = 5, 50
"""After as many a kill loses them; Ray gives each task on a GPU a process of its own, which takes seconds to begin."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturesTask:
    """Features of all test images, and where they go."""

    config: ExperimentConfig
    features: str
    uri: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FitTask:
    """What a method learns from images of other classes before the episodes, and where it goes."""

    config: ExperimentConfig
    label: str
    uri: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodesTask:
    """A method on episodes `start` to `stop` of a shape, and where its predictions go.

    Attributes:
        features_uri: what a `FeatureMethod` reads; "" of one whose features are the pixels themselves.
        fitted_uri: what one with `fit` reads; else "".
        metric_of: folder of the meta-LoRA whose metric one reads; else "".
    """

    config: ExperimentConfig
    label: str
    shape: TestShape
    start: int
    stop: int
    uri: str
    features_uri: str = ""
    fitted_uri: str = ""
    metric_of: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """A row to be: one method on one shape, in one or more tasks.

    Attributes:
        digest: of everything that determines the row.
    """

    chosen: ChosenMethod
    shape: TestShape
    digest: str
    tasks: tuple[EpisodesTask, ...]


class EvaluationPlan:
    """Every task of an evaluation, named by what determines it: methods that share features share a task for them."""

    def __init__(self, config: ExperimentConfig) -> None:
        """Raises:
        AdapterError: an adapter that is needed, or the meta-LoRA, with which all are compared, is damaged or of another
            backbone.
        ConfigError: no test data, an unknown method, or one that needs what is not there.
        EpisodeError: too few classes or images, or more classes than a method is made for.
        """
        self.config, self.data = config, check_evaluation(config)
        chosen = [find_method(label) for label in expand(config.evaluation.methods)]
        self._root = join(config.output_root, "evaluation")
        self._backbone = held_backbone(config.backbone)
        self._found: dict[Ingredient, Any] = {}
        for method in chosen:
            for need in method.needs:
                self._ingredient(need, method.label)
        if self._has_reference:
            self._ingredient("meta_lora", REFERENCE)
        self.features: dict[str, FeaturesTask] = {}
        self.fits: dict[str, FitTask] = {}
        self.measurements = [self._measure(method, shape) for method in chosen for shape in config.evaluation.shapes]

    @cached_property
    def _shared(self) -> dict[str, Any]:
        return {
            "backbone": self._backbone.identity,
            "data": self.data.digest(),
            "precision": self.config.evaluation.precision,
        }

    @cached_property
    def _has_reference(self) -> bool:
        return exists(join(self.config.meta_lora_root, CONFIG_NAME))

    @property
    def protocol(self) -> dict[str, Any]:
        """What rows must have in common to stand in one table."""
        return {
            "seed": self.config.seed,
            "backbone": f"{self._backbone.digest[:12]} at {self._backbone.image_px} px",
            "data": self._shared["data"][:12],
            "precision": self.config.evaluation.precision,
        }

    def reference(self, shape: TestShape) -> Measurement | None:
        """Recycling on this shape, whether it is to be measured or was; None if it cannot have been."""
        return self._measure(find_method(REFERENCE), shape) if self._has_reference else None

    def episodes_uri(self, shape: TestShape) -> str:
        """Where the episodes of a shape are stored for other programs."""
        drawn = {"data": self._shared["data"], "shape": shape.model_dump(), "seed": self.config.seed}
        digest = digest_of({**drawn, "episodes": self.config.evaluation.episodes})
        return join(self._root, file_name(f"episodes-{shape.name}", digest, ".parquet"))

    def _measure(self, chosen: ChosenMethod, shape: TestShape) -> Measurement:
        evaluation, method = self.config.evaluation, chosen.method
        made_of: dict[str, Any] = {
            **self._shared,
            "method": method.name,
            "settings": chosen.settings.model_dump(mode="json"),
            "shape": shape.model_dump(),
            "seed": self.config.seed,
            "ingredients": {need: self._found[need] for need in chosen.needs},
        }
        where = {}
        if isinstance(method, FeatureMethod):
            where = {"features_uri": self._features_uri(method.features(chosen.settings))}
            if method.fit is not None:
                if method.fit_on == "synthetic" and (metric := self.config.training.metric) != MetricConfig():
                    made_of["fitted"] = metric.model_dump(mode="json")
                where["fitted_uri"] = self._fitted_uri(chosen, made_of)
            elif method.metric(chosen.settings) and (digest := metric_digest(folder := self._folder_of(chosen))):
                read_metric(folder, num_features=self._backbone.num_features)
                made_of["metric"], where["metric_of"] = digest, folder
        episodes, at_once = evaluation.episodes, evaluation.episodes
        if isinstance(method, TunedMethod):
            episodes = min(episodes, evaluation.tuned_episodes)
            at_once = _ON_A_GPU if self.config.ray.num_gpus_per_actor else _TUNED_EPISODES_A_TASK
        name = f"{chosen.label}-{shape.name}"
        digest = digest_of(made_of)
        tasks = tuple(
            EpisodesTask(
                config=self.config,
                label=chosen.label,
                shape=shape,
                start=start,
                stop=stop,
                uri=join(self._root, file_name(name, digest, f"-{start:05d}-{stop:05d}.parquet")),
                **where,
            )
            for start, stop in _spans(episodes, at_once)
        )
        return Measurement(chosen=chosen, shape=shape, digest=digest_of({**made_of, "episodes": episodes}), tasks=tasks)

    def _features_uri(self, features: str) -> str:
        if features == RAW_PIXELS:  # larger than the images, and as soon made as read
            return ""
        needs = {need: self._found[need] for need in needs_of(features)}
        digest = digest_of({**self._shared, "features": features, "ingredients": needs})
        uri = join(self._root, file_name(f"features-{features}", digest, ".safetensors"))
        self.features[uri] = FeaturesTask(config=self.config, features=features, uri=uri)
        return uri

    def _folder_of(self, chosen: ChosenMethod) -> str:
        """Of the meta-LoRA that its features are of."""
        (need,) = chosen.needs
        return self._trained_by(need)[0]

    def _trained_by(self, need: Ingredient) -> tuple[str, str]:
        """The folder of a meta-LoRA, and the option of `lr-ray train` that makes it."""
        config = self.config
        return {
            "meta_lora": (config.meta_lora_root, ""),
            "joint": (config.joint_root, " --joint"),
            "oracle": (config.oracle_root, " --oracle"),
        }[need]

    def _fitted_uri(self, chosen: ChosenMethod, made_of: Mapping[str, Any]) -> str:
        digest = digest_of({key: value for key, value in made_of.items() if key not in ("data", "shape")})
        uri = join(self._root, file_name(f"fitted-{chosen.label}", digest, ".safetensors"))
        self.fits[uri] = FitTask(config=self.config, label=chosen.label, uri=uri)
        return uri

    def _ingredient(self, need: Ingredient, label: str) -> None:
        """Look up what determines it, or raise."""
        if need in self._found:
            return
        config = self.config
        if need == "adapters":
            self._found[need] = self._digests_of(list_adapters(config.adapters_root))
        elif need == "tune":
            assert config.data.tune is not None
            self._found[need] = load_data(config.data.tune).digest()
        elif need == "synthetic":
            self._found[need] = metric_files(config)
        else:
            root, option = self._trained_by(need)
            if not exists(join(root, CONFIG_NAME)):
                raise ConfigError(f"evaluation.methods: {label} needs {root}; run `lr-ray train{option}` first or leave it out")
            (self._found[need],) = self._digests_of([root])

    def _digests_of(self, folders: Sequence[str]) -> list[str]:
        """Of adapters, which fit the backbone or are an AdapterError."""
        return [spec.digest for spec in read_specs(folders, on=self._backbone)]


def check_evaluation(config: ExperimentConfig) -> LabelledImages:
    """What can be told before anything is trained; returns the images to test on.

    Raises:
        ConfigError: no test data, an unknown method, or one that needs real images where none are given.
        EpisodeError: too few classes or images, or more classes than a method is made for.
    """
    if config.data.test is None:
        raise ConfigError("data.test is not set: name the real images of unseen classes, with --data or in the config")
    for label in expand(config.evaluation.methods):
        if config.data.tune is None and (needs := {"tune", "oracle"}.intersection(find_method(label).needs)):
            what = "learns from" if "tune" in needs else "is trained on"
            if "tune" in needs or not exists(join(config.oracle_root, CONFIG_NAME)):
                raise ConfigError(f"evaluation.methods: {label} {what} real images; set data.tune or leave it out")
    data = load_data(config.data.test)
    for shape in config.evaluation.shapes:
        draw_episodes(data.labels, shape, num_episodes=1, seed=config.seed, class_names=data.class_names)
        _check_ways(config, shape, most_ways(shape, num_classes=len(np.unique(data.labels))))
    return data


def _check_ways(config: ExperimentConfig, shape: TestShape, most: int) -> None:
    """Raise if a method is made for episodes of fewer classes."""
    for chosen in map(find_method, expand(config.evaluation.methods)):
        room = chosen.method.max_way(chosen.settings) if isinstance(chosen.method, FeatureMethod) else None
        if room is not None and most > room:
            raise EpisodeError(
                f"evaluation.methods: {chosen.label} is made for {room} ways, but episodes of {shape.name} have up to {most}; "
                "choose a setting of it that does, or leave it out"
            )


def test_data_of(config: ExperimentConfig) -> LabelledImages:
    """The images that a planned evaluation tests on."""
    assert config.data.test is not None
    return load_data(config.data.test)


def _spans(total: int, length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, length):
        yield start, min(start + length, total)
