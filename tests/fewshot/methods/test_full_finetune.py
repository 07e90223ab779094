from collections.abc import Callable

import torch

from lr_ray.fewshot.methods import Adaptation, FewShotTask, MethodInputs
from lr_ray.fewshot.methods.episode_tuning import trainable_copies
from lr_ray.fewshot.methods.linear_probe import linear_head
from lr_ray.vit.backbone import Backbone


def test_no_steps_are_the_linear_probe(
    inputs: MethodInputs, make_task: Callable[..., FewShotTask], adapt: Callable[..., Adaptation]
) -> None:
    task = make_task()
    features, of_queries = inputs.embed(task.support), inputs.embed(task.queries)
    expected = linear_head(1.0)(features[None], task.labels, of_queries[None])[0]
    for label in ("full-finetune:num_steps=0", "lora-linear:0"):
        scores = adapt(label, task).scores
        norms = of_queries.norm(dim=-1, keepdim=True) / features.norm(dim=-1).mean()
        bias = expected - expected / norms  # of scores whose weights alone are scaled by the length of the features
        torch.testing.assert_close(scores.argmax(1), expected.argmax(1))
        torch.testing.assert_close(scores, expected, atol=float(bias.abs().max()) + 1e-4, rtol=0.1)


def test_all_parameters_count(
    inputs: MethodInputs, make_task: Callable[..., FewShotTask], adapt: Callable[..., Adaptation]
) -> None:
    num_trained = adapt("full-finetune", make_task()).num_trained
    assert num_trained == sum(p.numel() for p in inputs.backbone.model.parameters()) + 3 * (24 + 1)


def test_copies_share_nothing(backbone: Backbone) -> None:
    model = backbone.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with trainable_copies(model) as copies:
        assert len(copies) == len(list(model.parameters())) == len(before)
        with torch.no_grad():
            for copy in copies:
                assert copy.requires_grad
                copy.add_(1.0)
        assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
