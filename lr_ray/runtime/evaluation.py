"""`lr-ray eval`: every method on the same episodes, in Ray tasks that each commit what they found."""

import json
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lr_ray.config import ExperimentConfig
from lr_ray.data.images import LabelledImages
from lr_ray.data.load import load_data
from lr_ray.fewshot.episodes import draw_test_episodes
from lr_ray.fewshot.evaluate import AccuracyReport, is_right, paired_difference, predict
from lr_ray.fewshot.methods import FeatureMethod, MethodInputs, TunedMethod, find_method
from lr_ray.fewshot.methods.features import embedder
from lr_ray.report.card import complete_card
from lr_ray.report.charts import EpisodeFeatures
from lr_ray.report.progress import Reporter
from lr_ray.runtime.cost import begin_peak_memory, count_flops, peak_memory_mib
from lr_ray.runtime.evaluation_plan import EpisodesTask, EvaluationPlan, FeaturesTask, FitTask, Measurement, test_data_of
from lr_ray.runtime.session import work_through, worker_device
from lr_ray.storage.adapters import CONFIG_NAME, read_adapter, read_adapters
from lr_ray.storage.filesystem import exists, join, list_uris, read_if_there, write_bytes
from lr_ray.storage.measurements import read_predictions, read_tensors, write_episodes, write_predictions, write_tensors
from lr_ray.vit.backbone import Backbone, load_backbone

RESULTS_NAME = "results.json"
REFERENCE = "recycle"
"""The method that all others are compared with."""
_FIT_IMAGES_PER_CLASS = 100


def evaluate_methods(config: ExperimentConfig, reporter: Reporter) -> list[dict[str, Any]]:
    """Measure what has not been measured; returns these methods' rows, in the order of methods and shapes.

    Rows of other methods, data or shapes stay in `results.json`. The model cards of what was measured tell these methods'
    rows.

    Raises:
        ConfigError: no test data, an unknown method, or one that needs what is not there; before any work.
        EpisodeError: too few classes or images.
    """
    plan = EvaluationPlan(config)
    tasks = [task for measurement in plan.measurements for task in measurement.tasks]
    done = list_uris(join(config.output_root, "evaluation"), suffix="")
    todo = [task for task in tasks if task.uri not in done]
    names = ", ".join(dict.fromkeys(task.label for task in todo))
    count = len({measurement.chosen.label for measurement in plan.measurements})
    reporter.say(f"eval: {count} methods on {plan.data.name}; to measure: {names or 'none'}")
    _store_episodes(plan)
    features = [plan.features[uri] for uri in dict.fromkeys(t.features_uri for t in todo if t.features_uri) if uri not in done]
    work_through("features", embed_test_images, features, config.ray, reporter, lambda task, _: task.features)
    fits = [plan.fits[uri] for uri in dict.fromkeys(t.fitted_uri for t in todo if t.fitted_uri) if uri not in done]
    work_through("fit", fit_method, fits, config.ray, reporter, lambda task, _: task.label)

    def found(task: EpisodesTask, accuracy: float) -> str:
        return f"{task.label} {task.shape.n_shot}-shot {100 * accuracy:.1f}"

    work_through("eval", predict_episodes, todo, config.ray, reporter, found)
    rows = _rows(plan)
    uri = join(config.output_root, RESULTS_NAME)
    stored = read_if_there(uri) or b"[]"
    known: list[dict[str, Any]] = json.loads(stored)
    wanted = {(row["method"], row["dataset"], row["n_way"], row["n_shot"], row["n_query"]) for row in rows}
    others = [r for r in known if (r["method"], r["dataset"], r["n_way"], r["n_shot"], r["n_query"]) not in wanted]
    if (content := json.dumps(others + rows, indent=2, ensure_ascii=False).encode()) != stored:
        write_bytes(uri, content)
    for method, folder in (("recycle", config.meta_lora_root), ("joint", config.joint_root), ("oracle", config.oracle_root)):
        if any(row["method"] == method for row in rows):
            complete_card(folder, rows)
    return rows


def example_episode(config: ExperimentConfig) -> EpisodeFeatures | None:
    """The first test episode of the last shape, before and after the meta-LoRA; None where either was not measured."""
    if config.data.test is None or not exists(join(config.meta_lora_root, CONFIG_NAME)):
        return None
    both = config.evaluation.model_copy(update={"methods": ("nn", "recycle")})
    plan = EvaluationPlan(config.model_copy(update={"evaluation": both}))
    shape, data = config.evaluation.shapes[-1], plan.data
    uris = {m.chosen.label: m.tasks[0].features_uri for m in plan.measurements}
    if not all(exists(uri) for uri in uris.values()):
        return None
    (episode,) = draw_test_episodes(data.labels, shape, num_episodes=1, seed=config.seed)
    return EpisodeFeatures(
        features={label: read_tensors(uri)[0]["features"][episode.ravel()].numpy() for label, uri in uris.items()},
        labels=data.labels[episode.ravel()],
        class_names=data.class_names,
        support=np.tile(np.arange(episode.shape[1]) < shape.n_shot, len(episode)),
    )


def _store_episodes(plan: EvaluationPlan) -> None:
    """So that other programs may meet the same."""
    evaluation = plan.config.evaluation
    for shape in evaluation.shapes:
        if not exists(uri := plan.episodes_uri(shape)):
            data = plan.data
            episodes = draw_test_episodes(data.labels, shape, num_episodes=evaluation.episodes, seed=plan.config.seed)
            write_episodes(uri, episodes, data.labels, data.class_names, data.describe, shape.n_shot)


def _inputs(config: ExperimentConfig, backbone: Backbone) -> MethodInputs:
    return MethodInputs(
        backbone=backbone,
        precision=config.evaluation.precision,
        adapters=lambda: read_adapters(config.adapters_root),
        meta_lora=lambda: read_adapter(config.meta_lora_root),
        joint=lambda: read_adapter(config.joint_root),
        oracle=lambda: read_adapter(config.oracle_root),
    )


def _embed(
    config: ExperimentConfig, features: str, data: LabelledImages, positions: np.ndarray
) -> tuple[Tensor, dict[str, Any]]:
    """(n, D) features of some images, and what they cost."""
    backbone = load_backbone(config.backbone, device=worker_device(config.ray))
    begin_peak_memory(backbone.device)
    seconds = 0.0
    parts = []
    with embedder(_inputs(config, backbone), features) as embed, torch.inference_mode():
        for start in range(0, len(positions), config.evaluation.batch_size):
            images = data.pixels(positions[start : start + config.evaluation.batch_size], backbone.image_px)
            began = time.perf_counter()
            parts.append(embed(images).cpu())
            seconds += time.perf_counter() - began
        flops = count_flops(lambda: embed(images[:1]))
    cost = {"seconds": seconds, "peak_memory_mib": peak_memory_mib(backbone.device), "flops_per_image": flops}
    return torch.cat(parts), cost


def embed_test_images(task: FeaturesTask) -> None:
    """Commit the features of all test images."""
    data = test_data_of(task.config)
    features, cost = _embed(task.config, task.features, data, np.arange(len(data)))
    write_tensors(task.uri, {"features": features}, cost)


def fit_method(task: FitTask) -> None:
    """Commit what a method learns from the features of real images of other classes."""
    config, chosen = task.config, find_method(task.label)
    assert isinstance(chosen.method, FeatureMethod)
    assert chosen.method.fit is not None
    assert config.data.tune is not None
    data = load_data(config.data.tune)
    members = [np.flatnonzero(data.labels == c) for c in range(len(data.class_names))]
    rng = np.random.default_rng(config.seed)
    positions = np.concatenate([rng.permutation(found)[:_FIT_IMAGES_PER_CLASS] for found in members])
    features, _ = _embed(config, chosen.method.features(chosen.settings), data, positions)
    start = time.perf_counter()
    tensors = chosen.method.fit(chosen.settings, features, torch.from_numpy(data.labels[positions]), config.seed)
    write_tensors(task.uri, tensors, {"seconds": time.perf_counter() - start})


def predict_episodes(task: EpisodesTask) -> float:
    """Commit what a method predicts of some episodes; returns its accuracy on them."""
    data, chosen = test_data_of(task.config), find_method(task.label)
    episodes = draw_test_episodes(data.labels, task.shape, num_episodes=task.stop, seed=task.config.seed)[task.start :]
    measure = _predict_from_features if isinstance(chosen.method, FeatureMethod) else _predict_by_tuning
    predicted, seconds, facts = measure(task, data, episodes)
    write_predictions(task.uri, predicted, seconds, facts)
    return float(is_right(predicted).mean())


def _predict_from_features(
    task: EpisodesTask, data: LabelledImages, episodes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    chosen, shape = find_method(task.label), task.shape
    assert isinstance(chosen.method, FeatureMethod)
    device = torch.device(worker_device(task.config.ray))
    if task.features_uri:
        tensors, cost = read_tensors(task.features_uri)
        features = tensors["features"]
    else:
        features, cost = _embed(task.config, chosen.method.features(chosen.settings), data, np.arange(len(data)))
    fitted, _ = read_tensors(task.fitted_uri) if task.fitted_uri else ({}, {})
    head = chosen.method.head(chosen.settings, fitted)
    begin_peak_memory(device)
    start = time.perf_counter()
    with torch.inference_mode():
        predicted = predict(features, episodes, shape, head)
    head_s = (time.perf_counter() - start) / len(episodes)
    peak = max(peak_memory_mib(device), cost["peak_memory_mib"])
    with torch.inference_mode():
        head_flops = count_flops(lambda: predict(features, episodes[:1], shape, head))
    images_per_s = len(features) / cost["seconds"]
    facts = {
        "images_per_s": images_per_s,
        "peak_memory_mib": peak,
        "trained_parameters": chosen.method.num_trained(chosen.settings, shape.n_way, features.shape[1]),
        "flops": episodes[0].size * cost["flops_per_image"] + head_flops,
        "seconds": cost["seconds"] + head_s * len(episodes),
    }
    return predicted, np.full(len(episodes), head_s + episodes[0].size / images_per_s), facts


def _predict_by_tuning(
    task: EpisodesTask, data: LabelledImages, episodes: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    config, chosen, shape = task.config, find_method(task.label), task.shape
    assert isinstance(chosen.method, TunedMethod)
    backbone = load_backbone(config.backbone, device=worker_device(config.ray))
    begin_peak_memory(backbone.device)
    predicted, seconds = [], []
    with chosen.method.adapt(_inputs(config, backbone), chosen.settings) as adapt:
        for index, episode in enumerate(episodes, start=task.start):
            images = data.pixels(episode.ravel(), backbone.image_px).unflatten(0, episode.shape)
            support, queries = images[:, : shape.n_shot], images[:, shape.n_shot :].flatten(0, 1)
            began = time.perf_counter()
            adaptation = adapt(support, queries, config.seed * 1_000_003 + index)
            seconds.append(time.perf_counter() - began)
            predicted.append(adaptation.scores.argmax(dim=-1).cpu().numpy().reshape(shape.n_way, shape.n_query))
        peak = peak_memory_mib(backbone.device)
        facts = {"peak_memory_mib": peak, "trained_parameters": adaptation.num_trained}
        if task.start == 0:
            facts["flops"] = count_flops(lambda: adapt(support, queries, 0))
    return np.stack(predicted), np.array(seconds), facts


def _rows(plan: EvaluationPlan) -> list[dict[str, Any]]:
    rows, accuracies = [], {}
    for measurement in plan.measurements:
        row, accuracies[measurement.chosen.label, measurement.shape] = _row(plan, measurement)
        rows.append(row)
    for row, measurement in zip(rows, plan.measurements, strict=True):
        reference = accuracies.get((REFERENCE, measurement.shape))
        row |= _compared(accuracies[measurement.chosen.label, measurement.shape], reference, row["method"])
    return rows


def _compared(accuracies: np.ndarray, reference: np.ndarray | None, label: str) -> dict[str, Any]:
    """The paired difference to recycling, in points."""
    if reference is None or label == REFERENCE:
        return dict.fromkeys(("difference", "difference_ci95", "p_value", "difference_episodes"))
    found = paired_difference(accuracies, reference)
    return {
        "difference": round(100 * found.mean, 2),
        "difference_ci95": round(100 * found.ci95, 2),
        "p_value": found.p_value,
        "difference_episodes": found.num_episodes,
    }


def _row(plan: EvaluationPlan, measurement: Measurement) -> tuple[dict[str, Any], np.ndarray]:
    """A row of `results.json` without its comparison, and the (E,) accuracies."""
    shape, data, chosen = measurement.shape, plan.data, measurement.chosen
    parts = [read_predictions(task.uri, shape) for task in measurement.tasks]
    predicted = np.concatenate([found for found, _, _ in parts])
    seconds = np.concatenate([took for _, took, _ in parts])
    facts = parts[0][2]
    episodes = draw_test_episodes(data.labels, shape, num_episodes=len(predicted), seed=plan.config.seed)
    report = AccuracyReport(right=is_right(predicted), classes=data.labels[episodes[:, :, 0]])
    per_class = report.per_class(data.class_names)
    row = {
        "method": chosen.label,
        "source": chosen.method.source,
        "dataset": data.name,
        "n_way": shape.n_way,
        "n_shot": shape.n_shot,
        "n_query": shape.n_query,
        "episodes": len(predicted),
        "accuracy": round(100 * report.mean, 2),
        "ci95": round(100 * report.ci95, 2),
        "macro_accuracy": round(100 * float(np.mean(list(per_class.values()))), 2),
        "per_class": {name: round(100 * value, 2) for name, value in per_class.items()},
        "episode_ms": round(1000 * float(seconds.mean()), 2),
        "images_per_s": round(facts["images_per_s"], 1) if "images_per_s" in facts else None,
        "peak_memory_mib": round(max(found["peak_memory_mib"] for _, _, found in parts)),
        "trained_parameters": facts["trained_parameters"],
        "gflops_per_episode": round(facts["flops"] / 1e9, 2),
        "seconds": round(facts.get("seconds", float(seconds.sum())), 3),
        "digest": measurement.digest,
    }
    return row, report.accuracies
