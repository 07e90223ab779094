from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lr_ray.errors import AdapterError
from lr_ray.fewshot.methods import MethodInputs, find_method
from lr_ray.fewshot.methods.features import LORAS_AVG, embedder
from lr_ray.fewshot.methods.lorahub import LorahubSettings, compose, left_out_loss, search
from lr_ray.fewshot.methods.stacked_loras import stack_loras
from lr_ray.vit.lora import Adapter, merged

CPU = torch.device("cpu")


def search_from(loss: Callable[[Tensor], float], size: int, **settings: float) -> Tensor:
    return search(loss, size, LorahubSettings(**settings), torch.Generator().manual_seed(0))  # type: ignore[arg-type]


def test_ranks_may_differ(make_adapter: Callable[..., Adapter]) -> None:
    adapters = [make_adapter(seed, rank=seed) for seed in (1, 2, 3)]
    stacks, count = stack_loras(adapters, CPU)
    weights = torch.tensor([0.5, -1.0, 2.0])
    assert count == 3
    for name, delta in compose(stacks, weights).items():
        expected = sum(w * adapter.updates()[name] for w, adapter in zip(weights, adapters, strict=True))
        torch.testing.assert_close(delta, expected)


def test_module_that_only_some_adapters_have(make_adapter: Callable[..., Adapter]) -> None:
    first, second = make_adapter(1), make_adapter(2)
    del second.modules["blocks.1.attn.qkv"]
    stacks, count = stack_loras([second, first], CPU)
    deltas = compose(stacks, torch.tensor([1.0, 3.0]))
    assert count == 2
    torch.testing.assert_close(deltas["blocks.1.attn.qkv.weight"], 3 * first.updates()["blocks.1.attn.qkv.weight"])


def test_cut_is_the_best_of_its_rank(make_adapter: Callable[..., Adapter]) -> None:
    stacks, _ = stack_loras([make_adapter(seed, rank=seed) for seed in (1, 2, 3)], CPU)
    weights = torch.ones(3)
    whole, cut = compose(stacks, weights), compose(stacks, weights, rank=2)
    for name in whole:
        singular = torch.linalg.svdvals(whole[name])
        assert torch.linalg.matrix_rank(cut[name], tol=1e-4) == 2
        torch.testing.assert_close((whole[name] - cut[name]).norm(), singular[2:].norm())


def test_one_adapter_of_weight_one_is_the_average(make_inputs: Callable[..., MethodInputs]) -> None:
    inputs = make_inputs(1)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stacks, _ = stack_loras(inputs.adapters(), CPU)
    with merged(inputs.backbone.model, compose(stacks, torch.ones(1))):
        features = inputs.embed(images)
    with embedder(inputs, LORAS_AVG) as embed:
        torch.testing.assert_close(features, embed(images))


def test_search_finds_a_minimum() -> None:
    wanted = torch.tensor([1.0, -0.5, 0.25])
    found = search_from(lambda weights: float((weights - wanted).square().sum()), 3, num_evaluations=400, l1=0)
    torch.testing.assert_close(found, wanted, atol=0.05, rtol=0)


def test_search_keeps_to_bound_and_budget() -> None:
    tried: list[Tensor] = []

    def loss(weights: Tensor) -> float:
        tried.append(weights)
        return float(-weights.sum())

    found = search_from(loss, 2, num_evaluations=40, l1=0, bound=0.7)
    assert len(tried) == 40
    assert tried[0].tolist() == [0, 0]
    assert all(weights.abs().max() <= 0.7 for weights in tried)
    torch.testing.assert_close(found, torch.full((2,), 0.7))


def test_l1_pulls_weights_to_zero() -> None:
    def loss(weights: Tensor) -> float:
        return float((weights - 1).square().mean())

    means = [float(search_from(loss, 3, num_evaluations=300, l1=l1).abs().mean()) for l1 in (0.0, 1.0, 10.0)]
    assert means == pytest.approx([1.0, 0.5, 0.0], abs=0.05)


def test_no_image_is_part_of_its_centre() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2, 1, 2, 1])
    support = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    losses = []
    for image, way in enumerate(labels):
        others = torch.arange(10) != image
        centres = torch.stack([support[others & (labels == c)].mean(dim=0) for c in range(3)])
        losses.append(F.cross_entropy(-(support[image] - centres).norm(dim=-1), way))
    found = left_out_loss(support, labels, torch.empty(0, 5))
    assert found == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


def test_one_shot_asks_other_views() -> None:
    support, labels = torch.eye(3), torch.arange(3)
    right, wrong = left_out_loss(support, labels, support), left_out_loss(support, labels, support.roll(1, dims=0))
    assert right < wrong


def test_views_stand_for_images_that_are_alone_in_their_way() -> None:
    generator = torch.Generator().manual_seed(0)
    support, views = torch.randn(4, 5, generator=generator), torch.randn(2, 5, generator=generator)
    labels = torch.tensor([2, 1, 0, 1])
    centres = torch.stack([support[2], support[[1, 3]].mean(dim=0), support[0]])
    losses = [
        F.cross_entropy(-(view - centres).norm(dim=-1), torch.tensor(way)) for view, way in zip(views, (2, 0), strict=True)
    ]
    for image, other in ((1, 3), (3, 1)):
        without = torch.stack([centres[0], support[other], centres[2]])
        losses.append(F.cross_entropy(-(support[image] - without).norm(dim=-1), torch.tensor(1)))
    assert left_out_loss(support, labels, views) == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)


def test_no_adapters(make_inputs: Callable[..., MethodInputs]) -> None:
    chosen = find_method("lorahub")
    with pytest.raises(AdapterError, match="no adapters"), chosen.method.adapt(make_inputs(0), chosen.settings):
        pass
