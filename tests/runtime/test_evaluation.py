"""`lr-ray eval`: what is measured is kept, what is missing is done, and a stranger can check it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

import lr_ray
from lr_ray.config import ExperimentConfig
from lr_ray.data.load import load_data
from lr_ray.errors import AdapterError, ClusterError, ConfigError, EpisodeError, StorageError
from lr_ray.fewshot.episodes import EpisodeShape, draw_test_episodes
from lr_ray.fewshot.evaluate import episode_accuracies
from lr_ray.fewshot.methods import (
    Adapt,
    Adaptation,
    FewShotTask,
    MethodInputs,
    NoSettings,
    TunedMethod,
    known_methods,
)
from lr_ray.fewshot.metric import Metric, MetricConfig, fit_metric
from lr_ray.fewshot.protocol import VaryingShape
from lr_ray.model import Model
from lr_ray.runtime import evaluation
from lr_ray.runtime.evaluation import evaluate_methods, predict_episodes
from lr_ray.runtime.evaluation_plan import EvaluationPlan
from lr_ray.runtime.experiment import run_experiment
from lr_ray.runtime.inversion import invert_library
from lr_ray.runtime.training import train_meta_lora
from lr_ray.storage.measurements import read_tensors
from lr_ray.storage.metric import write_metric
from lr_ray.storage.synthetic import list_synthetic, read_pool
from lr_ray.vit.backbone import load_backbone
from lr_ray.vit.tokens import encode_pixels
from tests.jobs import QUIET, changed, snapshot

pytestmark = pytest.mark.usefixtures("ray_cluster")

CAML = "caml:num_steps=2,width=8,num_layers=1,n_way=3"


def measure(config: ExperimentConfig, *methods: str, **evaluation: object) -> list[dict[str, Any]]:
    return evaluate_methods(changed(config, evaluation={"methods": methods, **evaluation}), QUIET)


def parts(files: Mapping[str, Any]) -> set[str]:
    """What the files of an evaluation are of: their names up to the shape or the digest."""
    return {re.split(r"-3-way|-[0-9a-f]{12}", Path(name).name)[0] for name in files}


def test_methods_that_are_added_use_what_is_there(tiny_experiment: ExperimentConfig) -> None:
    root = f"{tiny_experiment.output_root}/evaluation"
    first = measure(tiny_experiment, "nn", "raw-pixels")
    before = snapshot(root)
    assert parts(before) == {"nn", "raw-pixels", "features-backbone", "episodes"}

    rows = measure(tiny_experiment, "bpa", "nn", CAML)

    after = snapshot(root)
    assert [row["method"] for row in rows] == ["bpa", "nn", CAML]
    assert rows[1] == first[0]
    assert before == {name: after[name] for name in before}
    stored = json.loads(Path(tiny_experiment.output_root, "results.json").read_text())
    assert [row["method"] for row in stored] == ["raw-pixels", "bpa", "nn", CAML]


def test_rows_of_a_command_that_ended_meanwhile_stay(
    tiny_experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = evaluation.rows_of

    def rows_of(plan: EvaluationPlan) -> list[dict[str, Any]]:
        monkeypatch.undo()
        measure(tiny_experiment, "raw-pixels")
        return real(plan)

    monkeypatch.setattr(evaluation, "rows_of", rows_of)
    measure(tiny_experiment, "nn")
    stored = json.loads(Path(tiny_experiment.output_root, "results.json").read_text())
    assert [row["method"] for row in stored] == ["raw-pixels", "nn"]


def test_predictions_that_are_lost_are_made_again_and_are_the_same(tiny_experiment: ExperimentConfig) -> None:
    rows = measure(tiny_experiment, "linear-probe", CAML)
    lost = [path for path in Path(tiny_experiment.output_root, "evaluation").iterdir() if "features" not in path.name]
    predicted = {
        path: pq.read_table(path)["predicted"].to_pylist() for path in lost if parts({str(path): 0}) & {"linear-probe"}
    }
    for path in lost:
        path.unlink()

    again = measure(tiny_experiment, "linear-probe", CAML)

    accuracies = ("method", "accuracy", "ci95", "macro_accuracy", "per_class", "digest")
    assert [{key: row[key] for key in accuracies} for row in again] == [{key: row[key] for key in accuracies} for row in rows]
    assert {path: pq.read_table(path)["predicted"].to_pylist() for path in predicted} == predicted


def test_heads_on_features_that_are_there_need_no_gpu(library: ExperimentConfig) -> None:
    (row,) = measure(library, "nn")
    root = Path(library.output_root, "evaluation")
    for path in [path for path in root.iterdir() if "features" not in path.name]:
        path.unlink()
    with_gpus = library.ray.model_copy(update={"num_gpus_per_actor": 1.0})

    (again,) = measure(library.model_copy(update={"ray": with_gpus}), "nn")

    assert again["accuracy"] == row["accuracy"]
    features = next(path for path in root.iterdir() if "features" in path.name)
    assert again["peak_memory_mib"] == pytest.approx(read_tensors(str(features))[1]["peak_memory_mib"], abs=1)
    with pytest.raises(ClusterError, match=r"ray.num_gpus_per_actor 1: this machine has 0 GPU"):
        measure(library.model_copy(update={"ray": with_gpus}), "loras-avg")


def test_a_method_that_trains_on_episodes_goes_on_where_it_was_lost(tiny_experiment: ExperimentConfig) -> None:
    """It meets the first of the episodes, a few in each piece of work."""
    label = "vpt:num_steps=1,num_prompts=2"
    (row,) = measure(tiny_experiment, label, tuned_episodes=7)
    root = Path(tiny_experiment.output_root, "evaluation")
    first, second = sorted(root.glob("vpt-*.parquet"))
    assert first.name.endswith("-00000-00005.parquet")
    assert second.name.endswith("-00005-00007.parquet")
    assert (row["episodes"], row["images_per_s"], row["trained_parameters"]) == (7, None, 2 * 192 + 3 * 193)
    assert row["gflops_per_episode"] > 1.5
    before, lost = snapshot(str(root)), pq.read_table(second)["predicted"].to_pylist()
    second.unlink()

    (again,) = measure(tiny_experiment, label, tuned_episodes=7)

    assert again["accuracy"] == row["accuracy"]
    assert pq.read_table(second)["predicted"].to_pylist() == lost
    assert snapshot(str(root))[str(first)] == before[str(first)]


def test_episodes_that_share_a_call(tiny_experiment: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[int]] = []

    @contextmanager
    def adapting(_inputs: MethodInputs, _settings: NoSettings) -> Iterator[Adapt]:
        def adapt(tasks: Sequence[FewShotTask], seeds: Sequence[int]) -> list[Adaptation]:
            calls.append(list(seeds))
            ways = [torch.full((len(task.queries),), seed % 3) for task, seed in zip(tasks, seeds, strict=True)]
            return [Adaptation(scores=F.one_hot(of_task, 3), num_trained=7) for of_task in ways]

        yield adapt

    mine = TunedMethod(name="mine", source="tests", adapt=adapting, at_once=lambda _settings: 2)
    monkeypatch.setitem(known_methods(), "mine", mine)
    config = changed(tiny_experiment, evaluation={"methods": ("mine",), "tuned_episodes": 8})
    first, second = EvaluationPlan(config).measurements[0].tasks
    (on_a_gpu,) = EvaluationPlan(changed(config, ray={"num_gpus_per_actor": 1})).measurements[0].tasks
    assert (on_a_gpu.start, on_a_gpu.stop) == (0, 8), "a process of its own is worth more episodes"

    predict_episodes(first)
    predict_episodes(second)

    seeds = range(config.seed * 1_000_003, config.seed * 1_000_003 + 8)
    counted = [0]  # of the first piece, for its FLOPs
    assert calls == [list(seeds[0:2]), list(seeds[2:4]), [seeds[4]], counted, list(seeds[5:7]), [seeds[7]]]
    found = [ways for task in (first, second) for ways in pq.read_table(task.uri)["predicted"].to_pylist()]
    assert [set(ways) for ways in found] == [{seed % 3} for seed in seeds]


def test_a_row_tells_what_it_cost(tiny_experiment: ExperimentConfig) -> None:
    nn, probe = measure(tiny_experiment, "nn", "linear-probe")
    assert (nn["trained_parameters"], probe["trained_parameters"]) == (0, 3 * 193)
    assert 0.5 < nn["gflops_per_episode"] < 2  # 18 images of 5 tokens through a ViT-Tiny of 5.4 million weights
    assert nn["images_per_s"] == probe["images_per_s"] > 0
    assert 18_000 / nn["images_per_s"] < nn["episode_ms"] < probe["episode_ms"]
    assert 200 < nn["peak_memory_mib"] < 20_000
    assert nn["difference"] is None


def test_a_method_that_is_measured_alone_is_compared_with_what_was(tiny_experiment: ExperimentConfig, meta_lora: str) -> None:
    nn, recycle = measure(tiny_experiment, "nn", "recycle")
    assert nn["difference"] == pytest.approx(nn["accuracy"] - recycle["accuracy"], abs=0.011)
    assert nn["compared_with"] == recycle["digest"]
    assert measure(tiny_experiment, "nn") == [nn]

    Path(meta_lora, "adapter_model.safetensors").write_bytes(b"")
    before = snapshot(tiny_experiment.output_root)
    with pytest.raises(AdapterError, match="run/meta_lora: damaged"):
        measure(tiny_experiment, "nn", "bpa")
    assert snapshot(tiny_experiment.output_root) == before


def test_a_model_card_keeps_what_was_measured_before(
    tiny_experiment: ExperimentConfig, meta_lora: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[set[tuple[str, int]]] = []

    def keep(folder: str, rows: Sequence[dict[str, Any]]) -> None:
        assert folder == meta_lora
        told.append({(row["method"], row["n_way"]) for row in rows})

    monkeypatch.setattr(evaluation, "complete_card", keep)
    measure(tiny_experiment, "nn", "recycle")
    measure(tiny_experiment, "recycle")
    with pytest.raises(EpisodeError, match="its episodes have 7 ways"):  # found while it is fitted
        measure(tiny_experiment, "recycle", "caml:num_steps=1,n_way=7", shapes=(EpisodeShape(n_way=2, n_shot=2, n_query=3),))
    first = {("nn", 3), ("recycle", 3)}
    assert told == [first, first, {*first, ("recycle", 2)}]


def accuracy_of(model: Model, config: ExperimentConfig) -> float:
    """Of nearest class centre on what the model makes of the test images, in per cent."""
    assert config.data.test is not None
    data, (shape,) = load_data(config.data.test), config.evaluation.shapes
    assert isinstance(shape, EpisodeShape)
    episodes = draw_test_episodes(data.labels, shape, num_episodes=config.evaluation.episodes, seed=config.seed)
    features = model.embed(data.pixels(range(len(data)), model.backbone.image_px))
    return round(100 * float(episode_accuracies(features, episodes, shape).mean()), 2)


def test_recycling_is_measured_in_the_metric_that_came_with_it(tiny_experiment: ExperimentConfig, meta_lora: str) -> None:
    recycle, plain = measure(tiny_experiment, "recycle", "recycle:metric=false")
    model = lr_ray.load(meta_lora)
    assert model.metric is not None
    assert recycle["accuracy"] == accuracy_of(model, tiny_experiment)
    assert plain["accuracy"] == accuracy_of(replace(model, metric=None), tiny_experiment) != recycle["accuracy"]
    assert recycle["digest"] != plain["digest"]

    write_metric(meta_lora, replace(model.metric, mean=model.metric.mean + 1))
    with pytest.raises(AdapterError, match="not the one that the meta-LoRA's manifest names"):
        measure(tiny_experiment, "recycle")


def test_a_metric_is_fitted_on_the_synthetic_images(inverted: ExperimentConfig) -> None:
    """By hand, in other batches than there."""
    (row,) = measure(inverted, "nn-metric")
    (file,) = Path(inverted.output_root, "evaluation").glob("fitted-nn-metric-*.safetensors")
    fitted = Metric.of(read_tensors(str(file))[0])
    evaluation = inverted.evaluation
    model = Model(backbone=load_backbone(inverted.backbone), precision=evaluation.precision, batch_size=evaluation.batch_size)
    *trained_on, _held_out = list_synthetic(inverted.synthetic_root)
    pool = read_pool(inverted.synthetic_root, trained_on)
    metric = fit_metric(model.embed(pool.images), torch.from_numpy(pool.class_of), MetricConfig())
    torch.testing.assert_close(fitted.tensors(), metric.tensors(), rtol=0.05, atol=0.05)
    assert row["accuracy"] == accuracy_of(replace(model, metric=fitted), inverted)


def test_pixels_are_measured_as_the_metric_on_them_is_fitted(inverted: ExperimentConfig) -> None:
    (row,) = measure(inverted, "nn-metric:features=raw-pixels")
    *trained_on, _held_out = list_synthetic(inverted.synthetic_root)
    pool = read_pool(inverted.synthetic_root, trained_on)
    metric = fit_metric(pool.images.flatten(1) / 255, torch.from_numpy(pool.class_of), MetricConfig())
    assert inverted.data.test is not None
    data = load_data(inverted.data.test)
    features = metric(data.pixels(range(len(data)), 32).flatten(1) / 255)
    (shape,) = inverted.evaluation.shapes
    assert isinstance(shape, EpisodeShape)
    episodes = draw_test_episodes(data.labels, shape, num_episodes=inverted.evaluation.episodes, seed=inverted.seed)
    assert row["accuracy"] == pytest.approx(100 * float(episode_accuracies(features, episodes, shape).mean()), abs=0.2)


@pytest.mark.slow
def test_a_metric_is_fitted_on_images_of_its_own(inverted: ExperimentConfig) -> None:
    """By hand again; and what is trained finds the same images."""
    own = inverted.inversion.model_copy(update={"canvas": "strokes", "images_per_class": 2})
    config = changed(inverted.model_copy(update={"metric_inversion": own}), training={"num_steps": 2})

    report = invert_library(config, QUIET)
    measure(config, "nn-metric")
    manifest = train_meta_lora(config, QUIET)

    root = f"{config.output_root}/metric_synthetic"
    assert len(report.uris) == 6
    assert sum(uri.startswith(root) for uri in report.uris) == 3
    pool = read_pool(root, list_synthetic(root))
    assert len(pool.images) == 3 * 3 * 2
    passes = {"precision": config.evaluation.precision, "batch_size": config.evaluation.batch_size}
    (file,) = Path(config.output_root, "evaluation").glob("fitted-nn-metric-*.safetensors")
    trained = replace(lr_ray.load(config.meta_lora_root), metric=None)
    for model, fitted in (
        (Model(backbone=load_backbone(config.backbone), **passes), Metric.of(read_tensors(str(file))[0])),
        (trained, lr_ray.load(config.meta_lora_root).metric),
    ):
        by_hand = fit_metric(model.embed(pool.images), torch.from_numpy(pool.class_of), MetricConfig())
        torch.testing.assert_close(fitted.tensors(), by_hand.tensors(), rtol=0.05, atol=0.05)
    assert manifest["inputs"]["for_metric"] == list_synthetic(root)
    before = snapshot(root)
    assert invert_library(config, QUIET) == report
    assert snapshot(root) == before

    wrong = config.model_copy(update={"metric_inversion": own.model_copy(update={"classes": ("none",)})})
    with pytest.raises(AdapterError, match=r"^metric_inversion: "):
        invert_library(wrong, QUIET)
    folders = {"synthetic": config.synthetic_root, "metric_synthetic": root, "adapters": config.adapters_root}
    elsewhere = config.model_copy(update={**folders, "output": f"{config.output_root}/again"})
    for uri in config.synthetic_root, root:
        Path(uri, list_synthetic(uri)[0]).rename(Path(uri, "gone-0123456789ab.parquet"))
        with pytest.raises(StorageError, match=r"gone-0123456789ab.parquet are of an adapter that "):
            train_meta_lora(elsewhere, QUIET)
        Path(uri, "gone-0123456789ab.parquet").unlink()


def test_a_meta_lora_of_another_backbone_is_refused(tiny_experiment: ExperimentConfig, meta_lora: str) -> None:
    other = changed(tiny_experiment, backbone={"name": "vit_small_patch16_224"})
    with pytest.raises(AdapterError, match="was tuned on 'vit_tiny_patch16_224' .*, not on 'vit_small_patch16_224'"):
        measure(other, "recycle")
    assert not Path(other.output_root, "evaluation").exists()


def test_a_method_that_fails_does_not_keep_the_others(tiny_experiment: ExperimentConfig) -> None:
    with pytest.raises(EpisodeError, match="caml: 6 classes of data.tune have 10 images, and its episodes have 7 ways"):
        measure(tiny_experiment, "caml:num_steps=1,n_way=7", "nn", "bpa")
    stored = json.loads(Path(tiny_experiment.output_root, "results.json").read_text())
    assert [row["method"] for row in stored] == ["nn", "bpa"]


def test_results_of_other_settings_are_refused(tiny_experiment: ExperimentConfig) -> None:
    measure(tiny_experiment, "nn")
    before = snapshot(tiny_experiment.output_root)
    message = (
        r"results.json holds results of other settings \(seed was 0, now 1\); choose another --output, or delete that file"
    )
    with pytest.raises(StorageError, match=message):
        measure(tiny_experiment.model_copy(update={"seed": 1}), "nn")
    assert snapshot(tiny_experiment.output_root) == before


def test_a_whole_run_is_refused_before_it_is_trained(tiny_experiment: ExperimentConfig) -> None:
    for changes, message in (
        ({"data": {"test": None}}, "data.test is not set"),
        ({"data": {"tune": None}}, "oracle is trained on real images; set data.tune or leave it out"),
        ({"evaluation": {"methods": ("nn", "nearest")}}, "'nearest' is not a method"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_experiment(changed(tiny_experiment, **changes), QUIET)
    assert not Path(tiny_experiment.output_root).exists()


def test_a_stranger_meets_the_same_episodes(tiny_experiment: ExperimentConfig) -> None:
    """From the stored episodes alone: the nearest centre by another program's hand."""
    (row,) = measure(tiny_experiment, "nn")
    (path,) = Path(tiny_experiment.output_root, "evaluation").glob("episodes-3-way-1-shot-*.parquet")
    table = pq.read_table(path).to_pylist()
    assert tiny_experiment.data.test is not None
    data, backbone = load_data(tiny_experiment.data.test), load_backbone(tiny_experiment.backbone)
    right: list[bool] = []
    per_class: dict[str, list[bool]] = {}
    for episode in range(20):
        images = [found for found in table if found["episode"] == episode]
        features = encode_pixels(backbone, data.pixels([found["image"] for found in images], 32), precision="auto")
        centres = {f["way"]: x for f, x in zip(images, features, strict=True) if f["role"] == "support"}
        for found, feature in zip(images, features, strict=True):
            assert data.describe(found["image"]) == found["source"]
            if found["role"] == "query":
                nearest = min(centres, key=lambda way, x=feature: float(torch.dist(x, centres[way])))  # type: ignore[misc]
                right.append(nearest == found["way"])
                per_class.setdefault(found["class_name"], []).append(nearest == found["way"])
    assert row["accuracy"] == pytest.approx(100 * sum(right) / len(right), abs=0.34)  # one query of 300 may be a tie in bf16
    assert row["per_class"].keys() == per_class.keys()
    for name, found in per_class.items():
        assert row["per_class"][name] == pytest.approx(100 * sum(found) / len(found), abs=2)


@pytest.mark.slow
def test_ways_and_shots_may_vary(tiny_experiment: ExperimentConfig, meta_lora: str) -> None:
    """Beside a fixed shape, which is as it would be alone; from the files alone a stranger gets the row."""
    varying = VaryingShape(ways=(2, 50), max_support=60)
    shapes = (*tiny_experiment.evaluation.shapes, varying)
    tuned = ("lora-linear:num_steps=1", "vpt:num_steps=1", "full-finetune:num_steps=1")
    methods = ("nn", "recycle", "linear-probe", "caml:num_steps=2,width=8,num_layers=1,n_way=4", *tuned)
    alone = measure(tiny_experiment, "recycle", "nn")
    rows = measure(tiny_experiment, *methods, shapes=shapes)
    assert [row["method"] for row in rows[::2]] == list(methods)
    assert [rows[2], rows[0]] == alone
    nn, recycle, probe, _, *of_tuned = rows[1::2]
    assert nn["shape"] == "varying-way varying-shot (ways 2-50, max_support 60)"
    assert (nn["n_way"], nn["n_shot"], nn["n_query"], nn["episodes"]) == (None, None, None, 20)

    root = Path(tiny_experiment.output_root, "evaluation")
    (path,) = root.glob("episodes-varying-way-varying-shot-ways-2-50-max-support-60-*.parquet")
    episodes = [pq.read_table(path, filters=[("episode", "=", number)]).to_pylist() for number in range(20)]
    ways = [max(image["way"] for image in episode) + 1 for episode in episodes]
    shots = [
        sum(image["role"] == "support" for image in episode) / n_way for episode, n_way in zip(episodes, ways, strict=True)
    ]
    assert set(ways) == {2, 3, 4}
    assert nn["mean_way"] == pytest.approx(sum(ways) / 20, abs=0.006)
    assert nn["mean_shot"] == pytest.approx(sum(shots) / 20, abs=0.006)
    assert nn["chance"] == pytest.approx(100 * sum(1 / n_way for n_way in ways) / 20, abs=0.006)
    assert probe["trained_parameters"] == round(193 * sum(ways) / 20)
    for row in of_tuned:
        assert row["accuracy"] > nn["chance"]
        assert row["trained_parameters"] > 0
        assert row["gflops_per_episode"] > nn["gflops_per_episode"]
    images = sum(map(len, episodes)) / 20
    assert nn["gflops_per_episode"] == pytest.approx(rows[0]["gflops_per_episode"] * images / 18, rel=0.02)

    (predictions,) = root.glob("nn-varying-*.parquet")
    accuracies = []
    for episode, predicted in zip(episodes, pq.read_table(predictions)["predicted"].to_pylist(), strict=True):
        truth = [image["way"] for image in episode if image["role"] == "query"]
        accuracies.append(sum(map(int.__eq__, truth, predicted)) / len(truth))
    assert nn["accuracy"] == pytest.approx(100 * sum(accuracies) / 20, abs=0.006)
    assert nn["difference"] == pytest.approx(nn["accuracy"] - recycle["accuracy"], abs=0.011)

    before = snapshot(tiny_experiment.output_root)
    assert measure(tiny_experiment, *methods, shapes=shapes) == rows
    assert snapshot(tiny_experiment.output_root) == before


def test_errors_come_before_the_work(tiny_experiment: ExperimentConfig) -> None:
    shape = tiny_experiment.evaluation.shapes[0].model_copy(update={"n_way": 9})
    without = changed(tiny_experiment, data={"tune": None})
    for expected, call in (
        ("'nearest' is not a method; there are ", lambda: measure(tiny_experiment, "nn", "nearest")),
        ("nn:2'?: 2: no such setting", lambda: measure(tiny_experiment, "nn:2")),
        ("needs .*/meta_lora; run `lr-ray train` first or leave it out", lambda: measure(tiny_experiment, "nn", "recycle")),
        ("needs .*/joint; run `lr-ray train --joint` first", lambda: measure(tiny_experiment, "bpa:features=joint")),
        ("caml learns from real images; set data.tune or leave it out", lambda: measure(without, "caml")),
    ):
        with pytest.raises(ConfigError, match=expected):
            call()
    with pytest.raises(
        EpisodeError, match="caml:n_way=2 is made for 2 ways, but episodes of 3-way 1-shot have up to 3; choose"
    ):
        measure(tiny_experiment, "nn", "caml:n_way=2")
    with pytest.raises(
        EpisodeError, match="caml:n_way=3 is made for 3 ways, but episodes of varying-way .* have up to 4; choose"
    ):
        measure(tiny_experiment, "caml:n_way=3", shapes=(VaryingShape(ways=(2, 9)),))
    with pytest.raises(EpisodeError, match="9-way episodes: the data have 4 classes"):
        measure(tiny_experiment, "nn", shapes=(shape,))
    with pytest.raises(EpisodeError, match="episodes of 5 and more ways: the data have 4 classes; lower ways or give more"):
        measure(tiny_experiment, "nn", shapes=(VaryingShape(),))
    assert not Path(tiny_experiment.output_root).exists()
