"""What a metric is fitted on: the features of a set's images or of views of them, or of a part of a large set."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor

from lr_ray.fewshot.episodes import ClassImages, ClassRef
from lr_ray.fewshot.metric import MetricConfig
from lr_ray.fewshot.stream import Shelf
from lr_ray.vit.augment import draw_views

_CLASSES = 2000
_IMAGES_PER_CLASS = 100
_CLASSES_AT_ONCE = 8


def embed_classes(
    refs: Sequence[ClassRef],
    read: Callable[[Sequence[Shelf]], list[list[ClassImages]]],
    embed: Callable[[Tensor], Tensor],
    config: MetricConfig,
    *,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """(M, D) features, and the (M,) classes that they are of; of views, if there are to be any, the images that those show.

    Of more than 2,000 classes, and of more than 100 images or views of a class, so many at random. The images of a few classes
    are in memory at a time.

    Args:
        read: the images of some classes.
        embed: (B, 3, H, W) uint8 → (B, D).
        config: whose `views_per_image` of each image are drawn.

    Raises: as `read`.
    """
    rng = np.random.default_rng((seed, 4))
    kept = np.sort(rng.permutation(len(refs))[:_CLASSES])
    num_views = config.views_per_image
    features: list[Tensor] = []
    kinds: list[Tensor] = []
    for shelf in _shelves([refs[position] for position in kept]):
        for found in read([shelf])[0]:
            order = np.sort(rng.permutation(len(found.images))[: max(1, _IMAGES_PER_CLASS // max(1, num_views))])
            images, shown = found.images[torch.from_numpy(order)], torch.zeros(len(order), dtype=torch.long)
            if num_views:
                shown = torch.arange(len(order)).repeat(num_views)
                images = _views(images, config, seed=int(rng.integers(2**31)))
            features.append(embed(images).cpu())
            kinds.append(shown + (int(kinds[-1].max()) + 1 if kinds else 0))
    return torch.cat(features), torch.cat(kinds)


def _views(images: Tensor, config: MetricConfig, *, seed: int) -> Tensor:
    """(M, 3, H, W) uint8 → (V·M, 3, H, W): one of each image, then another of each."""
    return draw_views(images, None, config.views, views_per_image=config.views_per_image, grid_size=(1, 1), seed=seed)[0]


def _shelves(refs: Sequence[ClassRef]) -> Iterator[Shelf]:
    """Each of one file."""
    for _, of_file in groupby(refs, key=lambda ref: ref.file):
        while shelf := tuple(islice(of_file, _CLASSES_AT_ONCE)):
            yield shelf
