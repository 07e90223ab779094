from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from lr_ray.errors import EpisodeError
from lr_ray.fewshot.episodes import Episode, EpisodeSampler, EpisodeShape, ImagePool, draw_test_episodes
from tests.fewshot.pools import classes_of

MakePool = Callable[..., ImagePool]
SHAPE = EpisodeShape(n_way=3, n_shot=2, n_query=3)
TWO_ADAPTERS = [["a", "b", "c", "d"], ["e", "f", "g"]]


def sampler(pool: ImagePool, shape: EpisodeShape = SHAPE, *, synthetic: bool = True, **changes: Any) -> EpisodeSampler:
    return EpisodeSampler(
        classes_of(pool, synthetic=synthetic), shape, **{"seed": 0, "adapter_share": 0.5, "keep_ratio": 1.0, **changes}
    )


def picks(episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """(N, S) and (N, Q) indices into the pool, which the pixels tell."""
    support, query = (part[:, 0, 0, 0].numpy().astype(int) for part in (episode.support_images, episode.query_images))
    return support.reshape(episode.n_way, -1), query.reshape(episode.n_way, -1)


def same(one: Episode, other: Episode) -> bool:
    for name in Episode.__dataclass_fields__:
        a, b = getattr(one, name), getattr(other, name)
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b or a == b):
            return False
    return True


@pytest.mark.parametrize("adapter_share", [0.0, 1.0])
def test_shapes_and_labels(make_pool: MakePool, adapter_share: float):
    episode = sampler(make_pool(TWO_ADAPTERS), adapter_share=adapter_share).draw(0)
    assert episode.n_way == 3
    assert episode.support_images.shape == (6, 3, 1, 1)
    assert episode.query_images.shape == (9, 3, 1, 1)
    assert episode.support_images.dtype == episode.query_images.dtype == torch.uint8
    assert episode.query_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert episode.keep_indices is None


@pytest.mark.parametrize("adapter_share", [0.0, 1.0])
def test_support_and_query_are_of_the_same_classes_and_never_overlap(make_pool: MakePool, adapter_share: float):
    pool = make_pool(TWO_ADAPTERS)
    drawing = sampler(pool, adapter_share=adapter_share)
    for index in range(100):
        support, query = picks(drawing.draw(index))
        both = np.concatenate([support, query], axis=1)
        assert len(np.unique(both)) == both.size
        classes = pool.class_of[both]
        assert (classes == classes[:, :1]).all()
        assert len(np.unique(classes[:, 0])) == 3


def test_a_seed_and_an_index_make_an_episode_whoever_draws_it(make_pool: MakePool):
    pool = make_pool(TWO_ADAPTERS)
    one, other = sampler(pool, keep_ratio=0.5), sampler(pool, keep_ratio=0.5)
    expected = [one.draw(index) for index in range(6)]
    for index in (5, 0, 3, 3):  # in any order, and again
        assert same(other.draw(index), expected[index])
    assert not any(same(expected[0], later) for later in expected[1:])
    assert not any(same(sampler(pool, seed=1, keep_ratio=0.5).draw(index), expected[index]) for index in range(6))


def test_an_episode_of_one_adapter_has_its_teachers_logits(make_pool: MakePool):
    pool = make_pool(TWO_ADAPTERS)
    drawing = sampler(pool, adapter_share=1)
    adapters, slot_orders = set(), set()
    for index in range(50):
        episode = drawing.draw(index)
        support, query = picks(episode)
        classes = pool.class_of[support[:, 0]]
        (adapter,) = set(pool.adapter_of[classes])
        slots = pool.slot_of[classes]
        expected = 100.0 * torch.from_numpy(query.reshape(-1, 1)) + torch.from_numpy(slots)
        torch.testing.assert_close(episode.teacher_logits, expected, check_dtype=False)
        torch.testing.assert_close(episode.flipped_logits, -expected, check_dtype=False)
        adapters.add(adapter)
        slot_orders.add(tuple(slots))
    assert adapters == {0, 1}
    assert len(slot_orders) > 6


def test_adapters_with_too_few_classes_teach_nothing_alone(make_pool: MakePool):
    pool = make_pool([["a", "b"], ["c", "d", "e"], ["f"]])
    drawing = sampler(pool, adapter_share=1)
    for index in range(30):
        support, _ = picks(drawing.draw(index))
        assert set(pool.adapter_of[pool.class_of[support[:, 0]]]) == {1}


def test_real_images_have_no_teacher(make_pool: MakePool):
    drawing = sampler(make_pool(TWO_ADAPTERS), synthetic=False, adapter_share=1)
    assert drawing.draw(0).teacher_logits is None


def test_cross_episodes_never_hold_a_name_twice(make_pool: MakePool):
    pool = make_pool([["a", "b", "c"], ["a", "d", "e"], ["b", "a", "e"]])
    drawing = sampler(pool, EpisodeShape(n_way=5, n_shot=1, n_query=1), adapter_share=0)
    drawn = set()
    for index in range(100):
        episode = drawing.draw(index)
        classes = pool.class_of[picks(episode)[0][:, 0]]
        assert sorted(pool.class_names[c] for c in classes) == ["a", "b", "c", "d", "e"]
        assert episode.teacher_logits is None
        drawn.update(classes.tolist())
    assert drawn == set(range(9))  # every adapter's version of a class has its turn


def test_cross_episodes_cross_adapters(make_pool: MakePool):
    pool = make_pool(TWO_ADAPTERS)
    drawing = sampler(pool, adapter_share=0)
    mixes = {frozenset(pool.adapter_of[pool.class_of[picks(drawing.draw(i))[0][:, 0]]].tolist()) for i in range(50)}
    assert frozenset({0, 1}) in mixes


@pytest.mark.parametrize(("adapter_share", "lowest", "highest"), [(0.0, 0, 0), (1.0, 1000, 1000), (0.5, 437, 563)])
def test_adapter_share_is_the_frequency_of_episodes_of_one_adapter(
    make_pool: MakePool, adapter_share: float, lowest: int, highest: int
):
    drawing = sampler(make_pool(TWO_ADAPTERS), adapter_share=adapter_share)
    taught = sum(drawing.draw(index).teacher_logits is not None for index in range(1000))
    assert lowest <= taught <= highest  # 4 standard deviations of a binomial


@pytest.mark.parametrize(("keep_ratio", "num_kept"), [(0.5, 8), (0.3, 5), (0.01, 1)])
def test_keep_indices_are_the_most_attended_patches(make_pool: MakePool, keep_ratio: float, num_kept: int):
    pool = make_pool(TWO_ADAPTERS)
    drawing = sampler(pool, keep_ratio=keep_ratio)
    for index in range(10):
        episode = drawing.draw(index)
        support, query = picks(episode)
        images = np.concatenate([support.ravel(), query.ravel()])
        assert torch.equal(episode.keep_indices, pool.patch_order[images, :num_kept])


def test_a_shape_that_takes_every_image_can_be_drawn(make_pool: MakePool):
    pool = make_pool([["a", "b"]], per_class=4)
    support, query = picks(sampler(pool, EpisodeShape(n_way=2, n_shot=1, n_query=3)).draw(0))
    assert sorted(np.concatenate([support, query], axis=1).ravel()) == list(range(8))


def test_sparse_tokens_need_a_patch_order(make_pool: MakePool):
    with pytest.raises(EpisodeError, match="keep_ratio below 1 needs synthetic images"):
        sampler(make_pool(TWO_ADAPTERS), synthetic=False, keep_ratio=0.5)


def test_a_class_with_too_few_images_is_named(make_pool: MakePool):
    with pytest.raises(EpisodeError, match=r"class 'a' has 4 images, but 2 shots and 3 queries need 5; lower n_query"):
        sampler(make_pool(TWO_ADAPTERS, per_class=4))


def test_adapters_with_too_few_classes(make_pool: MakePool):
    shape = EpisodeShape(n_way=5, n_shot=1, n_query=1)
    with pytest.raises(EpisodeError, match="5-way episodes of one adapter: the adapters have at most 4 classes"):
        sampler(make_pool(TWO_ADAPTERS), shape, adapter_share=0.5)
    assert sampler(make_pool(TWO_ADAPTERS), shape, adapter_share=0).draw(0).n_way == 5


def test_too_few_distinct_names(make_pool: MakePool):
    pool = make_pool([["a", "b", "c"], ["c", "b", "a"]])
    shape = EpisodeShape(n_way=4, n_shot=1, n_query=1)
    with pytest.raises(EpisodeError, match="4-way episodes need 4 classes, but there are 3"):
        sampler(pool, shape, adapter_share=0)


@pytest.mark.parametrize(("adapter_share", "message"), [(1.0, "at most 0 classes"), (0.0, "there are 0")])
def test_an_empty_pool(make_pool: MakePool, adapter_share: float, message: str):
    with pytest.raises(EpisodeError, match=message):
        sampler(make_pool([]), adapter_share=adapter_share)


def test_way_shot_and_queries_vary_between_the_smallest_and_the_largest(make_pool: MakePool):
    smallest, largest = EpisodeShape(n_way=2, n_shot=1, n_query=1), EpisodeShape(n_way=3, n_shot=2, n_query=4)
    drawing = sampler(make_pool(TWO_ADAPTERS), largest, smallest=smallest)
    found = set()
    for index in range(200):
        episode = drawing.draw(index)
        support, query = picks(episode)
        assert len(episode.query_labels) == query.size
        assert episode.teacher_logits is None or episode.teacher_logits.shape == (query.size, episode.n_way)
        found.add((episode.n_way, support.shape[1], query.shape[1]))
    assert found == {(way, shot, query) for way in (2, 3) for shot in (1, 2) for query in (1, 2, 3, 4)}
    assert same(drawing.draw(7), sampler(make_pool(TWO_ADAPTERS), largest, smallest=smallest).draw(7))


@pytest.mark.parametrize("wrong", [{"n_way": 1}, {"n_shot": 0}, {"n_query": 0}, {"n_ways": 5}])
def test_an_impossible_shape_is_refused(wrong: dict[str, int]):
    with pytest.raises(ValidationError):
        EpisodeShape(**wrong)


LABELS = np.random.default_rng(0).permutation(np.repeat([3, 7, 8, 20], 6))


def test_test_episodes_are_rows_of_one_class_each():
    episodes = draw_test_episodes(LABELS, SHAPE, num_episodes=50, seed=0)
    assert episodes.shape == (50, 3, 5)
    classes = LABELS[episodes]
    assert (classes == classes[:, :, :1]).all()
    assert all(len(set(row)) == 3 for row in classes[:, :, 0])
    assert all(len(np.unique(episode)) == 15 for episode in episodes)
    assert set(classes.ravel()) == {3, 7, 8, 20}
    assert set(episodes.ravel()) == set(range(24))


def test_test_episodes_are_the_same_for_a_seed():
    first = draw_test_episodes(LABELS, SHAPE, num_episodes=20, seed=5)
    assert np.array_equal(first, draw_test_episodes(LABELS, SHAPE, num_episodes=20, seed=5))
    assert np.array_equal(first[:7], draw_test_episodes(LABELS, SHAPE, num_episodes=7, seed=5))
    assert not np.array_equal(first, draw_test_episodes(LABELS, SHAPE, num_episodes=20, seed=6))
    assert len(np.unique(first.reshape(20, -1), axis=0)) == 20


def test_test_episodes_need_enough_classes():
    with pytest.raises(EpisodeError, match="5-way episodes: the data have 4 classes; lower n_way or give more"):
        draw_test_episodes(LABELS, EpisodeShape(n_way=5, n_shot=1, n_query=1), num_episodes=1, seed=0)


def test_test_episodes_need_enough_images_in_every_class():
    labels = np.append(LABELS, [9])
    with pytest.raises(EpisodeError, match="class nine has 1 images, but 2 shots and 3 queries need 5; lower n_query"):
        draw_test_episodes(labels, SHAPE, num_episodes=1, seed=0, class_names=["?"] * 9 + ["nine"])
    with pytest.raises(EpisodeError, match="class 9 has 1 images, but 2 shots and 3 queries need 5; lower n_query"):
        draw_test_episodes(labels, SHAPE, num_episodes=1, seed=0)
