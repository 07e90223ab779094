"""What a metric is fitted on: all images of small sets, some of large ones, whichever files they are in."""

from collections.abc import Sequence

import pytest
import torch

from lr_ray.fewshot.episodes import ClassImages, ClassRef
from lr_ray.fewshot.metric import MetricConfig
from lr_ray.runtime import metric
from lr_ray.runtime.metric import embed_classes
from lr_ray.vit.augment import AugmentationConfig

AS_THEY_ARE = MetricConfig()


def refs_of(counts: Sequence[int], *, per_file: int = 2) -> list[ClassRef]:
    return [
        ClassRef(file=f"f{c // per_file}", row_group=c % per_file, adapter="", slot=c, name=str(c), num_images=count)
        for c, count in enumerate(counts)
    ]


def read(shelves: Sequence[tuple[ClassRef, ...]]) -> list[list[ClassImages]]:
    """Each image is its class and its number."""
    assert all(len({ref.file for ref in shelf}) == 1 for shelf in shelves)
    assert sum(map(len, shelves)) <= 8, "in memory together"
    return [
        [
            ClassImages(
                name=ref.name,
                adapter="",
                slot=ref.slot,
                images=torch.tensor([[ref.slot, i] for i in range(ref.num_images)], dtype=torch.uint8)[:, :, None, None],
            )
            for ref in shelf
        ]
        for shelf in shelves
    ]


def embed(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).float()


def test_all_images_of_a_small_set() -> None:
    features, class_of = embed_classes(refs_of([3, 1, 2]), read, embed, AS_THEY_ARE, seed=0)
    assert features.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 0], [2, 1]]
    assert class_of.tolist() == [0, 0, 0, 1, 2, 2]


def test_few_classes_in_memory_at_a_time() -> None:
    features, class_of = embed_classes(refs_of([1] * 20, per_file=20), read, embed, AS_THEY_ARE, seed=0)
    assert features[:, 0].tolist() == class_of.tolist() == list(range(20))


def test_some_of_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric, "_CLASSES", 4)
    monkeypatch.setattr(metric, "_IMAGES_PER_CLASS", 3)
    refs = refs_of([5] * 9, per_file=4)
    features, class_of = embed_classes(refs, read, embed, AS_THEY_ARE, seed=1)
    assert class_of.tolist() == [c for c in range(4) for _ in range(3)]
    assert len({tuple(row) for row in features.tolist()}) == 12
    assert [len(set(part[:, 0].tolist())) for part in features.split(3)] == [1, 1, 1, 1]
    again, other = (embed_classes(refs, read, embed, AS_THEY_ARE, seed=seed)[0] for seed in (1, 2))
    assert torch.equal(again, features)
    assert not torch.equal(other, features)


@pytest.mark.parametrize(("most", "shown"), [(100, [0, 1, 2] * 3 + [3] * 3), (3, [0] * 3 + [1] * 3), (1, [0] * 3 + [1] * 3)])
def test_views_belong_to_the_image_that_they_show(monkeypatch: pytest.MonkeyPatch, most: int, shown: list[int]) -> None:
    monkeypatch.setattr(metric, "_IMAGES_PER_CLASS", most)
    config = MetricConfig(views_per_image=3, views=AugmentationConfig(flip=False, colour=0.02))

    def read_grey(shelves: Sequence[tuple[ClassRef, ...]]) -> list[list[ClassImages]]:
        """Each image is of one grey of its own."""
        return [
            [
                ClassImages(
                    name=ref.name,
                    adapter="",
                    slot=ref.slot,
                    images=torch.stack(
                        [torch.full((3, 4, 4), 40 * (3 * ref.slot + i + 1), dtype=torch.uint8) for i in range(ref.num_images)]
                    ),
                )
                for ref in shelf
            ]
            for shelf in shelves
        ]

    features, kinds = embed_classes(refs_of([3, 1]), read_grey, embed, config, seed=0)
    assert kinds.tolist() == shown
    greys = features.mean(dim=1)
    for kind in kinds.unique():
        assert greys[kinds == kind].std() < 8
    assert len(features.unique(dim=0)) == len(features)
    centres = torch.stack([greys[kinds == kind].mean() for kind in kinds.unique()])
    assert len((centres / 40).round().unique()) == len(centres)
    assert torch.equal(embed_classes(refs_of([3, 1]), read_grey, embed, config, seed=0)[0], features)
