from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lr_ray.fewshot.methods import Adaptation, FewShotTask, MethodInputs
from lr_ray.fewshot.methods.linear_probe import logistic_regression
from lr_ray.vit.lora import LoRAConfig, attach_lora, detach_lora


def plain(inputs: MethodInputs, task: FewShotTask, seed: int) -> Tensor:
    """Scores of one task by an ordinary LoRA and an ordinary head, 5 steps of Adam from the linear probe."""
    model = inputs.backbone.model
    generator = torch.Generator().manual_seed(seed)
    loras = attach_lora(model, LoRAConfig(rank=4, alpha=4.0), generator=generator)
    features = inputs.embed(task.support).detach()
    weight, bias = logistic_regression(F.normalize(features, dim=1)[None], task.labels, c=1.0)
    head = torch.nn.Linear(24, 3)
    head.load_state_dict({"weight": weight[0] / features.norm(dim=1).mean(), "bias": bias[0]})
    weights = [weight for lora in loras for weight in (lora.lora_a, lora.lora_b)]
    optimizer = torch.optim.Adam([*head.parameters(), *weights], lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(head(inputs.embed(task.support)), task.labels).backward()
        optimizer.step()
    scores: Tensor = head(inputs.embed(task.queries)).detach()
    detach_lora(model)
    return scores


@pytest.mark.usefixtures("double_precision")
def test_it_is_a_lora_and_a_linear_head(
    inputs: MethodInputs, make_task: Callable[..., FewShotTask], adapt: Callable[..., Adaptation]
) -> None:
    for seed, n_shot in ((1, 1), (2, 3), (3, (1, 4, 2))):
        task = make_task(n_shot, seed=seed, noise=80)
        expected = plain(inputs, task, seed)
        torch.testing.assert_close(adapt("lora-linear", task, seed).scores, expected, atol=1e-7, rtol=0)
        untrained = adapt("lora-linear:num_steps=0", task, seed).scores
        assert (untrained - expected).abs().max() > 1e-2


def test_query_and_value_alone_count(make_task: Callable[..., FewShotTask], adapt: Callable[..., Adaptation]) -> None:
    assert adapt("lora-linear:rank=2", make_task()).num_trained == 2 * 2 * 2 * (24 + 24) + 3 * (24 + 1)
