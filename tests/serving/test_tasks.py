"""Closed forms: prototypes, leave-one-out distances and the threshold, all from sums; adding and removing is exact."""

import math

import pytest
import torch
from torch import Tensor

from lr_ray.errors import RequestError, StorageError
from lr_ray.fewshot.protonet import prototype_logits
from lr_ray.serving.tasks import Support, Task


def drawn(*shots: int, seed: int = 0, spread: float = 1.0) -> tuple[Tensor, list[str]]:
    """Features of classes `a`, `b`, … around centres of their own, and the labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(len(shots), 8, generator=generator)
    labels = [chr(ord("a") + way) for way, shot in enumerate(shots) for _ in range(shot)]
    ways = torch.tensor([ord(label) - ord("a") for label in labels])
    return centres[ways] + spread * torch.randn(len(labels), 8, generator=generator), labels


def means_of(features: Tensor, labels: list[str]) -> Tensor:
    return torch.stack([features[[other == name for other in labels]].mean(dim=0) for name in sorted(set(labels))])


def naive_threshold(features: Tensor, labels: list[str]) -> float:
    """By loops, as the docstring of `threshold` tells it."""
    exact, names = features.double(), sorted(set(labels))
    means = means_of(exact, labels)
    inside, outside = [], []
    for way, name in enumerate(names):
        members = [i for i, label in enumerate(labels) if label == name]
        for i in members if len(members) > 1 else []:
            others = exact[[j for j in members if j != i]].mean(dim=0)
            inside.append(float((exact[i] - others).square().sum()))
        nearest = min(
            (other for other in range(len(names)) if other != way), key=lambda k: float((means[k] - means[way]).norm())
        )
        outside.append(sum(float((exact[i] - means[nearest]).square().sum()) for i in members) / len(members))
    return math.sqrt(math.sqrt(sum(inside) / len(inside)) * math.sqrt(sum(outside) / len(outside)))


def test_prototypes_are_the_means_in_the_order_of_names():
    features = torch.tensor([[1.0, 2.0], [10.0, 0.0], [3.0, 6.0]])
    support = Support.of(features, ["pear", "apple", "pear"])
    assert support.class_names == ("apple", "pear")
    assert support.counts.tolist() == [1, 2]
    assert support.prototypes.tolist() == [[10.0, 0.0], [2.0, 4.0]]


def test_the_threshold_by_hand():
    """a: −1 and 1, b: 9 and 11. Left out, each is 2 away from the other; to the other class's centre 9 or 11."""
    support = Support.of(torch.tensor([[-1.0], [1.0], [9.0], [11.0]]), ["a", "a", "b", "b"])
    assert support.threshold == pytest.approx(math.sqrt(2 * math.sqrt((81 + 121) / 2)))


@pytest.mark.parametrize("shots", [(2, 2), (5, 5, 5), (1, 4), (3, 1, 7, 2), (1, 1, 1, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_threshold_is_that_of_the_loops(shots: tuple[int, ...], seed: int):
    features, labels = drawn(*shots, seed=seed)
    assert Support.of(features, labels).threshold == pytest.approx(naive_threshold(features, labels), rel=1e-9)


def test_no_threshold_at_one_shot():
    features, labels = drawn(1, 1, 1)
    support = Support.of(features, labels)
    assert support.threshold is None
    assert [found.rejected for found in support.classify(features)] == [None, None, None]


def test_no_threshold_of_the_same_image_twice():
    assert Support.of(torch.tensor([[1.0], [1.0], [5.0]]), ["a", "a", "b"]).threshold is None


def test_the_threshold_tells_known_classes_from_unknown():
    """Eight dimensions, classes 4·√16 apart on average: nearly all of both kinds fall on their side."""
    features, labels = drawn(*[30] * 10, spread=0.7)
    known = [label in "abcde" for label in labels]
    first = [i for i, label in enumerate(labels) if known[i] and i % 30 < 5]
    support = Support.of(features[first], [labels[i] for i in first])
    found = support.classify(features)
    own = [found[i].rejected for i in range(len(labels)) if known[i] and i not in first]
    other = [found[i].rejected for i in range(len(labels)) if not known[i]]
    assert sum(map(bool, own)) / len(own) < 0.02
    assert sum(map(bool, other)) / len(other) > 0.95


def test_probabilities_distances_and_order():
    features, labels = drawn(3, 2, 4)
    queries, _ = drawn(2, 2, 2, seed=9)
    support = Support.of(features, labels)
    logits = prototype_logits(queries, means_of(features, labels))
    for temperature in (1.0, 0.25):
        for row, found in zip(logits, support.classify(queries, temperature=temperature), strict=True):
            columns = [support.class_names.index(name) for name in found.ranked]
            assert columns == row.argsort(descending=True).tolist()
            torch.testing.assert_close(torch.tensor(found.distances), -row[columns])
            torch.testing.assert_close(torch.tensor(found.probabilities), (temperature * row).softmax(dim=0)[columns])
            assert found.rejected == (found.distances[0] > support.threshold)


@pytest.mark.parametrize("cut", [1, 3, 8])
def test_added_in_parts_is_the_same_as_at_once(cut: int):
    features, labels = drawn(3, 2, 4)
    whole = Support.of(features, labels)
    parts = Support.of(features[:cut], labels[:cut]).add(Support.of(features[cut:], labels[cut:]))
    assert parts.class_names == whole.class_names
    assert torch.equal(parts.counts, whole.counts)
    torch.testing.assert_close(parts.sums, whole.sums, rtol=1e-14, atol=1e-14)
    assert torch.equal(parts.prototypes, whole.prototypes)
    assert parts.threshold == pytest.approx(whole.threshold, rel=1e-12)


def test_a_class_added_and_removed_leaves_what_was_there():
    features, labels = drawn(3, 2, 4)
    before = Support.of(features[:5], labels[:5])
    after = before.add(Support.of(features[5:], labels[5:])).remove_class("c")
    assert after.class_names == before.class_names
    assert all(torch.equal(getattr(after, name), getattr(before, name)) for name in ("sums", "squares", "counts"))


def test_what_is_added_leaves_the_former():
    features, labels = drawn(2, 2)
    support = Support.of(features, labels)
    sums = support.sums.clone()
    support.add(support)
    assert torch.equal(support.sums, sums)


@pytest.mark.parametrize(("name", "status"), [("z", 404), ("a", 422)])
def test_a_class_that_cannot_be_removed(name: str, status: int):
    with pytest.raises(RequestError) as caught:
        Support.of(*drawn(1, 1)).remove_class(name)
    assert caught.value.status == status


def a_task() -> Task:
    names = {"a": "größe/☃", "b": "b"}
    features, labels = drawn(3, 2)
    support = Support.of(features, [names[label] for label in labels])
    return Task(task_id="0" * 30, owner="o", version=3, model="m", support=support)


def test_a_task_comes_back_from_its_bytes():
    task = a_task()
    back = Task.from_bytes(task.to_bytes(nonce="n"))
    assert (back.task_id, back.owner, back.version, back.model) == (task.task_id, task.owner, 3, "m")
    assert back.support.class_names == task.support.class_names
    assert all(torch.equal(getattr(back.support, name), getattr(task.support, name)) for name in ("sums", "squares", "counts"))
    assert task.to_bytes(nonce="n") != task.to_bytes(nonce="m")


@pytest.mark.parametrize("damage", [lambda c: c[:40], lambda c: c[:-1], lambda _: b"x", lambda _: b"{}" * 20])
def test_damaged_bytes_are_one_line(damage):
    with pytest.raises(StorageError, match="a stored task is damaged"):
        Task.from_bytes(damage(a_task().to_bytes(nonce="n")))
