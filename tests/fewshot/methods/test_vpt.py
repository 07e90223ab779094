from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lr_ray.fewshot.methods import Adaptation, FewShotTask
from lr_ray.fewshot.methods.vpt import VPTSettings, draw_prompts, encode_prompted
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.tokens import encode


@pytest.fixture
def images(backbone: Backbone) -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def prompts_of(backbone: Backbone, kind: str, num_prompts: int = 3) -> list[nn.Parameter]:
    settings = VPTSettings.model_validate({"kind": kind, "num_prompts": num_prompts})
    return draw_prompts(backbone.model, settings, [1])


def test_no_prompts_change_nothing(backbone: Backbone, images: Tensor) -> None:
    torch.testing.assert_close(encode_prompted(backbone.model, images, []), encode(backbone.model, images).features)


@pytest.mark.parametrize(("kind", "per_block"), [("shallow", [20, 20]), ("deep", [20, 20])])
def test_prompts_are_among_the_tokens(backbone: Backbone, images: Tensor, kind: str, per_block: list[int]) -> None:
    seen: list[int] = []
    for block in backbone.model.blocks:
        block.attn.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[1]))
    encode_prompted(backbone.model, images, prompts_of(backbone, kind))
    assert seen == per_block  # [CLS], 16 patches, 3 prompts: those of a block before do not pile up


def test_prompts_of_every_block_count(backbone: Backbone, images: Tensor) -> None:
    deep = prompts_of(backbone, "deep")
    encode_prompted(backbone.model, images, deep).square().sum().backward()
    assert len(deep) == len(backbone.model.blocks)
    assert all(prompt.grad is not None and prompt.grad.abs().max() > 0 for prompt in deep)
    first_alone = encode_prompted(backbone.model, images, deep[:1])
    assert not torch.allclose(encode_prompted(backbone.model, images, deep), first_alone)


def test_prompts_have_no_position(backbone: Backbone, images: Tensor) -> None:
    (prompt,) = prompts_of(backbone, "shallow")
    features = encode_prompted(backbone.model, images, [prompt])
    torch.testing.assert_close(encode_prompted(backbone.model, images, [nn.Parameter(prompt.flip(1))]), features)


def test_prompts_are_uniform(backbone: Backbone) -> None:
    (prompt,) = prompts_of(backbone, "shallow", 200)
    bound = (6 / (3 * 8 * 8 + 24)) ** 0.5
    assert prompt.abs().max() <= bound
    assert float(prompt.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize(("label", "num_trained"), [("vpt", 5 * 24), ("vpt:deep", 2 * 5 * 24)])
def test_num_trained(
    label: str, num_trained: int, make_task: Callable[..., FewShotTask], adapt: Callable[..., Adaptation]
) -> None:
    assert adapt(label, make_task()).num_trained == num_trained + 3 * (24 + 1)
