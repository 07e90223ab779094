from collections.abc import Callable

import torch
from torch import Tensor

from lr_ray.fewshot.methods import Adaptation, FewShotTask, MethodInputs, find_method
from lr_ray.fewshot.methods.features import LORAS_AVG, embedder
from lr_ray.fewshot.methods.mole import balance_loss, gated
from lr_ray.fewshot.methods.stacked_loras import stack_loras

CPU = torch.device("cpu")


def images() -> Tensor:
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_uniform_gates_are_the_average(inputs: MethodInputs) -> None:
    with gated(inputs.backbone.model, *stack_loras(inputs.adapters(), CPU)) as logits:
        assert [tuple(of_module.shape) for of_module in logits] == [(1, 3), (1, 3)]
        mixed = inputs.embed(images()).detach()
    plain = inputs.embed(images())
    with embedder(inputs, LORAS_AVG) as embed:
        torch.testing.assert_close(mixed, embed(images()))
    assert not torch.allclose(mixed, plain, atol=1e-3)


def test_closed_gates_leave_one_adapter(make_inputs: Callable[..., MethodInputs]) -> None:
    inputs = make_inputs()
    with gated(inputs.backbone.model, *stack_loras(inputs.adapters(), CPU)) as logits:
        for of_module in logits:
            of_module.data[0, 0] = 100.0
        mixed = inputs.embed(images()).detach()
    with embedder(make_inputs(1), LORAS_AVG) as embed:
        torch.testing.assert_close(mixed, embed(images()))


def test_balance_is_least_when_all_are_used_alike() -> None:
    even = torch.zeros(2, 3, requires_grad=True)
    balance_loss(even).backward()
    assert even.grad is not None
    torch.testing.assert_close(even.grad, torch.zeros(2, 3))
    same_layers = torch.tensor([[2.0, 0, 0], [2.0, 0, 0]])
    other_layers = torch.tensor([[2.0, 0, 0], [0, 2.0, 0]])
    assert balance_loss(even) < balance_loss(other_layers) < balance_loss(same_layers)


def test_balance_holds_gates_together(inputs: MethodInputs, make_task: Callable[..., FewShotTask]) -> None:
    chosen = {balance: find_method(f"mole:balance={balance},num_steps=30,head=zeros") for balance in (0, 100)}
    task = make_task()
    spread = {}
    for balance, method in chosen.items():
        seen: list[Tensor] = []

        def watch(module: torch.nn.Module, _inputs: object, seen: list[Tensor] = seen) -> None:
            seen.extend(layer.logits[0].softmax(0).detach() for layer in module.modules() if hasattr(layer, "logits"))

        with method.method.adapt(inputs, method.settings) as adapt:
            handle = inputs.backbone.model.blocks[0].norm1.register_forward_pre_hook(
                lambda *_args, watch=watch: watch(inputs.backbone.model, None)
            )
            adapt([task], [1])
            handle.remove()
        spread[balance] = float((torch.stack(seen[-2:]).mean(dim=0) - 1 / 3).abs().max())
    assert spread[100] < 0.5 * spread[0]


def test_num_trained(make_task: Callable[..., FewShotTask], adapt: Callable[..., Adaptation]) -> None:
    assert adapt("mole", make_task()).num_trained == 2 * 3 + 3 * (24 + 1)
