"""What every method that is tuned on each episode's support set must keep to."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lr_ray.fewshot.methods import Adaptation, FewShotTask, MethodInputs, find_method

TOGETHER = ("lora-linear", "mole", "vpt", "vpt:deep")
LABELS = ("full-finetune", "full-finetune:sgd", "lorahub", "pmf", *TOGETHER)
WITH_HEAD = ("full-finetune:adam", "full-finetune:sgd", *TOGETHER)
MakeTask = Callable[..., FewShotTask]
AdaptOne = Callable[..., Adaptation]


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


@pytest.mark.parametrize("n_shot", [1, 3, (1, 4, 2)])
@pytest.mark.parametrize("label", LABELS)
def test_backbone_is_as_before(label: str, n_shot: int | tuple[int], inputs: MethodInputs, make_task: MakeTask) -> None:
    chosen, model = find_method(label), inputs.backbone.model
    tasks = [make_task(n_shot, seed=seed) for seed in (1, 2)]
    at_start = parts_of(model)
    with chosen.method.adapt(inputs, chosen.settings) as adapt:
        inside = parts_of(model)
        found = adapt(tasks, [1, 2])
        assert_same(model, inside)
    assert_same(model, at_start)
    for adaptation in found:
        assert adaptation.scores.shape == (12, 3)
        assert adaptation.scores.dtype == torch.float32
        assert not adaptation.scores.requires_grad


@pytest.mark.parametrize("label", LABELS)
def test_backbone_is_as_before_after_errors(label: str, inputs: MethodInputs, make_task: MakeTask) -> None:
    chosen, model = find_method(label), inputs.backbone.model
    task = make_task()
    four_channels = torch.zeros(2, 4, 32, 32, dtype=torch.uint8)  # noticed after the tuning only
    at_start = parts_of(model)
    with suppress(InterruptedError), chosen.method.adapt(inputs, chosen.settings) as adapt:
        inside = parts_of(model)
        for wrong in (replace(task, support=task.support[..., :24, :24]), replace(task, queries=four_channels)):
            with pytest.raises((AssertionError, RuntimeError)):
                adapt([wrong], [1])
            assert_same(model, inside)
        raise InterruptedError
    assert_same(model, at_start)


@pytest.mark.parametrize("label", LABELS)
def test_seed_determines_scores(label: str, inputs: MethodInputs, make_task: MakeTask, adapt: AdaptOne) -> None:
    chosen = find_method(label)
    task, other = make_task(1), make_task(1, seed=4)
    state = torch.get_rng_state()
    with chosen.method.adapt(inputs, chosen.settings) as adapt_all:
        (first,) = adapt_all([task], [1])
        adapt_all([other], [2])
        (again,) = adapt_all([task], [1])
    assert torch.equal(again.scores, first.scores)
    assert torch.equal(adapt(label, task, 1).scores, first.scores)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("label", ["lora-linear", "vpt", "pmf"])
def test_other_seed_other_scores(label: str, make_task: MakeTask, adapt: AdaptOne) -> None:
    task = make_task(1)
    assert not torch.equal(adapt(label, task, 1).scores, adapt(label, task, 2).scores)


@pytest.mark.parametrize("n_shot", [1, 3, (1, 4, 2)])
@pytest.mark.parametrize("label", LABELS)
@pytest.mark.usefixtures("double_precision")
def test_episodes_have_no_part_in_each_other(
    label: str, n_shot: int | tuple[int], inputs: MethodInputs, make_task: MakeTask, adapt: AdaptOne
) -> None:
    tasks = [make_task(n_shot, seed=seed, noise=80 + 40 * seed) for seed in range(4)]
    chosen = find_method(label)
    with chosen.method.adapt(inputs, chosen.settings) as adapt_all:
        together = adapt_all(tasks, range(4))
    for seed, (task, found) in enumerate(zip(tasks, together, strict=True)):
        alone = adapt(label, task, seed)
        torch.testing.assert_close(found.scores, alone.scores, atol=1e-7, rtol=0)
        assert torch.equal(found.scores.argmax(dim=1), alone.scores.argmax(dim=1))
        assert found.num_trained == alone.num_trained
    assert (together[0].scores - together[1].scores).abs().max() > 1e-2


@pytest.mark.parametrize("label", LABELS)
def test_order_of_the_support_set_is_of_no_account(label: str, make_task: MakeTask, adapt: AdaptOne) -> None:
    task = make_task((2, 4, 2), noise=80)
    order = torch.tensor([7, 2, 0, 5, 3, 1, 6, 4])
    shuffled = replace(task, support=task.support[order], labels=task.labels[order])
    if label == "pmf":  # which draws a view of each image in turn
        label = "pmf:0"
    torch.testing.assert_close(adapt(label, shuffled).scores, adapt(label, task).scores, atol=1e-3, rtol=0)


@pytest.mark.parametrize("label", LABELS)
def test_separable_classes_are_told_apart(label: str, make_task: MakeTask, adapt: AdaptOne) -> None:
    found = adapt(label, make_task()).scores.argmax(dim=1)
    assert (found == torch.arange(3).repeat_interleave(4)).float().mean() > 0.8


@pytest.mark.parametrize("label", WITH_HEAD)
def test_head_learns_from_zeros(label: str, make_task: MakeTask, adapt: AdaptOne) -> None:
    base, _, first = label.partition(":")
    key = "kind" if base == "vpt" else "optimizer"
    task = make_task()
    from_zeros = f"{base}:head=zeros{f',{key}={first}' if first else ''}"
    found = adapt(from_zeros, replace(task, queries=task.support)).scores.argmax(dim=1)
    assert (found == task.labels).float().mean() > 0.6


@pytest.mark.parametrize("label", WITH_HEAD)
def test_more_than_the_head_is_trained(label: str, inputs: MethodInputs, make_task: MakeTask, adapt: AdaptOne) -> None:
    """Features of the queries move: a head alone keeps scores a linear function of the frozen features."""
    embedded: list[Tensor] = []
    handle = inputs.backbone.model.norm.register_forward_hook(lambda *args: embedded.append(args[2][:, 0].detach()))
    adapt(label, make_task())
    handle.remove()
    first, last = embedded[0], embedded[-2]
    assert first.shape == last.shape == (6, 24)
    assert not torch.equal(first, last)
