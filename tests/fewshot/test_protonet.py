import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lr_ray.fewshot.protonet import class_centres, prototype_logits

SUPPORT = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 3.0], [0.0, 5.0]])  # 2-way 2-shot
PROTOTYPES = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
QUERIES = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 4.0]])


def test_a_centre_is_the_mean_of_its_shots():
    assert torch.equal(class_centres(SUPPORT, n_way=2), PROTOTYPES)


def test_one_shot_is_its_own_centre():
    assert torch.equal(class_centres(SUPPORT, n_way=4), SUPPORT)


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        ("euclidean", [[-3.0, -4.0], [-4.0, -3.0], [-5.0, -6.0]]),
        ("squared", [[-9.0, -16.0], [-16.0, -9.0], [-25.0, -36.0]]),
        ("cosine", [[0.0, 0.0], [0.6, 0.8], [6 / 52**0.5, 4 / 52**0.5]]),
    ],
)
def test_logits(distance: str, expected: list[list[float]]):
    torch.testing.assert_close(prototype_logits(QUERIES, PROTOTYPES, distance=distance), torch.tensor(expected))
    scaled = prototype_logits(QUERIES, PROTOTYPES, distance=distance, scale=2.5)
    torch.testing.assert_close(scaled, 2.5 * torch.tensor(expected))


def test_the_distance_is_euclidean_by_default():
    assert torch.equal(prototype_logits(QUERIES, PROTOTYPES), prototype_logits(QUERIES, PROTOTYPES, distance="euclidean"))


def test_cosine_does_not_see_length():
    found = prototype_logits(7 * QUERIES, 0.1 * PROTOTYPES, distance="cosine")
    torch.testing.assert_close(found, prototype_logits(QUERIES, PROTOTYPES, distance="cosine"))


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
def test_batch_dimensions_are_apart(distance: str):
    generator = torch.Generator().manual_seed(0)
    support, queries = (torch.randn(2, 3, size, 7, generator=generator) for size in (10, 4))
    found = prototype_logits(queries, class_centres(support, n_way=5), distance=distance)
    assert found.shape == (2, 3, 4, 5)
    for first in range(2):
        for second in range(3):
            centres = torch.stack([support[first, second, 2 * c : 2 * c + 2].mean(dim=0) for c in range(5)])
            for query in range(4):
                for c in range(5):
                    torch.testing.assert_close(
                        found[first, second, query, c], score(queries[first, second, query], centres[c], distance)
                    )


def score(query: Tensor, centre: Tensor, distance: str) -> Tensor:
    if distance == "cosine":
        return F.cosine_similarity(query, centre, dim=0)
    squared = (query - centre).square().sum()
    return -squared if distance == "squared" else -squared.sqrt()


@pytest.mark.parametrize("distance", ["euclidean", "squared", "cosine"])
def test_a_query_on_its_prototype_has_a_finite_gradient(distance: str):
    queries = PROTOTYPES.clone().requires_grad_()
    logits = prototype_logits(queries, PROTOTYPES, distance=distance)
    assert logits.argmax(dim=1).tolist() == [0, 1]
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert torch.isfinite(queries.grad).all()
