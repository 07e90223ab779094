from collections.abc import Callable, Sequence

import pytest

from lr_ray.fewshot.methods import Adaptation, FewShotTask, episode_tuning, find_method
from lr_ray.fewshot.methods.episode_tuning import within_memory
from lr_ray.vit.backbone import Backbone


@pytest.mark.parametrize(("images_at_once", "sizes"), [(100, [5]), (17, [2, 2, 1]), (1, [1, 1, 1, 1, 1])])
def test_a_call_is_cut_to_memory(
    images_at_once: int,
    sizes: list[int],
    backbone: Backbone,
    make_task: Callable[..., FewShotTask],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(episode_tuning, "_FLOATS_AT_ONCE", images_at_once * 17 * 24 * 2)  # tokens, width, blocks
    found: list[int] = []

    def adapt(tasks: Sequence[FewShotTask], seeds: Sequence[int]) -> list[Adaptation]:
        found.append(len(tasks))
        return [Adaptation(scores=task.queries, num_trained=seed) for task, seed in zip(tasks, seeds, strict=True)]

    tasks = [make_task((1, 4, 2), seed=seed) for seed in range(5)]
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
