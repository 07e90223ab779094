"""Episodes: drawn from a pool of images, the same for the same seed and index on any worker."""

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePool:
    """Images that episodes are drawn from, synthetic or real.

    Attributes:
        images: (M, 3, H, W) uint8.
        class_of: (M,) class of each image, in [0, C).
        class_names: C names; two adapters may have a class of the same name.
        adapter_of: (C,) adapter of each class.
        slot_of: (C,) index of each class in its adapter.
        teacher_logits: (M, largest number of classes of an adapter), zero-padded, or None for real images.
        patch_order: (M, P) most attended first, or None for real images.
    """

    images: Tensor
    class_of: np.ndarray
    class_names: tuple[str, ...]
    adapter_of: np.ndarray
    slot_of: np.ndarray
    teacher_logits: Tensor | None = None
    patch_order: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """One few-shot task; images class by class.

    Attributes:
        support_images: (N·S, 3, H, W) uint8.
        query_images: (N·Q, 3, H, W) uint8.
        query_labels: (N·Q,) in [0, N).
        keep_indices: (N·S + N·Q, K) patches of support, then query, to keep, or None for all.
        teacher_logits: (N·Q, N) of the adapter whose classes these are, or None in an episode across adapters.
    """

    n_way: int
    support_images: Tensor
    query_images: Tensor
    query_labels: Tensor
    keep_indices: Tensor | None
    teacher_logits: Tensor | None


class EpisodeSampler:
    """Draws episode number `index` of a seed from a pool; stateless, so any worker can draw any episode."""

    def __init__(self, pool: ImagePool, shape: EpisodeShape, *, seed: int, adapter_share: float, keep_ratio: float) -> None:
        """Check the pool once.

        Args:
            adapter_share: share of the episodes that hold classes of one adapter, with its logits; the others cross
                adapters.
            keep_ratio: share of the patches kept, most attended first; 1 keeps all.

        Raises:
            EpisodeError: too few classes or images for the shape, or sparse tokens of images without patch order.
        """
        self._pool, self._shape, self._seed, self._adapter_share = pool, shape, seed, adapter_share
        self._members = [np.flatnonzero(pool.class_of == c) for c in range(len(pool.class_names))]
        self._num_kept: int | None = None
        if keep_ratio < 1:
            if pool.patch_order is None:
                raise EpisodeError("keep_ratio below 1 needs synthetic images, which know their patch order; set it to 1")
            self._num_kept = num_kept(pool.patch_order.shape[1], keep_ratio)
        need = shape.n_shot + shape.n_query
        for name, members in zip(pool.class_names, self._members, strict=True):
            if len(members) < need:
                raise EpisodeError(
                    f"class {name!r} has {len(members)} images, but {shape.n_shot} shots and {shape.n_query} queries "
                    f"need {need}; lower n_query or give more images"
                )
        sizes = np.bincount(pool.adapter_of) if len(pool.adapter_of) else np.zeros(1, int)
        self._adapters = np.flatnonzero(sizes >= shape.n_way)
        if adapter_share > 0 and not len(self._adapters):
            raise EpisodeError(f"{shape.n_way}-way episodes of one adapter: the adapters have at most {sizes.max()} classes")
        if adapter_share < 1 and (distinct := len(set(pool.class_names))) < shape.n_way:
            raise EpisodeError(f"{shape.n_way}-way episodes need {shape.n_way} classes, but there are {distinct}")

    def draw(self, index: int) -> Episode:
        """Episode number `index`: its classes, support and query images."""
        rng = np.random.default_rng((self._seed, index))
        kind: EpisodeKind = "adapter" if rng.random() < self._adapter_share else "cross"
        classes = self._one_adapter(rng) if kind == "adapter" else self._across(rng)
        n_shot, n_query = self._shape.n_shot, self._shape.n_query
        picks = np.stack([rng.choice(self._members[c], n_shot + n_query, replace=False) for c in classes])
        support, query = torch.from_numpy(picks[:, :n_shot].ravel()), torch.from_numpy(picks[:, n_shot:].ravel())
        pool, logits = self._pool, None
        if kind == "adapter" and pool.teacher_logits is not None:
            logits = pool.teacher_logits[query][:, torch.from_numpy(pool.slot_of[classes])]
        return Episode(
            n_way=len(classes),
            support_images=pool.images[support],
            query_images=pool.images[query],
            query_labels=torch.arange(len(classes)).repeat_interleave(n_query),
            keep_indices=self.keep_indices(torch.cat([support, query])),
            teacher_logits=logits,
        )

    def keep_indices(self, positions: Tensor) -> Tensor | None:
        """(B,) positions in the pool → (B, K) patches to keep, or None for all."""
        if self._num_kept is None or self._pool.patch_order is None:
            return None
        return self._pool.patch_order[positions, : self._num_kept]

    def _one_adapter(self, rng: np.random.Generator) -> np.ndarray:
        candidates = np.flatnonzero(self._pool.adapter_of == rng.choice(self._adapters))
        return rng.choice(candidates, self._shape.n_way, replace=False)

    def _across(self, rng: np.random.Generator) -> np.ndarray:
        """Classes of any adapters, no name twice: two adapters may know the same class."""
        names = np.array(self._pool.class_names)
        chosen: list[int] = []
        for c in rng.permutation(len(names)):
            if names[c] not in names[chosen]:
                chosen.append(int(c))
            if len(chosen) == self._shape.n_way:
                break
        return np.array(chosen)


def draw_test_episodes(labels: np.ndarray, shape: EpisodeShape, *, num_episodes: int, seed: int) -> np.ndarray:
    """Image indices of seeded test episodes, the same for every method.

    Args:
        labels: (M,) class of each image.

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
            raise EpisodeError(
                f"class {c} has {len(found)} images, but {shape.n_shot} shots and {shape.n_query} queries need {need}; "
                "lower n_query or give more images"
            )
    episodes = np.empty((num_episodes, shape.n_way, need), dtype=np.int64)
    for index in range(num_episodes):
        rng = np.random.default_rng((seed, index))
        for row, c in enumerate(rng.choice(classes, shape.n_way, replace=False)):
            episodes[index, row] = rng.choice(members[c], need, replace=False)
    return episodes
