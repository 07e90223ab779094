"""Episodes: drawn from classes of images, the same for the same seed and index on any worker."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from lr_ray.errors import EpisodeError
from lr_ray.section import Section
from lr_ray.vit.tokens import num_kept

EpisodeKind = Literal["adapter", "cross"]


class EpisodeShape(Section):
    """N-way K-shot, Q queries per class."""

    n_way: int = Field(default=5, gt=1)
    """Classes of an episode."""
    n_shot: int = Field(default=1, gt=0)
    """Support images per class."""
    n_query: int = Field(default=15, gt=0)
    """Query images per class."""

    @property
    def name(self) -> str:
        """`5-way 1-shot`."""
        return f"{self.n_way}-way {self.n_shot}-shot"


class Countable(Protocol):
    """What must be known of a class to tell whether episodes can be drawn from it."""

    @property
    def name(self) -> str: ...
    @property
    def adapter(self) -> str: ...
    @property
    def num_images(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassRef:
    """A class of a set at rest.

    Attributes:
        file, row_group: where its images are; for real images "" and its number.
        adapter: id of the adapter that it belongs to, "" for real images.
        slot: its index in the adapter.
        name: two adapters may have a class of the same name.
    """

    file: str
    row_group: int
    adapter: str
    slot: int
    name: str
    num_images: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassImages:
    """The images of a class in memory.

    Attributes:
        name, adapter, slot: as in `ClassRef`.
        images: (M, 3, H, W) uint8.
        teacher_logits: (M, C) of its adapter, or None for real images.
        flipped_logits: (M, C) the same of the mirrored images.
        patch_order: (M, P) most attended first, or None for real images.
    """

    name: str
    adapter: str
    slot: int
    images: Tensor
    teacher_logits: Tensor | None = None
    flipped_logits: Tensor | None = None
    patch_order: Tensor | None = None

    @property
    def num_images(self) -> int:
        return len(self.images)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePool:
    """A whole set of synthetic images in memory.

    Attributes:
        images: (M, 3, H, W) uint8.
        class_of: (M,) class of each image, in [0, C).
        class_names: C names; two adapters may have a class of the same name.
        adapter_of: (C,) adapter of each class.
        slot_of: (C,) index of each class in its adapter.
        teacher_logits, flipped_logits: (M, largest number of classes of an adapter), zero-padded.
        patch_order: (M, P) most attended first.
    """

    images: Tensor
    class_of: np.ndarray
    class_names: tuple[str, ...]
    adapter_of: np.ndarray
    slot_of: np.ndarray
    teacher_logits: Tensor
    flipped_logits: Tensor
    patch_order: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One few-shot task; images class by class.

    Attributes:
        support_images: (N·S, 3, H, W) uint8.
        query_images: (N·Q, 3, H, W) uint8.
        query_labels: (N·Q,) in [0, N).
        keep_indices: (N·S + N·Q, K) patches of support, then query, to keep, or None for all.
        teacher_logits: (N·Q, N) of the adapter whose classes these are, or None in an episode across adapters.
        flipped_logits: (N·Q, N) the same of the mirrored queries.
    """

    n_way: int
    support_images: Tensor
    query_images: Tensor
    query_labels: Tensor
    keep_indices: Tensor | None
    teacher_logits: Tensor | None
    flipped_logits: Tensor | None


def check_classes(classes: Sequence[Countable], shape: EpisodeShape, *, adapter_share: float) -> None:
    """Raise unless episodes of that shape can be drawn from the classes.

    Raises:
        EpisodeError: too few classes, or a class with too few images.
    """
    need = shape.n_shot + shape.n_query
    for found in classes:
        if found.num_images < need:
            raise EpisodeError(
                f"class {found.name!r} has {found.num_images} images, but {shape.n_shot} shots and {shape.n_query} queries "
                f"need {need}; lower n_query or give more images"
            )
    most = max((len(members) for members in _by_adapter(classes)), default=0)
    if adapter_share > 0 and most < shape.n_way:
        raise EpisodeError(f"{shape.n_way}-way episodes of one adapter: the adapters have at most {most} classes")
    if adapter_share < 1 and (distinct := len({found.name for found in classes})) < shape.n_way:
        raise EpisodeError(f"{shape.n_way}-way episodes need {shape.n_way} classes, but there are {distinct}")


def _by_adapter(classes: Sequence[Countable]) -> list[np.ndarray]:
    """The positions of each adapter's classes; the adapters in the order of their first."""
    groups: dict[str, list[int]] = {}
    for position, found in enumerate(classes):
        groups.setdefault(found.adapter, []).append(position)
    return [np.array(group) for group in groups.values()]


class EpisodeSampler:
    """Draws episode number `index` of a seed from some classes; stateless, so any worker can draw any episode."""

    def __init__(
        self,
        classes: Sequence[ClassImages],
        shape: EpisodeShape,
        *,
        seed: int,
        adapter_share: float,
        keep_ratio: float,
        smallest: EpisodeShape | None = None,
    ) -> None:
        """Check the classes once.

        Args:
            shape: of all episodes, or with `smallest` of the largest.
            adapter_share: share of the episodes that hold classes of one adapter, with its logits; the others cross
                adapters.
            keep_ratio: share of the patches kept, most attended first; 1 keeps all.
            smallest: way, shot and queries are drawn anew for each episode, from here to `shape`.

        Raises:
            EpisodeError: too few classes or images for the shape, or sparse tokens of images without patch order.
        """
        check_classes(classes, shape, adapter_share=adapter_share)
        self._classes, self._shape, self._smallest = classes, shape, smallest
        self._seed, self._adapter_share = seed, adapter_share
        self._names = np.array([found.name for found in classes])
        self._adapters = [group for group in _by_adapter(classes) if len(group) >= shape.n_way]
        orders = [found.patch_order for found in classes]
        self._num_kept: int | None = None
        if keep_ratio < 1:
            if (first := orders[0]) is None:
                raise EpisodeError("keep_ratio below 1 needs synthetic images, which know their patch order; set it to 1")
            self._num_kept = num_kept(first.shape[1], keep_ratio)

    def draw(self, index: int) -> Episode:
        """Episode number `index`: its classes, support and query images."""
        rng = np.random.default_rng((self._seed, index))
        kind: EpisodeKind = "adapter" if rng.random() < self._adapter_share else "cross"
        shape = self._shape if self._smallest is None else _between(self._smallest, self._shape, rng)
        positions = self._one_adapter(rng, shape) if kind == "adapter" else self._across(rng, shape)
        chosen = [self._classes[position] for position in positions]
        n_shot, need = shape.n_shot, shape.n_shot + shape.n_query
        picks = [torch.from_numpy(rng.choice(found.num_images, need, replace=False)) for found in chosen]
        support = [(found, pick[:n_shot]) for found, pick in zip(chosen, picks, strict=True)]
        query = [(found, pick[n_shot:]) for found, pick in zip(chosen, picks, strict=True)]
        slots = torch.tensor([found.slot for found in chosen])
        taught = kind == "adapter" and chosen[0].teacher_logits is not None
        return Episode(
            n_way=len(chosen),
            support_images=torch.cat([found.images[pick] for found, pick in support]),
            query_images=torch.cat([found.images[pick] for found, pick in query]),
            query_labels=torch.arange(len(chosen)).repeat_interleave(shape.n_query),
            keep_indices=self.keep_indices([*support, *query]),
            teacher_logits=torch.cat([_present(c.teacher_logits)[pick][:, slots] for c, pick in query]) if taught else None,
            flipped_logits=torch.cat([_present(c.flipped_logits)[pick][:, slots] for c, pick in query]) if taught else None,
        )

    def keep_indices(self, picks: Sequence[tuple[ClassImages, Tensor]]) -> Tensor | None:
        """Images of some classes → (B, K) patches to keep, or None for all."""
        if self._num_kept is None:
            return None
        return torch.cat([_present(found.patch_order)[pick, : self._num_kept] for found, pick in picks])

    def _one_adapter(self, rng: np.random.Generator, shape: EpisodeShape) -> np.ndarray:
        return rng.choice(self._adapters[rng.choice(len(self._adapters))], shape.n_way, replace=False)

    def _across(self, rng: np.random.Generator, shape: EpisodeShape) -> np.ndarray:
        """Classes of any adapters, no name twice: two adapters may know the same class."""
        chosen: list[int] = []
        for c in rng.permutation(len(self._names)):
            if self._names[c] not in self._names[chosen]:
                chosen.append(int(c))
            if len(chosen) == shape.n_way:
                break
        return np.array(chosen)


def _between(smallest: EpisodeShape, largest: EpisodeShape, rng: np.random.Generator) -> EpisodeShape:
    """Each count uniform from the one to the other."""
    return EpisodeShape(
        n_way=int(rng.integers(smallest.n_way, largest.n_way + 1)),
        n_shot=int(rng.integers(smallest.n_shot, largest.n_shot + 1)),
        n_query=int(rng.integers(smallest.n_query, largest.n_query + 1)),
    )


def _present(values: Tensor | None) -> Tensor:
    assert values is not None
    return values


def draw_test_episodes(
    labels: np.ndarray, shape: EpisodeShape, *, num_episodes: int, seed: int, class_names: Sequence[str] | None = None
) -> np.ndarray:
    """Image indices of seeded test episodes, the same for every method.

    Args:
        labels: (M,) class of each image.
        class_names: what errors call the classes, by their numbers.

    Returns:
        (E, N, S + Q) indices into `labels`, support first.

    Raises:
        EpisodeError: too few classes, or a class with too few images.
    """
    classes = np.unique(labels)
    need = shape.n_shot + shape.n_query
    if len(classes) < shape.n_way:
        raise EpisodeError(f"{shape.n_way}-way episodes: the data have {len(classes)} classes; lower n_way or give more")
    members = {c: np.flatnonzero(labels == c) for c in classes}
    for c, found in members.items():
        if len(found) < need:
            name = class_names[c] if class_names else c
            raise EpisodeError(
                f"class {name} has {len(found)} images, but {shape.n_shot} shots and {shape.n_query} queries need {need}; "
                "lower n_query or give more images"
            )
    episodes = np.empty((num_episodes, shape.n_way, need), dtype=np.int64)
    for index in range(num_episodes):
        rng = np.random.default_rng((seed, index))
        for row, c in enumerate(rng.choice(classes, shape.n_way, replace=False)):
            episodes[index, row] = rng.choice(members[c], need, replace=False)
    return episodes
