from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lr_ray.fewshot.methods import MethodInputs, find_method
from lr_ray.fewshot.methods.features import ORACLE, embedder


def test_no_steps_are_the_oracle(inputs: MethodInputs, make_episode: Callable[..., tuple[Tensor, Tensor]]) -> None:
    support, queries = make_episode()
    with embedder(inputs, ORACLE) as embed:
        centres = embed(support.flatten(0, 1)).unflatten(0, (3, 2)).mean(dim=1)
        expected = 10 * F.cosine_similarity(embed(queries)[:, None], centres[None], dim=-1)
    chosen = find_method("pmf:0")
    with chosen.method.adapt(inputs, chosen.settings) as adapt:
        torch.testing.assert_close(adapt(support, queries, 1).scores, expected, atol=1e-4, rtol=1e-4)


def test_steps_make_the_support_set_clearer(inputs: MethodInputs, make_episode: Callable[..., tuple[Tensor, Tensor]]) -> None:
    support, _ = make_episode()
    labels = torch.arange(3).repeat_interleave(2)
    losses = []
    for label in ("pmf:0", "pmf:20"):
        chosen = find_method(label)
        with chosen.method.adapt(inputs, chosen.settings) as adapt:
            losses.append(float(F.cross_entropy(adapt(support, support.flatten(0, 1), 1).scores, labels)))
    assert losses[1] < losses[0]
