from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from lr_ray.fewshot.methods import Adaptation, FewShotTask, MethodInputs
from lr_ray.fewshot.methods.features import ORACLE, embedder


def test_no_steps_are_the_oracle(
    inputs: MethodInputs, make_task: Callable[..., FewShotTask], adapt: Callable[..., Adaptation]
) -> None:
    task = make_task()
    with embedder(inputs, ORACLE) as embed:
        centres = embed(task.support).unflatten(0, (3, 2)).mean(dim=1)
        expected = 10 * F.cosine_similarity(embed(task.queries)[:, None], centres[None], dim=-1)
    torch.testing.assert_close(adapt("pmf:0", task).scores, expected, atol=1e-4, rtol=1e-4)


def test_steps_make_the_support_set_clearer(make_task: Callable[..., FewShotTask], adapt: Callable[..., Adaptation]) -> None:
    task = make_task()
    task = replace(task, queries=task.support)
    losses = [float(F.cross_entropy(adapt(label, task).scores, task.labels)) for label in ("pmf:0", "pmf:20")]
    assert losses[1] < losses[0]
