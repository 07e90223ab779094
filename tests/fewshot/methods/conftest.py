"""What the methods draw on, and an episode of classes that are colours."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from lr_ray.fewshot.methods import Adaptation, FewShotTask, MethodInputs, TunedMethod, find_method
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import Adapter


@pytest.fixture
def make_inputs(backbone: Backbone, make_adapter: Callable[..., Adapter]) -> Callable[..., MethodInputs]:
    """Of that many adapters, of ranks 1, 2, 3, 1, ..., and an oracle."""

    def make(num_adapters: int = 3) -> MethodInputs:
        def nothing() -> Adapter:
            raise AssertionError("not to be asked for")

        return MethodInputs(
            backbone=backbone,
            precision="fp32",
            adapters=lambda: (make_adapter(seed, rank=1 + seed % 3) for seed in range(num_adapters)),
            meta_lora=nothing,
            joint=nothing,
            oracle=lambda: make_adapter(9),
        )

    return make


@pytest.fixture
def inputs(make_inputs: Callable[..., MethodInputs]) -> MethodInputs:
    return make_inputs()


@pytest.fixture
def double_precision(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All is float64: Adam turns the rounding errors of a gradient that is zero, as a head's bias has from the probe on,
    into steps of the learning rate."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    backbone.model.double()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def make_task() -> Callable[..., FewShotTask]:
    """Three colours under noise at 32 px, way by way: so many shots of each, or one number of each way; 4 queries a way."""

    def make(n_shot: int | Sequence[int] = 2, *, seed: int = 3, noise: float = 20) -> FewShotTask:
        shots = [n_shot] * 3 if isinstance(n_shot, int) else n_shot
        labels = torch.arange(3).repeat_interleave(torch.tensor(shots))
        colours = torch.tensor([[200.0, 40, 40], [40, 200, 40], [40, 40, 200]])[..., None, None]
        generator = torch.Generator().manual_seed(seed)

        def draw(ways: Tensor) -> Tensor:
            drawn = colours[ways] + noise * torch.randn(len(ways), 3, 32, 32, generator=generator)
            return drawn.clamp(0, 255).to(torch.uint8)

        return FewShotTask(support=draw(labels), labels=labels, queries=draw(torch.arange(3).repeat_interleave(4)))

    return make


@pytest.fixture
def adapt(inputs: MethodInputs) -> Callable[..., Adaptation]:
    """A method, by its label, on one task."""

    def adapt(label: str, task: FewShotTask, seed: int = 1) -> Adaptation:
        chosen = find_method(label)
        assert isinstance(chosen.method, TunedMethod)
        with chosen.method.adapt(inputs, chosen.settings) as adapt:
            (found,) = adapt([task], [seed])
        return found

    return adapt
