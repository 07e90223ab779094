"""What a metric is fitted on: the features of a set's images, or of a part of a large set."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor

from lr_ray.fewshot.episodes import ClassImages, ClassRef
from lr_ray.fewshot.stream import Shelf

_CLASSES = 2000
_IMAGES_PER_CLASS = 100
_CLASSES_AT_ONCE = 8


def embed_classes(
    refs: Sequence[ClassRef],
    read: Callable[[Sequence[Shelf]], list[list[ClassImages]]],
    embed: Callable[[Tensor], Tensor],
    *,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """(M, D) features, and the (M,) classes that they are of; the images of a few classes in memory at a time.

    Of more than 2,000 classes, and of more than 100 images of a class, so many at random.

    Args:
        read: the images of some classes.
        embed: (B, 3, H, W) uint8 → (B, D).

    Raises: as `read`.
    """
    rng = np.random.default_rng((seed, 4))
    kept = np.sort(rng.permutation(len(refs))[:_CLASSES])
    features: list[Tensor] = []
    for shelf in _shelves([refs[position] for position in kept]):
        for found in read([shelf])[0]:
            order = np.sort(rng.permutation(len(found.images))[:_IMAGES_PER_CLASS])
            features.append(embed(found.images[torch.from_numpy(order)]).cpu())
    counts = torch.tensor([len(of_class) for of_class in features])
    return torch.cat(features), torch.arange(len(features)).repeat_interleave(counts)


def _shelves(refs: Sequence[ClassRef]) -> Iterator[Shelf]:
    """Each of one file."""
    for _, of_file in groupby(refs, key=lambda ref: ref.file):
        while shelf := tuple(islice(of_file, _CLASSES_AT_ONCE)):
            yield shelf
