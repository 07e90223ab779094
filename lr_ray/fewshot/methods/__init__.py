"""Few-shot methods, a file each, found by themselves: a file put beside these, or an installed package's entry point in
the group `lr_ray.methods`, that has a `METHOD` (or `METHODS`) is a method; `UNAVAILABLE` tells why some are not.

Two kinds. A `FeatureMethod` needs the features of the images alone, which are computed once for all episodes and all
methods that share them. A `TunedMethod` trains on every episode's support set. In `evaluation.methods` a method's
settings follow its name: `loras-avg:3` (its first one), `bpa:features=recycle,regularisation=0.2`.
"""

import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from lr_ray.errors import ConfigError, did_you_mean
from lr_ray.fewshot.metric import MetricConfig
from lr_ray.section import Section
from lr_ray.vit.backbone import Backbone, Precision
from lr_ray.vit.lora import Adapter
from lr_ray.vit.tokens import encode_pixels

Ingredient = Literal["adapters", "meta_lora", "joint", "oracle", "tune", "synthetic"]
"""What a method may need besides the backbone; `tune`: real labelled images of other classes; `synthetic`: inverted ones."""
Embed = Callable[[Tensor], Tensor]
"""(B, 3, H, W) uint8 → (B, D) features."""
Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of E episodes at once: (E, S, D) support features, their (S,) ways in [0, N), way by way and each at least once, the same in
all of them, (E, M, D) features of queries → (E, M, N) scores, the highest wins."""
ENTRY_POINTS = "lr_ray.methods"


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodInputs:
    """What a method may draw on; each is read only by the methods that need it.

    Attributes:
        adapters: the library.
        meta_lora, joint, oracle: what `lr-ray train` made, the latter two with `--joint`, `--oracle`.
    """

    backbone: Backbone
    precision: Precision
    adapters: Callable[[], Iterable[Adapter]]
    meta_lora: Callable[[], Adapter]
    joint: Callable[[], Adapter]
    oracle: Callable[[], Adapter]

    def embed(self, images: Tensor) -> Tensor:
        """The backbone as it is now."""
        return encode_pixels(self.backbone, images, precision=self.precision)


class NoSettings(Section):
    """Of a method that has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureMethod:
    """A head on features.

    Attributes:
        source: where the method and the defaults of its settings are from.
        features: settings → what the features are of: a name that `embedder` knows.
        head: (settings, what `fit` gave, or the metric's tensors) → the head.
        fit: (settings, (M, D) features of images of other classes, (M,) classes, seed, config of the metric) → tensors,
            trained once before the episodes; default nothing.
        fit_on: which images: real ones, or the synthetic ones that the metric is learnt from; where that is from views, the
            features are of those, and in the place of the classes is which image each shows.
        metric: settings → whether the head reads the metric that is kept with the meta-LoRA of its features, if one is.
        num_trained: (settings, ways, D) → parameters that are trained on each episode.
        max_way: settings → most classes of an episode that the head is made for; None: any number.
    """

    name: str
    source: str
    settings: type[Section] = NoSettings
    features: Callable[[Any], str]
    head: Callable[[Any, Mapping[str, Tensor]], Head]
    fit: Callable[[Any, Tensor, Tensor, int, MetricConfig], dict[str, Tensor]] | None = None
    fit_on: Literal["tune", "synthetic"] = "tune"
    metric: Callable[[Any], bool] = lambda _settings: False
    num_trained: Callable[[Any, int, int], int] = lambda _settings, _n_way, _dim: 0
    max_way: Callable[[Any], int | None] = lambda _settings: None


@dataclass(frozen=True, kw_only=True, slots=True)
class FewShotTask:
    """One test episode.

    Attributes:
        support: (S, 3, H, W) uint8.
        labels: (S,) int64 ways in [0, N), each at least once.
        queries: (M, 3, H, W) uint8.
    """

    support: Tensor
    labels: Tensor
    queries: Tensor

    def is_like(self, other: "FewShotTask") -> bool:
        """Whether one call may take both."""
        same_shapes = self.support.shape == other.support.shape and self.queries.shape == other.queries.shape
        return same_shapes and torch.equal(self.labels, other.labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adaptation:
    """What training on one support set gave.

    Attributes:
        scores: (M, N) of the queries, the highest wins.
        num_trained: parameters that were trained.
    """

    scores: Tensor
    num_trained: int


Adapt = Callable[[Sequence[FewShotTask], Sequence[int]], list[Adaptation]]
"""Episodes that are alike, and each one's seed → what training on each gave, whichever others it shares the call with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedMethod:
    """Training on each episode's support set.

    Attributes:
        source: where the method and the defaults of its settings are from.
        needs: what it reads, besides the backbone.
        adapt: (inputs, settings) → a context within which episodes are done; the backbone is left as it was.
        at_once: settings → how many episodes a call takes at most.
    """

    name: str
    source: str
    settings: type[Section] = NoSettings
    needs: Callable[[Any], tuple[Ingredient, ...]] = lambda _settings: ()
    adapt: Callable[[MethodInputs, Any], AbstractContextManager[Adapt]]
    at_once: Callable[[Any], int] = lambda _settings: 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenMethod:
    """A method with its settings; `label` is how it was asked for."""

    label: str
    method: FeatureMethod | TunedMethod
    settings: Any

    @property
    def needs(self) -> tuple[Ingredient, ...]:
        """What must be there before it can be measured."""
        from lr_ray.fewshot.methods.features import needs_of

        if isinstance(self.method, TunedMethod):
            return self.method.needs(self.settings)
        of_features = needs_of(self.method.features(self.settings))
        return of_features if self.method.fit is None else (*of_features, self.method.fit_on)


@cache
def known_methods() -> dict[str, FeatureMethod | TunedMethod]:
    """{name: method}, of this package and of those that are installed beside it."""
    found = [method for module in _modules() if (method := getattr(module, "METHOD", None)) is not None]
    found += [method for module in _modules() for method in getattr(module, "METHODS", ())]
    found += [entry.load() for entry in entry_points(group=ENTRY_POINTS)]
    return {method.name: method for method in found}


def _modules() -> list[ModuleType]:
    return [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]


def expand(labels: Iterable[str]) -> tuple[str, ...]:
    """`all` becomes every known method with its defaults; none twice."""
    given = tuple(labels)
    others = sorted(known_methods().keys() - set(given))
    return tuple(dict.fromkeys(name for label in given for name in (others if label == "all" else [label])))


def find_method(label: str) -> ChosenMethod:
    """The method of that name, with the settings after its colon.

    Raises:
        ConfigError: no such method or setting, or a value that is not allowed.
    """
    name, _, text = label.partition(":")
    for module in _modules():
        if (reason := getattr(module, "UNAVAILABLE", {}).get(name.lower())) is not None:
            raise ConfigError(f"evaluation.methods: {name} {reason}")
    known = known_methods()
    if name not in known:
        raise ConfigError(
            f"evaluation.methods: {label!r} is not a method; {did_you_mean(name, known)}there are {', '.join(known)}"
        )
    method = known[name]
    fields = method.settings.model_fields
    allowed = ", ".join(f"{field} (default {info.default})" for field, info in fields.items()) or "none"
    if text and "=" not in text and fields:
        values = {next(iter(fields)): text}
    else:
        values = dict(_pair(part) for part in text.split(",") if part)
    try:
        settings = method.settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = "no such setting" if first["type"] == "extra_forbidden" else first["msg"]
        raise ConfigError(f"evaluation.methods: {label!r}: {where}: {problem}; settings of {name}: {allowed}") from error
    return ChosenMethod(label=label, method=method, settings=settings)


def ingredients_of(labels: Iterable[str]) -> set[Ingredient]:
    """What these methods need together; raises as `find_method`."""
    return {need for label in expand(labels) for need in find_method(label).needs}


def _pair(part: str) -> tuple[str, str]:
    key, _, value = part.partition("=")
    return key.strip(), value.strip()
