from collections.abc import Callable, Sequence

import pytest

from lr_ray.fewshot.methods import Adaptation, FewShotTask, episode_tuning, find_method
from lr_ray.fewshot.methods.episode_tuning import within_memory
from lr_ray.vit.backbone import Backbone


@pytest.mark.parametrize("counted", ["support", "queries"])
@pytest.mark.parametrize(("tasks_at_once", "sizes"), [(14.0, [5]), (2.5, [2, 2, 1]), (0.1, [1, 1, 1, 1, 1])])
def test_a_call_is_cut_to_memory(
    tasks_at_once: float,
    sizes: list[int],
    counted: str,
    backbone: Backbone,
    make_task: Callable[..., FewShotTask],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = [make_task((1, 4, 2), seed=seed) for seed in range(5)]
    blocks = {"support": 2, "queries": 100}  # of the backbone; of a query
    monkeypatch.setattr(episode_tuning, "_BLOCKS_OF_A_QUERY", 0 if counted == "support" else blocks["queries"])
    of_a_task = len(getattr(tasks[0], counted)) * 17 * 24 * blocks[counted]  # tokens, width
    monkeypatch.setattr(episode_tuning, "_FLOATS_AT_ONCE", int(tasks_at_once * of_a_task))
    found: list[int] = []

    def adapt(tasks: Sequence[FewShotTask], seeds: Sequence[int]) -> list[Adaptation]:
        found.append(len(tasks))
        return [Adaptation(scores=task.queries, num_trained=seed) for task, seed in zip(tasks, seeds, strict=True)]

    adaptations = within_memory(backbone, adapt)(tasks, range(5))
    assert found == sizes
    assert [adaptation.num_trained for adaptation in adaptations] == [0, 1, 2, 3, 4]
    assert all(adaptation.scores is task.queries for adaptation, task in zip(adaptations, tasks, strict=True))


def test_methods_that_change_all_weights_do_one_at_a_time() -> None:
    at_once = {}
    for label in ("full-finetune", "lorahub", "pmf", "lora-linear", "mole", "vpt:deep"):
        chosen = find_method(label)
        at_once[label] = chosen.method.at_once(chosen.settings)
    assert [size > 1 for size in at_once.values()] == [False, False, False, True, True, True]
