"""What is in memory when, and which batches come of it."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lr_ray.errors import EpisodeError
from lr_ray.fewshot.distill import TrainConfig, TrainingBatch
from lr_ray.fewshot.episodes import ClassImages, ClassRef, ImagePool
from lr_ray.fewshot.relations import RelationTargets
from lr_ray.fewshot.stream import BatchMaker, ClassBuffer, ClassSchedule, Shelf, episode_numbers, pack, unpack
from tests.fewshot.pools import classes_of, refs_of

MakePool = Callable[..., ImagePool]
MANY = [[f"{adapter}{c}" for c in range(5)] for adapter in "abcdefghijkl"]


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"episode": {"n_way": 3, "n_shot": 1, "n_query": 2}, "augmentation": {"flip": False}, **changes})


class Shop:
    """Gives classes of a pool, and remembers which were asked for."""

    def __init__(self, pool: ImagePool) -> None:
        self.refs = refs_of(pool)
        self._images = dict(zip(self.refs, classes_of(pool), strict=True))
        self.asked: list[ClassRef] = []

    def read(self, shelves: Sequence[Shelf]) -> list[list[ClassImages]]:
        self.asked += [ref for shelf in shelves for ref in shelf]
        return [[self._images[ref] for ref in shelf] for shelf in shelves]

    def maker(self, settings: TrainConfig, *, seed: int = 3, relations: RelationTargets | None = None) -> BatchMaker:
        buffer = ClassBuffer(ClassSchedule(self.refs, settings, seed=seed), self.read)
        return BatchMaker(self.refs, buffer, settings, seed=seed, grid_size=(1, 1), relations=relations)


def same(one: TrainingBatch, other: TrainingBatch) -> bool:
    return pack([one]) == pack([other])


def test_a_set_that_fits_is_read_once_and_in_its_order(make_pool: MakePool):
    shop = Shop(make_pool(MANY))
    maker = shop.maker(config())
    for index in (0, 700, 3):
        maker.draw(index)
    assert shop.asked == list(shop.refs)


def test_the_buffer_is_never_larger_than_asked_for(make_pool: MakePool):
    shop = Shop(make_pool(MANY))
    buffer = ClassBuffer(ClassSchedule(shop.refs, config(stream={"buffer_classes": 23}), seed=0), shop.read)
    sizes = {len(buffer.at(index)) for index in range(400)}
    assert max(sizes) <= 23
    assert min(sizes) > 10


def test_memory_moves_on_as_episodes_are_drawn(make_pool: MakePool):
    """A class takes part in `uses_per_class` episodes on average, and is read again only when all others were."""
    shop = Shop(make_pool(MANY))
    maker = shop.maker(config(stream={"buffer_classes": 20, "uses_per_class": 2}))
    for index in range(200):
        maker.draw(index)
    assert len(shop.asked) == pytest.approx(200 * 3 / 2, abs=20 + 5)
    assert set(shop.asked[: len(shop.refs)]) == set(shop.refs), "a whole pass comes before any class comes again"


@pytest.mark.parametrize("adapter_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("buffer_classes", [20, 500])
def test_a_worker_may_begin_anywhere(make_pool: MakePool, adapter_share: float, buffer_classes: int):
    settings = config(adapter_share=adapter_share, stream={"buffer_classes": buffer_classes, "uses_per_class": 2})
    whole = Shop(make_pool(MANY)).maker(settings)
    expected = [whole.draw(index) for index in range(120)]
    for start in (0, 41, 119):
        other = Shop(make_pool(MANY)).maker(settings)
        assert all(same(other.draw(index), expected[index]) for index in range(start, 120, 3))


def test_other_seeds_go_through_the_set_in_other_orders(make_pool: MakePool):
    shop = Shop(make_pool(MANY))
    settings = config(stream={"buffer_classes": 20})
    first, other = (ClassSchedule(shop.refs, settings, seed=seed).shelf(0) for seed in (0, 1))
    assert first != other


def test_shelves_hold_classes_of_one_adapter_for_its_episodes_and_change_with_every_pass(make_pool: MakePool):
    shop = Shop(make_pool([["a", "b", "c", "d", "e", "f", "g"], ["h", "i", "j"], ["k"]]))
    schedule = ClassSchedule(shop.refs, config(adapter_share=1, stream={"buffer_classes": 8}), seed=0)
    passes = [[schedule.shelf(4 * number + i) for i in range(4)] for number in range(20)]
    for shelves in passes:
        assert sorted(ref.name for shelf in shelves for ref in shelf) == list("abcdefghijk")
        assert all(len({ref.adapter for ref in shelf}) == 1 for shelf in shelves)
        assert sorted(map(len, shelves)) == [1, 3, 3, 4]
    assert len({frozenset(map(frozenset, shelves)) for shelves in passes}) > 10


def test_episodes_of_one_adapter_find_its_classes_in_memory(make_pool: MakePool):
    maker = Shop(make_pool(MANY)).maker(config(adapter_share=1, stream={"buffer_classes": 15, "uses_per_class": 1}))
    assert all(maker.draw(index).teacher_logits is not None for index in range(100))


def test_episodes_across_adapters_mix_them(make_pool: MakePool):
    pool = make_pool(MANY)
    maker = Shop(pool).maker(config(adapter_share=0, stream={"buffer_classes": 15, "uses_per_class": 1}))
    mixed = 0
    for index in range(50):
        images = (maker.draw(index).pixels[:3, 0, 0, 0] * 255).round().long()
        mixed += len(set(pool.adapter_of[pool.class_of[images]])) > 1
    assert mixed > 40


def test_a_buffer_too_small_for_an_episode(make_pool: MakePool):
    maker = Shop(make_pool(MANY)).maker(config(adapter_share=0, stream={"buffer_classes": 2}))
    with pytest.raises(EpisodeError, match=r"3-way episodes need 3 classes, but there are 2"):
        maker.draw(0)


def targets(pool: ImagePool) -> RelationTargets:
    features = torch.arange(len(pool.images), dtype=torch.float)[:, None]
    return RelationTargets(images=pool.images, keep_indices=None, features=features)


def test_relations_take_the_place_of_their_share_of_the_episodes(make_pool: MakePool):
    pool = make_pool(MANY[:4], per_class=5)
    for share, least, most in ((0.0, 0, 0), (0.25, 15, 37), (1.0, 100, 100)):
        maker = Shop(pool).maker(config(relations={"share": share, "batch_size": 6}), relations=targets(pool))
        drawn = [maker.draw(index) for index in range(100)]
        related = [batch for batch in drawn if batch.relation_target is not None]
        assert least <= len(related) <= most
        for batch in related:
            assert len(batch.pixels) == 6
            torch.testing.assert_close(batch.pixels[:, 0, 0, :1] * 255, batch.relation_target)
        assert all(batch.n_way == (3 if batch.relation_target is None else 0) for batch in drawn)


def test_fewer_views_than_a_batch_of_relations(make_pool: MakePool):
    pool = make_pool([["a", "b", "c"]])
    with pytest.raises(EpisodeError, match="batch_size 73: there are 18 views; lower it"):
        Shop(pool).maker(config(relations={"share": 1.0, "batch_size": 73}), relations=targets(pool))


def test_images_for_plain_supervision_carry_their_class(make_pool: MakePool):
    pool = make_pool([["a", "b", "c"], ["c", "d", "e"]])
    maker = Shop(pool).maker(config(objective="joint"))
    seen = set()
    for index in range(50):
        batch = maker.draw(index)
        images = (batch.pixels[:, 0, 0, 0] * 255).round().long()
        names = [pool.class_names[c] for c in pool.class_of[images]]
        assert ["abcde"[label] for label in batch.labels] == names
        seen.update(images.tolist())
    assert seen == set(range(36))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_episode_is_taken_by_one_worker(world_size: int):
    settings = config(episodes_per_step=4)
    taken = [
        number
        for step in range(5)
        for rank in range(world_size)
        for number in episode_numbers(step, settings, rank=rank, world_size=world_size)
    ]
    assert sorted(taken) == list(range(20))


def test_every_episode_is_augmented_anew(make_pool: MakePool):
    maker = Shop(make_pool([["a", "b", "c"]], per_class=3)).maker(
        config(adapter_share=0, augmentation={"flip": False, "colour": 0.5})
    )
    assert len({maker.draw(index).pixels.mean().item() for index in range(20)}) == 20


def test_batches_survive_the_way_between_processes():
    whole = TrainingBatch(
        pixels=torch.rand(5, 3, 4, 4),
        keep_indices=torch.arange(10).view(5, 2),
        n_way=2,
        labels=torch.tensor([0, 1, 1]),
        teacher_logits=torch.rand(3, 2).half(),
    )
    bare = TrainingBatch(pixels=torch.rand(2, 3, 4, 4), relation_target=torch.rand(2, 7))
    found = unpack(pack([whole, bare]))
    assert pack(found) == pack([whole, bare])
    assert torch.equal(found[0].labels, whole.labels)
    assert (found[0].n_way, found[1].n_way) == (2, 0)
    assert found[1].keep_indices is None
    assert found[1].labels is None
