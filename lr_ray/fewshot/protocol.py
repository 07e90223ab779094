"""What is tested on: episodes of a fixed shape, or of ways and shots that vary as in Meta-Dataset."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from lr_ray.errors import EpisodeError
from lr_ray.fewshot.episodes import EpisodeShape, draw_test_episodes
from lr_ray.section import Section

META_DATASET = "meta-dataset"
_LOG_WEIGHTS = (np.log(0.5), np.log(2.0))
"""Bounds of a class' log weight: how far its share of the support set is from its share of the images."""


class VaryingShape(Section):
    """Ways and shots drawn anew for each episode, shots of each class its own, as Meta-Dataset draws them.

    Triantafillou et al., ICLR 2020, arXiv 1903.03096, section 3.2, with the bounds of its configuration. Classes are drawn
    uniformly, as it draws those of data sets without a hierarchy: that of ImageNet and Omniglot is not followed.
    """

    ways: tuple[Annotated[int, Field(gt=1)], int] = (5, 50)
    """Fewest and most classes of an episode, as many as there are if these are fewer than the most."""
    max_query: int = Field(default=10, gt=0)
    """Query images per class, at most half of the smallest class of the episode."""
    max_support: int = Field(default=500, gt=0)
    """Support images of an episode."""
    max_support_per_class: int = Field(default=100, gt=0)
    """What a class adds to the size of the support set at most, of which the classes' shots are shares."""

    @model_validator(mode="after")
    def _check(self) -> "VaryingShape":
        fewest, most = self.ways
        if fewest > most:
            raise ValueError(f"ways [{fewest}, {most}]: the fewest are more than the most")
        if self.max_support < most:
            raise ValueError(f"max_support {self.max_support} is less than an image for each of {most} ways; raise it")
        return self

    @property
    def name(self) -> str:
        """`varying-way varying-shot`, and what is not as in Meta-Dataset."""
        others = {key: value for key, value in self if value != type(self).model_fields[key].default}
        texts = (f"{key} {'-'.join(map(str, value)) if isinstance(value, tuple) else value}" for key, value in others.items())
        return "varying-way varying-shot" + (f" ({', '.join(texts)})" if others else "")


def _either(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Told apart by their keys, so that an error is of the one that was meant."""
    if isinstance(value, str):
        if value != META_DATASET:
            raise ValueError(f"give n_way, n_shot and n_query, {META_DATASET}, or bounds of that such as ways: [5, 50]")
        return VaryingShape()
    if isinstance(value, Mapping):
        varying = VaryingShape.model_fields.keys() & value.keys()
        return (VaryingShape if varying else EpisodeShape).model_validate(value)
    return value if isinstance(value, VaryingShape) else EpisodeShape.model_validate(value)


TestShape = Annotated[EpisodeShape | VaryingShape, WrapValidator(_either)]
"""In a config a mapping, or `meta-dataset` for a `VaryingShape` as it is there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnEpisode:
    """An episode as images of the data, way by way, in each way the support before the queries, of these as many in each.

    Attributes:
        images: (I,) positions in the data.
        ways: (I,) of the images, in [0, N).
        is_query: (I,) bool.
    """

    images: np.ndarray
    ways: np.ndarray
    is_query: np.ndarray

    @property
    def n_way(self) -> int:
        return int(self.ways[-1]) + 1

    @property
    def size(self) -> tuple[int, int]:
        """(N, Q)."""
        return self.n_way, int(self.is_query.sum()) // self.n_way

    @property
    def support(self) -> np.ndarray:
        """(S,) positions."""
        found: np.ndarray = self.images[~self.is_query]
        return found

    @property
    def support_ways(self) -> np.ndarray:
        """(S,)"""
        found: np.ndarray = self.ways[~self.is_query]
        return found

    @property
    def queries(self) -> np.ndarray:
        """(N·Q,) positions."""
        found: np.ndarray = self.images[self.is_query]
        return found

    @property
    def composition(self) -> tuple[bytes, bytes]:
        """The same for episodes that differ in their images alone."""
        return self.ways.tobytes(), self.is_query.tobytes()


def layout_of(num_support: np.ndarray, num_query: int) -> tuple[np.ndarray, np.ndarray]:
    """`ways` and `is_query` of an episode of (N,) shots and as many queries of each way."""
    ways = np.arange(len(num_support)).repeat(num_support + num_query)
    is_query = np.concatenate([np.arange(shots + num_query) >= shots for shots in num_support])
    return ways, is_query


def most_ways(shape: TestShape, *, num_classes: int) -> int:
    """Of an episode drawn from so many classes."""
    return shape.n_way if isinstance(shape, EpisodeShape) else min(shape.ways[1], num_classes)


def draw_episodes(
    labels: np.ndarray, shape: TestShape, *, num_episodes: int, seed: int, class_names: Sequence[str] | None = None
) -> list[DrawnEpisode]:
    """Seeded test episodes, the same for every method.

    Args:
        labels: (M,) class of each image.
        class_names: what errors call the classes, by their numbers.

    Raises:
        EpisodeError: too few classes, or a class with too few images.
    """
    if isinstance(shape, EpisodeShape):
        dense = draw_test_episodes(labels, shape, num_episodes=num_episodes, seed=seed, class_names=class_names)
        ways, is_query = layout_of(np.full(shape.n_way, shape.n_shot), shape.n_query)
        return [DrawnEpisode(images=images, ways=ways, is_query=is_query) for images in dense.reshape(num_episodes, -1)]
    members = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    if len(members) < shape.ways[0]:
        raise EpisodeError(
            f"episodes of {shape.ways[0]} and more ways: the data have {len(members)} classes; lower ways or give more"
        )
    for found in members:
        if len(found) < 2:
            c = labels[found[0]]
            name = class_names[c] if class_names else c
            raise EpisodeError(
                f"class {name} has {len(found)} images, but a shot and a query need 2; give more or leave it out"
            )
    return [_draw(members, shape, np.random.default_rng((seed, index))) for index in range(num_episodes)]


def _draw(members: Sequence[np.ndarray], shape: VaryingShape, rng: np.random.Generator) -> DrawnEpisode:
    """One episode of the classes of which these are the images."""
    n_way = rng.integers(shape.ways[0], min(shape.ways[1], len(members)) + 1)
    chosen = [members[c] for c in rng.choice(len(members), n_way, replace=False)]
    num_support, num_query = draw_counts(np.array([len(found) for found in chosen]), shape, rng)
    picks = [rng.choice(found, shots + num_query, replace=False) for found, shots in zip(chosen, num_support, strict=True)]
    ways, is_query = layout_of(num_support, num_query)
    return DrawnEpisode(images=np.concatenate(picks), ways=ways, is_query=is_query)


def draw_counts(num_images: np.ndarray, shape: VaryingShape, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Of an episode of classes of (N,) images: the (N,) shots, and the queries of each class."""
    num_query = min(shape.max_query, int(num_images.min()) // 2)
    remaining = num_images - num_query
    beta = 1 - rng.random()  # in (0, 1], so that each class adds an image
    added = np.ceil(beta * np.minimum(shape.max_support_per_class, remaining))
    num_support = min(int(added.sum()), shape.max_support)
    weights = num_images * np.exp(rng.uniform(*_LOG_WEIGHTS, size=len(num_images)))
    shares = weights / weights.sum()
    shots = np.floor(shares * (num_support - len(num_images))).astype(np.int64) + 1
    return np.minimum(shots, remaining), num_query
