"""What every method that is tuned on each episode's support set must keep to."""

from collections.abc import Callable, Mapping
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from lr_ray.fewshot.methods import MethodInputs, find_method

LABELS = (
    "full-finetune",
    "full-finetune:sgd",
    "lora-linear",
    "lorahub",
    "mole",
    "vpt",
    "vpt:deep",
    "pmf",
)
WITH_HEAD = ("full-finetune:adam", "full-finetune:sgd", "lora-linear", "mole", "vpt", "vpt:deep")
MakeEpisode = Callable[..., tuple[Tensor, Tensor]]


Parts = tuple[Mapping[str, nn.Module], Mapping[str, nn.Parameter], Mapping[str, Tensor]]


def parts_of(model: nn.Module) -> Parts:
    """The very modules and parameters, and copies of all values."""
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return dict(model.named_modules()), dict(model.named_parameters()), values


def assert_same(model: nn.Module, before: Parts) -> None:
    modules, parameters, values = parts_of(model)
    assert modules.keys() == before[0].keys()
    assert all(modules[name] is module for name, module in before[0].items())
    assert all(parameters[name] is parameter for name, parameter in before[1].items())
    assert all(torch.equal(values[name], value) for name, value in before[2].items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in parameters.values())


@pytest.mark.parametrize("n_shot", [1, 3])
@pytest.mark.parametrize("label", LABELS)
def test_backbone_is_as_before(label: str, n_shot: int, inputs: MethodInputs, make_episode: MakeEpisode) -> None:
    chosen, model = find_method(label), inputs.backbone.model
    support, queries = make_episode(n_shot)
    at_start = parts_of(model)
    with chosen.method.adapt(inputs, chosen.settings) as adapt:
        inside = parts_of(model)
        scores = adapt(support, queries, 1).scores
        assert_same(model, inside)
    assert_same(model, at_start)
    assert scores.shape == (len(queries), len(support))
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


@pytest.mark.parametrize("label", LABELS)
def test_backbone_is_as_before_after_errors(label: str, inputs: MethodInputs, make_episode: MakeEpisode) -> None:
    chosen, model = find_method(label), inputs.backbone.model
    support, _ = make_episode()
    four_channels = torch.zeros(2, 4, 32, 32, dtype=torch.uint8)  # noticed after the tuning only
    at_start = parts_of(model)
    with suppress(InterruptedError), chosen.method.adapt(inputs, chosen.settings) as adapt:
        inside = parts_of(model)
        for images, queries in ((support[..., :24, :24], support[:, 0]), (support, four_channels)):
            with pytest.raises((AssertionError, RuntimeError)):
                adapt(images, queries, 1)
            assert_same(model, inside)
        raise InterruptedError
    assert_same(model, at_start)


@pytest.mark.parametrize("label", LABELS)
def test_seed_determines_scores(label: str, inputs: MethodInputs, make_episode: MakeEpisode) -> None:
    chosen = find_method(label)
    support, queries = make_episode(1)
    state = torch.get_rng_state()
    with chosen.method.adapt(inputs, chosen.settings) as adapt:
        first = adapt(support, queries, 1).scores
        adapt(support.flip(0), queries, 2)
        again = adapt(support, queries, 1).scores
    with chosen.method.adapt(inputs, chosen.settings) as adapt:
        assert torch.equal(adapt(support, queries, 1).scores, first)
    assert torch.equal(again, first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("label", ["lora-linear", "vpt", "pmf"])
def test_other_seed_other_scores(label: str, inputs: MethodInputs, make_episode: MakeEpisode) -> None:
    chosen = find_method(label)
    support, queries = make_episode(1)
    with chosen.method.adapt(inputs, chosen.settings) as adapt:
        assert not torch.equal(adapt(support, queries, 1).scores, adapt(support, queries, 2).scores)


@pytest.mark.parametrize("label", LABELS)
def test_separable_classes_are_told_apart(label: str, inputs: MethodInputs, make_episode: MakeEpisode) -> None:
    chosen = find_method(label)
    support, queries = make_episode()
    with chosen.method.adapt(inputs, chosen.settings) as adapt:
        found = adapt(support, queries, 1).scores.argmax(dim=1)
    assert (found == torch.arange(3).repeat_interleave(4)).float().mean() > 0.8


@pytest.mark.parametrize("label", WITH_HEAD)
def test_head_learns_from_zeros(label: str, inputs: MethodInputs, make_episode: MakeEpisode) -> None:
    base, _, first = label.partition(":")
    key = "kind" if base == "vpt" else "optimizer"
    chosen = find_method(f"{base}:head=zeros{f',{key}={first}' if first else ''}")
    support, _ = make_episode()
    with chosen.method.adapt(inputs, chosen.settings) as adapt:
        found = adapt(support, support.flatten(0, 1), 1).scores.argmax(dim=1)
    assert (found == torch.arange(3).repeat_interleave(2)).float().mean() > 0.6


@pytest.mark.parametrize("label", WITH_HEAD)
def test_more_than_the_head_is_trained(label: str, inputs: MethodInputs, make_episode: MakeEpisode) -> None:
    """Features of the queries move: a head alone keeps scores a linear function of the frozen features."""
    chosen = find_method(label)
    support, queries = make_episode()
    embedded: list[Tensor] = []
    with chosen.method.adapt(inputs, chosen.settings) as adapt:
        handle = inputs.backbone.model.norm.register_forward_hook(lambda *args: embedded.append(args[2][:, 0].detach()))
        adapt(support, queries, 1)
        handle.remove()
    first, last = embedded[0], embedded[-2]
    assert first.shape == last.shape == (6, 24)
    assert not torch.equal(first, last)
