import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lr_ray.fewshot import metatrain
from lr_ray.fewshot.distill import TrainConfig
from lr_ray.fewshot.episodes import EpisodeShape, ImagePool, draw_test_episodes
from lr_ray.fewshot.evaluate import episode_accuracies
from lr_ray.fewshot.metatrain import MetaTrainer, Validation, kept_modules
from lr_ray.fewshot.relations import RelationTargets
from lr_ray.fewshot.stream import BatchMaker, ClassBuffer, ClassSchedule, distinct_names, episode_numbers
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import LoRAConfig, detach_lora, extract_lora
from lr_ray.vit.tokens import encode
from tests.fewshot.pools import classes_of, refs_of

MakeBackbone = Callable[[], Backbone]
MODULES = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
WIDTH = 24


def config(**changes: Any) -> TrainConfig:
    """Steps of 0.01 from the first on."""
    return TrainConfig(
        **{
            "episode": {"n_way": 3, "n_shot": 1, "n_query": 4},
            "schedule": {"highest": 0.01, "warmup_steps": 0, "cosine_steps": 100},
            "validation_episodes": 10,
            "precision": "fp32",
            **changes,
        }
    )


def maker(pool: ImagePool, settings: TrainConfig, *, seed: int = 3, relations: RelationTargets | None = None) -> BatchMaker:
    """Of batches from a pool that is all in memory."""
    refs, images = refs_of(pool), dict(zip(refs_of(pool), classes_of(pool), strict=True))
    schedule = ClassSchedule(refs, settings, seed=seed)
    buffer = ClassBuffer(schedule, lambda shelves: [[images[ref] for ref in shelf] for shelf in shelves])
    return BatchMaker(refs, buffer, settings, seed=seed, grid_size=(4, 4), relations=relations)


class Training(MetaTrainer):
    """That draws its own batches."""

    def __init__(
        self,
        backbone: Backbone,
        pool: ImagePool,
        settings: TrainConfig,
        *,
        seed: int,
        rank: int = 0,
        relations: RelationTargets | None = None,
        **arguments: Any,
    ) -> None:
        self._maker, self._rank = maker(pool, settings, seed=seed, relations=relations), rank
        num_classes = len(distinct_names(refs_of(pool)))
        super().__init__(backbone, settings, seed=seed, num_classes=num_classes, **arguments)

    def run_step(self) -> dict[str, float]:
        numbers = episode_numbers(self.step, self._config, rank=self._rank, world_size=self._world_size)
        return super().run_step([self._maker.draw(number) for number in numbers])


def trainer(backbone: Backbone, pool: ImagePool, settings: TrainConfig, **arguments: Any) -> Training:
    return Training(backbone, pool, settings, **{"seed": 3, **arguments})


def weights(of: MetaTrainer) -> dict[str, Tensor]:
    return {name: value for name, value in of.state()[0].items() if name.startswith("weights/")}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def validation(pool: ImagePool) -> Validation:
    return Validation(images=pool.images, labels=pool.class_of, shape=EpisodeShape(n_way=3, n_shot=1, n_query=5))


@pytest.mark.parametrize("adapter_share", [0.0, 1.0])
def test_the_loss_falls(backbone: Backbone, colour_pool: ImagePool, adapter_share: float):
    training = trainer(backbone, colour_pool, config(adapter_share=adapter_share))
    losses = [training.run_step()["loss"] for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


def relations_of(pool: ImagePool) -> RelationTargets:
    """Images of a class lie together, classes apart."""
    features = 10 * torch.eye(6)[torch.from_numpy(pool.class_of)]
    noise = torch.randn(len(pool.images), 6, generator=torch.Generator().manual_seed(0))
    return RelationTargets(images=pool.images, keep_indices=None, features=features + 0.1 * noise)


def test_relations_alone_teach_the_classes(backbone: Backbone, colour_pool: ImagePool):
    settings = config(relations={"share": 1.0, "batch_size": 24})
    training = trainer(backbone, colour_pool, settings, relations=relations_of(colour_pool), validation=validation(colour_pool))
    before = training.validate()
    losses = [training.run_step()["loss"] for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert training.validate() > before + 0.05


def test_metrics_of_a_step_are_in_the_history(backbone: Backbone, colour_pool: ImagePool):
    training = trainer(backbone, colour_pool, config())
    metrics = [training.run_step() for _ in range(3)]
    assert training.step == 3
    assert training.history == metrics
    assert [entry["step"] for entry in metrics] == [1, 2, 3]
    assert all(0 <= entry["accuracy"] <= 1 for entry in metrics)


def test_the_backbone_itself_is_not_trained(backbone: Backbone, make_backbone: MakeBackbone, colour_pool: ImagePool):
    training = trainer(backbone, colour_pool, config())
    for _ in range(3):
        training.run_step()
    detach_lora(backbone.model)
    expected = make_backbone().model.state_dict()
    found = backbone.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_learning_rate_follows_the_schedule(backbone: Backbone, colour_pool: ImagePool):
    """Adam moves a weight by at most the learning rate in its first step, and by just that if its gradient is not 0."""
    settings = config(schedule={"lowest": 1e-5, "highest": 1e-3, "warmup_steps": 10})
    training = trainer(backbone, colour_pool, settings)
    before = weights(training)
    training.run_step()
    assert largest_difference(before, weights(training)) == pytest.approx(1e-5, rel=0.05)
    training.run_step()
    assert training._optimizer.param_groups[0]["lr"] == pytest.approx(1e-5 + 0.1 * 9.9e-4)


def test_going_on_from_a_state_is_bitwise_the_same(make_backbone: MakeBackbone, colour_pool: ImagePool):
    settings = config(
        keep_ratio=0.5, episodes_per_step=2, augmentation={"flip": True, "blur": 0.5, "colour": 0.3}, validate_every=2
    )
    arguments = {"validation": validation(colour_pool)}
    whole = trainer(make_backbone(), colour_pool, settings, **arguments)
    for step in range(1, 7):
        whole.run_step()
        if step == 3:
            whole.validate()
            tensors, facts = whole.state()
            saved = {name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(facts))
    whole.validate()
    resumed = trainer(make_backbone(), colour_pool, settings, **arguments)
    resumed.load_state(*saved)
    assert resumed.step == 3
    for _ in range(3):
        resumed.run_step()
    resumed.validate()
    (found, found_facts), (expected, expected_facts) = resumed.state(), whole.state()
    assert found.keys() == expected.keys()
    assert {name.split("/")[0] for name in found} == {"weights", "best", "last", "optimizer"}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert found_facts == expected_facts
    assert found_facts["step"] == 6


def test_a_state_is_not_changed_by_what_comes_after(backbone: Backbone, colour_pool: ImagePool):
    training = trainer(backbone, colour_pool, config(), validation=validation(colour_pool))
    training.run_step()
    tensors, facts = training.state()
    copies, text = {name: value.clone() for name, value in tensors.items()}, json.dumps(facts)
    training.validate()
    training.run_step()
    training.validate()
    assert all(torch.equal(tensors[name], value) for name, value in copies.items())
    assert json.dumps(facts) == text


def test_a_state_before_the_first_step_can_be_loaded(make_backbone: MakeBackbone, colour_pool: ImagePool):
    fresh, other = (trainer(make_backbone(), colour_pool, config()) for _ in range(2))
    other.run_step()
    other.load_state(*fresh.state())
    for training in (fresh, other):
        training.run_step()
    assert largest_difference(weights(fresh), weights(other)) == 0


def test_two_workers_equal_one_with_all_episodes(make_backbone: MakeBackbone, colour_pool: ImagePool):
    settings = config(episodes_per_step=4, num_workers=2)
    alone = trainer(make_backbone(), colour_pool, settings)
    workers = [trainer(make_backbone(), colour_pool, settings, rank=rank, world_size=2) for rank in range(2)]
    start = weights(alone)
    apply = [worker._optimizer.step for worker in workers]
    for worker in workers:
        worker._optimizer.step = lambda: None  # the gradients have to meet first
    for _ in range(3):
        expected = alone.run_step()
        found = [worker.run_step() for worker in workers]
        for pair in zip(*(worker._parameters.values() for worker in workers), strict=True):
            mean = (pair[0].grad + pair[1].grad) / 2
            for parameter in pair:
                parameter.grad.copy_(mean)
        for step in apply:
            step()
        assert found[0]["loss"] != found[1]["loss"]
        for name in ("loss", "accuracy"):
            assert np.mean([metrics[name] for metrics in found]) == pytest.approx(expected[name], rel=1e-4)
    assert largest_difference(weights(workers[0]), weights(workers[1])) == 0
    assert largest_difference(weights(workers[0]), weights(alone)) < 1e-5
    assert largest_difference(start, weights(alone)) > 1e-2


def test_other_seeds_draw_other_episodes(make_backbone: MakeBackbone, colour_pool: ImagePool):
    losses = {trainer(make_backbone(), colour_pool, config(), seed=seed).run_step()["loss"] for seed in range(3)}
    assert len(losses) == 3


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_data_parallel_student_trains_the_same(make_backbone: MakeBackbone, colour_pool: ImagePool):
    settings = config(episodes_per_step=2, keep_ratio=0.5)
    bare = trainer(make_backbone(), colour_pool, settings)
    wrapped = trainer(make_backbone(), colour_pool, settings, wrap=DistributedDataParallel)
    for _ in range(3):
        assert wrapped.run_step() == bare.run_step()
    assert largest_difference(weights(bare), weights(wrapped)) == 0
    assert wrapped.state()[0].keys() == bare.state()[0].keys()


def test_the_best_weights_are_those_of_the_best_validation(
    make_backbone: MakeBackbone, colour_pool: ImagePool, monkeypatch: pytest.MonkeyPatch
):
    accuracies = iter([0.5, 0.9, 0.9, 0.7])
    monkeypatch.setattr("lr_ray.fewshot.metatrain.episode_accuracies", lambda *_: np.array([next(accuracies)] * 2))
    training = trainer(make_backbone(), colour_pool, config(), validation=validation(colour_pool))
    snapshots = []
    for _ in range(4):
        training.run_step()
        training.validate()
        snapshots.append((weights(training), extract_lora(training._backbone.model)))
    assert (training.best_step, training.best_accuracy) == (2, 0.9)
    assert [entry["validation_accuracy"] for entry in training.history] == [0.5, 0.9, 0.9, 0.7]
    tensors, facts = training.state()
    assert (facts["best_step"], facts["best_accuracy"]) == (2, 0.9)
    at_best, lora_at_best = snapshots[1]
    assert all(torch.equal(tensors[name.replace("weights/", "best/")], value) for name, value in at_best.items())

    other = make_backbone()
    before = dict(other.model.named_parameters())
    found = kept_modules(other, config().lora, tensors, which="best")
    assert list(found) == MODULES
    for name, low_rank in lora_at_best.items():
        assert torch.equal(found[name].a, low_rank.a)
        assert torch.equal(found[name].b, low_rank.b)
        assert found[name].scale == low_rank.scale
        assert found[name].b.abs().max() > 0
    after = dict(other.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert largest_difference(dict(make_backbone().model.named_parameters()), after) == 0


def test_the_average_follows_the_weights_and_takes_their_place(make_backbone: MakeBackbone, colour_pool: ImagePool):
    settings = config(ema=0.75)
    plain, training = (trainer(make_backbone(), colour_pool, each) for each in (config(), settings))
    expected = {name: value.clone() for name, value in training._snapshot().items()}
    for _ in range(4):
        plain.run_step()
        training.run_step()
        expected = {name: 0.75 * value + 0.25 * training._snapshot()[name] for name, value in expected.items()}
    training.validate()
    tensors, facts = training.state()
    assert largest_difference(weights(plain), weights(training)) == 0
    for name, value in expected.items():
        torch.testing.assert_close(tensors[f"best/{name}"], value)
        torch.testing.assert_close(tensors[f"last/{name}"], value)
    resumed = trainer(make_backbone(), colour_pool, settings)
    resumed.load_state(tensors, facts)
    for each in (training, resumed):
        each.run_step()
    assert all(torch.equal(value, resumed.state()[0][name]) for name, value in training.state()[0].items())


def test_the_average_is_what_is_validated(make_backbone: MakeBackbone, colour_pool: ImagePool):
    training = trainer(make_backbone(), colour_pool, config(ema=0.999), validation=validation(colour_pool))
    start = training.validate()
    for _ in range(60):
        training.run_step()
    assert training.validate() == pytest.approx(start, abs=0.05), "it has hardly moved"
    training._average = {}
    assert training.validate() > start + 0.1


def test_patience_ends_a_training_that_finds_nothing_better(
    backbone: Backbone, colour_pool: ImagePool, monkeypatch: pytest.MonkeyPatch
):
    accuracies = iter([0.5, 0.9, 0.9, 0.7, 0.8])
    monkeypatch.setattr("lr_ray.fewshot.metatrain.episode_accuracies", lambda *_: np.array([next(accuracies)] * 2))
    settings = config(patience=2, validate_every=3, num_steps=100)
    training = trainer(backbone, colour_pool, settings, validation=validation(colour_pool))
    while not training.finished:
        training.run_step()
        if training.step % 3 == 0:
            training.validate()
    assert (training.step, training.best_step) == (12, 6)


def test_without_validation_the_last_weights_are_the_best(backbone: Backbone, colour_pool: ImagePool):
    training = trainer(backbone, colour_pool, config())
    for step in (1, 2):
        training.run_step()
        assert training.validate() is None
        assert training.best_step == step
        tensors = training.state()[0]
        assert all(torch.equal(tensors[f"best/{name}"], tensors[f"weights/{name}"]) for name in training.best)
    assert all("validation_accuracy" not in entry for entry in training.history)


def test_validation_is_the_accuracy_of_whole_images_on_fixed_episodes(make_backbone: MakeBackbone, colour_pool: ImagePool):
    against = validation(colour_pool)
    training = trainer(make_backbone(), colour_pool, config(keep_ratio=0.25), validation=against)
    features = make_backbone().model((colour_pool.images.float() / 255 - 0.5) / 0.5)
    episodes = draw_test_episodes(colour_pool.class_of, against.shape, num_episodes=10, seed=3)
    expected = episode_accuracies(features, episodes, against.shape).mean()
    before = weights(training)
    assert training.validate() == pytest.approx(expected, abs=1e-6)
    assert training.validate() == pytest.approx(expected, abs=1e-6)
    assert largest_difference(before, weights(training)) == 0
    assert 1 / 3 < expected < 1


def truncated(delta: Tensor, rank: int) -> Tensor:
    """The rows of query and value, each at its best approximation; the key has no LoRA."""
    expected = torch.zeros_like(delta)
    for rows in (slice(0, WIDTH), slice(2 * WIDTH, 3 * WIDTH)):
        u, s, vh = np.linalg.svd(delta[rows].double().numpy())
        expected[rows] = torch.from_numpy((u[:, :rank] * s[:rank]) @ vh[:rank])
    return expected


def features_with(backbone: Backbone, deltas: dict[str, Tensor], images: Tensor) -> Tensor:
    changed = backbone.model.state_dict()
    changed = {name: value.clone() for name, value in changed.items()}
    for name, delta in deltas.items():
        changed[f"{name}.weight"] += delta
    backbone.model.load_state_dict(changed)
    return backbone.model((images.float() / 255 - 0.5) / 0.5)


@pytest.mark.parametrize("lora", [LoRAConfig(rank=3), LoRAConfig(rank=3, alpha=12.0)])
def test_the_student_starts_from_the_deltas_cut_to_its_rank(
    make_backbone: MakeBackbone, colour_pool: ImagePool, lora: LoRAConfig
):
    generator = torch.Generator().manual_seed(0)
    deltas = {name: 0.1 * torch.randn(3 * WIDTH, WIDTH, generator=generator) for name in MODULES}
    backbone = make_backbone()
    training = trainer(
        backbone, colour_pool, config(lora=lora), start_updates={f"{name}.weight": delta for name, delta in deltas.items()}
    )
    expected = {name: truncated(delta, rank=3) for name, delta in deltas.items()}
    for name, low_rank in extract_lora(backbone.model).items():
        torch.testing.assert_close(low_rank.delta(), expected[name], atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        found = encode(backbone.model, backbone.normalize(colour_pool.images[:4])).features
    merged = features_with(make_backbone(), expected, colour_pool.images[:4])
    torch.testing.assert_close(found, merged, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, features_with(make_backbone(), {}, colour_pool.images[:4]), atol=1e-2)
    training.run_step()  # and it trains from there
    assert all(parameter.grad.abs().max() > 0 for parameter in training._parameters.values())


def test_deltas_within_the_rank_are_met_exactly(make_backbone: MakeBackbone, colour_pool: ImagePool):
    generator = torch.Generator().manual_seed(0)
    delta = torch.zeros(3 * WIDTH, WIDTH)
    for rows in (slice(0, WIDTH), slice(2 * WIDTH, 3 * WIDTH)):
        delta[rows] = torch.randn(WIDTH, 2, generator=generator) @ torch.randn(2, WIDTH, generator=generator)
    backbone = make_backbone()
    trainer(backbone, colour_pool, config(lora=LoRAConfig(rank=4)), start_updates={f"{MODULES[1]}.weight": delta})
    found = extract_lora(backbone.model)
    torch.testing.assert_close(found[MODULES[1]].delta(), delta, atol=1e-5, rtol=1e-4)
    assert found[MODULES[0]].delta().abs().max() == 0


def test_a_fresh_student_is_the_backbone(make_backbone: MakeBackbone, colour_pool: ImagePool):
    backbone = make_backbone()
    trainer(backbone, colour_pool, config())
    with torch.no_grad():
        found = encode(backbone.model, backbone.normalize(colour_pool.images[:4])).features
    torch.testing.assert_close(found, features_with(make_backbone(), {}, colour_pool.images[:4]))


def test_recomputed_activations_train_the_same_for_less_memory(make_backbone: MakeBackbone, colour_pool: ImagePool):
    found: list[dict[str, Tensor]] = []
    kept: list[int] = []
    for recompute in (False, True):
        training = trainer(make_backbone(), colour_pool, config(recompute=recompute))
        sizes: list[int] = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nelement())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            training.run_step()
        found.append(weights(training))
        kept.append(sum(sizes))
    assert largest_difference(*found) < 1e-7
    assert kept[1] < 0.6 * kept[0]


def test_joint_supervision_learns_the_classes_and_throws_its_classifier_away(
    backbone: Backbone, colour_pool: ImagePool, make_backbone: MakeBackbone
):
    settings = config(objective="joint")
    training = trainer(backbone, colour_pool, settings, validation=validation(colour_pool))
    before = training.validate()
    metrics = [training.run_step() for _ in range(60)]
    assert np.mean([m["loss"] for m in metrics[-10:]]) < 0.7 * metrics[0]["loss"]
    assert metrics[0]["loss"] == pytest.approx(np.log(6), abs=1e-5), "six classes, and a classifier that starts from zero"
    assert training.validate() > before
    assert set(kept_modules(make_backbone(), settings.lora, training.state()[0], which="last")) == set(MODULES)


def test_joint_supervision_counts_classes_of_one_name_as_one(make_backbone: MakeBackbone, colour_pool: ImagePool):
    shared = replace(colour_pool, class_names=("a", "b", "c", "a", "b", "d"))
    training = trainer(make_backbone(), shared, config(objective="joint"))
    assert training.run_step()["loss"] == pytest.approx(np.log(4), abs=1e-5)


def test_joint_supervision_goes_on_where_it_stopped(make_backbone: MakeBackbone, colour_pool: ImagePool):
    whole, first = (trainer(make_backbone(), colour_pool, config(objective="joint")) for _ in range(2))
    for _ in range(6):
        whole.run_step()
    for _ in range(3):
        first.run_step()
    second = trainer(make_backbone(), colour_pool, config(objective="joint"))
    second.load_state(*first.state())
    for _ in range(3):
        second.run_step()
    assert largest_difference(weights(whole), weights(second)) == 0
    assert any("classifier" in name for name in weights(whole))


def test_adams_state_goes_to_where_its_parameter_is() -> None:
    """A checkpoint is read on the CPU."""
    saved = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    moved = metatrain._moved(saved, torch.device("meta"))
    assert {name: value.device.type for name, value in moved.items()} == {
        "step": "cpu",
        "exp_avg": "meta",
        "exp_avg_sq": "meta",
    }
    assert metatrain._moved(saved, torch.device("cpu"))["exp_avg"].data_ptr() != saved["exp_avg"].data_ptr()
