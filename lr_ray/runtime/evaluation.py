"""`lr-ray eval`: every method on the same episodes, in Ray tasks that each commit what they found."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lr_ray.config import ExperimentConfig
from lr_ray.data.images import LabelledImages
from lr_ray.data.load import load_data
from lr_ray.errors import LrRayError, StorageError
from lr_ray.fewshot.episodes import EpisodeShape
from lr_ray.fewshot.evaluate import is_right, predict_each
from lr_ray.fewshot.methods import Embed, FeatureMethod, FewShotTask, Head, MethodInputs, TunedMethod, find_method
from lr_ray.fewshot.methods.features import embedder
from lr_ray.fewshot.metric import MetricConfig
from lr_ray.fewshot.protocol import DrawnEpisode, draw_episodes
from lr_ray.report.card import complete_card
from lr_ray.report.charts import EpisodeFeatures
from lr_ray.report.progress import Reporter
from lr_ray.report.write import write_tables
from lr_ray.runtime.cost import begin_peak_memory, count_flops, peak_memory_mib
from lr_ray.runtime.evaluation_plan import EpisodesTask, EvaluationPlan, FeaturesTask, FitTask, test_data_of
from lr_ray.runtime.evaluation_rows import known_rows, merge_rows, rows_of
from lr_ray.runtime.held import held_backbone
from lr_ray.runtime.metric import embed_classes
from lr_ray.runtime.session import without_gpus, work_through, worker_device
from lr_ray.runtime.training_job import metric_files
from lr_ray.storage.adapters import read_adapter, read_adapters
from lr_ray.storage.filesystem import exists, join, list_uris, read_many, write_bytes
from lr_ray.storage.manifest import CONFIG_NAME
from lr_ray.storage.measurements import read_rows, read_tensors, write_episodes, write_predictions, write_tensors
from lr_ray.storage.metric import read_metric
from lr_ray.storage.synthetic import read_classes, read_index
from lr_ray.vit.backbone import Backbone

RESULTS_NAME = "results.json"
_FIT_IMAGES_PER_CLASS = 100
_EPISODES_COUNTED = 10
"""The first, whose heads' FLOPs are counted where episodes differ: counting does all the work again."""


def evaluate_methods(config: ExperimentConfig, reporter: Reporter) -> list[dict[str, Any]]:
    """Measure what has not been measured; returns these methods' rows, in the order of methods and shapes.

    Rows of other methods, data or shapes stay in `results.json` and the tables beside it, and in the model cards of what was
    measured.

    Raises:
        ConfigError: no test data, an unknown method, or one that needs what is not there; before any work.
        EpisodeError: too few classes or images.
        StorageError: the results there are damaged, or of other settings.
    """
    plan = EvaluationPlan(config)
    uri = join(config.output_root, RESULTS_NAME)
    known_rows(plan, uri)  # refuses what cannot be gone on with, before the work
    tasks = [task for measurement in plan.measurements for task in measurement.tasks]
    done = list_uris(join(config.output_root, "evaluation"), suffix="")
    todo = [task for task in tasks if task.uri not in done]
    names = ", ".join(dict.fromkeys(task.label for task in todo))
    count = len({measurement.chosen.label for measurement in plan.measurements})
    reporter.say(f"eval: {count} methods on {plan.data.name}; to measure: {names or 'none'}")
    _store_episodes(plan)
    failures: list[LrRayError] = []
    features = [plan.features[uri] for uri in dict.fromkeys(t.features_uri for t in todo if t.features_uri) if uri not in done]
    with _kept(failures):
        work_through("features", embed_test_images, features, config.ray, reporter, lambda task, _: task.features)
    fits = [plan.fits[uri] for uri in dict.fromkeys(t.fitted_uri for t in todo if t.fitted_uri) if uri not in done]
    with _kept(failures):
        work_through("fit", fit_method, fits, config.ray, reporter, lambda task, _: task.label)

    def found(task: EpisodesTask, accuracy: float) -> str:
        return f"{task.label} {task.shape.name} {100 * accuracy:.1f}"

    if failures:  # the others do not wait for what failed
        done = list_uris(join(config.output_root, "evaluation"), suffix="")
        todo = [task for task in todo if {task.features_uri, task.fitted_uri} - {""} <= set(done)]
    for kind, title, resources in (
        (FeatureMethod, "eval", without_gpus(config.ray)),
        (TunedMethod, "eval, tuned on each episode", config.ray),
    ):
        of_kind = [task for task in todo if isinstance(find_method(task.label).method, kind)]
        with _kept(failures):
            work_through(title, predict_episodes, of_kind, resources, reporter, found)
    rows = rows_of(plan)
    known = known_rows(plan, uri)  # again, since another command may have measured meanwhile
    merged = merge_rows(known, rows)
    if merged != known:
        write_tables(config.output_root, merged)
        write_bytes(uri, json.dumps(merged, indent=2, ensure_ascii=False).encode())
    for method, folder in (("recycle", config.meta_lora_root), ("joint", config.joint_root), ("oracle", config.oracle_root)):
        if any(row["method"] == method for row in rows):
            complete_card(folder, merged)
    if failures:
        raise failures[0]
    return rows


def stored_rows(config: ExperimentConfig) -> list[dict[str, Any]]:
    """All rows of `results.json`, whichever run measured them.

    Raises:
        StorageError: nothing was measured, or it cannot be read.
    """
    uri = join(config.output_root, RESULTS_NAME)
    rows = read_rows(uri)
    if rows is None:
        raise StorageError(f"results {uri} do not exist; run `lr-ray eval` first")
    return rows


@contextmanager
def _kept(failures: list[LrRayError]) -> Iterator[None]:
    """An error of the user inside is raised later."""
    try:
        yield
    except LrRayError as error:
        failures.append(error)


def example_episode(config: ExperimentConfig) -> EpisodeFeatures | None:
    """The first test episode of the last fixed shape, or else of the last, before and after the meta-LoRA.

    None where either was not measured.
    """
    if config.data.test is None or not exists(join(config.meta_lora_root, CONFIG_NAME)):
        return None
    shapes = config.evaluation.shapes
    shape = ([shape for shape in shapes if isinstance(shape, EpisodeShape)] or shapes)[-1]
    both = config.evaluation.model_copy(update={"methods": ("nn", "recycle")})
    plan = EvaluationPlan(config.model_copy(update={"evaluation": both}))
    data = plan.data
    uris = {m.chosen.label: m.tasks[0].features_uri for m in plan.measurements}
    if not all(exists(uri) for uri in uris.values()):
        return None
    (episode,) = draw_episodes(data.labels, shape, num_episodes=1, seed=config.seed)
    return EpisodeFeatures(
        features={label: read_tensors(uri)[0]["features"][episode.images].numpy() for label, uri in uris.items()},
        labels=data.labels[episode.images],
        class_names=data.class_names,
        support=~episode.is_query,
    )


def _store_episodes(plan: EvaluationPlan) -> None:
    """So that other programs may meet the same."""
    evaluation = plan.config.evaluation
    for shape in evaluation.shapes:
        if not exists(uri := plan.episodes_uri(shape)):
            data = plan.data
            episodes = draw_episodes(data.labels, shape, num_episodes=evaluation.episodes, seed=plan.config.seed)
            write_episodes(uri, episodes, data.labels, data.class_names, data.describe)


def _inputs(config: ExperimentConfig, backbone: Backbone) -> MethodInputs:
    return MethodInputs(
        backbone=backbone,
        precision=config.evaluation.precision,
        adapters=lambda: read_adapters(config.adapters_root),
        meta_lora=lambda: read_adapter(config.meta_lora_root),
        joint=lambda: read_adapter(config.joint_root),
        oracle=lambda: read_adapter(config.oracle_root),
    )


def embed_test_images(task: FeaturesTask) -> None:
    """Commit the features of all test images."""
    config, data = task.config, test_data_of(task.config)
    backbone = held_backbone(config.backbone, worker_device(config.ray))
    begin_peak_memory(backbone.device)
    seconds = 0.0
    parts = []
    with embedder(_inputs(config, backbone), task.features) as embed, torch.inference_mode():
        if backbone.device.type == "cuda":  # which loads its kernels at the first pass, in no one's time
            embed(data.pixels(np.arange(1), backbone.image_px))
        for positions in _batches(np.arange(len(data)), config):
            images = data.pixels(positions, backbone.image_px)
            began = time.perf_counter()
            parts.append(embed(images).cpu())
            seconds += time.perf_counter() - began
        flops = count_flops(lambda: embed(images[:1]))
    cost = {"seconds": seconds, "peak_memory_mib": peak_memory_mib(backbone.device), "flops_per_image": flops}
    write_tensors(task.uri, {"features": torch.cat(parts)}, cost)


def fit_method(task: FitTask) -> None:
    """Commit what a method learns from the features of images of other classes."""
    config, chosen = task.config, find_method(task.label)
    assert isinstance(chosen.method, FeatureMethod)
    assert chosen.method.fit is not None
    backbone = held_backbone(config.backbone, worker_device(config.ray))
    material = {"tune": _real_features, "synthetic": _synthetic_features}[chosen.method.fit_on]
    with embedder(_inputs(config, backbone), chosen.method.features(chosen.settings)) as embed, torch.inference_mode():
        features, labels = material(config, backbone, embed)
    start = time.perf_counter()
    metric = config.training.metric if chosen.method.fit_on == "synthetic" else MetricConfig()  # as its digest has it
    tensors = chosen.method.fit(chosen.settings, features.clone(), labels, config.seed, metric)
    write_tensors(task.uri, tensors, {"seconds": time.perf_counter() - start})


def _batches(positions: np.ndarray, config: ExperimentConfig) -> list[np.ndarray]:
    size = config.evaluation.batch_size
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def _real_features(config: ExperimentConfig, backbone: Backbone, embed: Embed) -> tuple[Tensor, Tensor]:
    """(M, D) features of some images of each class of `data.tune`, and the (M,) classes."""
    assert config.data.tune is not None
    data = load_data(config.data.tune)
    members = [np.flatnonzero(data.labels == c) for c in range(len(data.class_names))]
    rng = np.random.default_rng(config.seed)
    positions = np.concatenate([rng.permutation(found)[:_FIT_IMAGES_PER_CLASS] for found in members])
    parts = [embed(data.pixels(some, backbone.image_px)).cpu() for some in _batches(positions, config)]
    return torch.cat(parts), torch.from_numpy(data.labels[positions])


def _synthetic_features(config: ExperimentConfig, backbone: Backbone, embed: Embed) -> tuple[Tensor, Tensor]:
    """The same of the synthetic images for the metric, or of views of them and which image each shows."""
    root = config.for_metric.synthetic_root
    refs = read_index(root, metric_files(config), backbone.identity)
    read = partial(read_many, partial(read_classes, root))
    return embed_classes(refs, read, embed, config.training.metric, seed=config.seed)


def predict_episodes(task: EpisodesTask) -> float:
    """Commit what a method predicts of some episodes; returns its accuracy on them."""
    data, chosen = test_data_of(task.config), find_method(task.label)
    episodes = draw_episodes(data.labels, task.shape, num_episodes=task.stop, seed=task.config.seed)[task.start :]
    measure = _predict_from_features if isinstance(chosen.method, FeatureMethod) else _predict_by_tuning
    predicted, seconds, facts = measure(task, data, episodes)
    write_predictions(task.uri, predicted, seconds, facts)
    return float(np.mean([is_right(ways).mean() for ways in predicted]))


def _predict_from_features(
    task: EpisodesTask, data: LabelledImages, episodes: Sequence[DrawnEpisode]
) -> tuple[list[np.ndarray], np.ndarray, dict[str, Any]]:
    chosen = find_method(task.label)
    assert isinstance(chosen.method, FeatureMethod)
    device = torch.device(worker_device(without_gpus(task.config.ray)))
    if task.features_uri:
        tensors, cost = read_tensors(task.features_uri)
        features = tensors["features"]
    else:
        start = time.perf_counter()
        backbone = held_backbone(task.config.backbone, str(device))
        features = data.pixels(np.arange(len(data)), backbone.image_px).flatten(1)
        cost = {"seconds": time.perf_counter() - start, "peak_memory_mib": 0.0, "flops_per_image": 0}
    head = chosen.method.head(chosen.settings, _fitted(task, features.shape[1]))
    if not task.features_uri:
        head = _of_bytes(head)
    begin_peak_memory(device)
    start = time.perf_counter()
    with torch.inference_mode():
        predicted = predict_each(features, episodes, head)
    head_s = (time.perf_counter() - start) / len(episodes)
    on_gpu = task.config.ray.num_gpus_per_actor > 0  # there the features are made, which are all that takes its memory
    peak = cost["peak_memory_mib"] if on_gpu else max(peak_memory_mib(device), cost["peak_memory_mib"])
    counted = episodes[: 1 if isinstance(task.shape, EpisodeShape) else _EPISODES_COUNTED]
    with torch.inference_mode():
        head_flops = count_flops(lambda: predict_each(features, counted, head)) / len(counted)
    images_per_s = len(features) / cost["seconds"]
    images = np.array([len(episode.images) for episode in episodes])
    trained = [chosen.method.num_trained(chosen.settings, episode.n_way, features.shape[1]) for episode in episodes]
    facts = {
        "images_per_s": images_per_s,
        "peak_memory_mib": peak,
        "trained_parameters": round(float(np.mean(trained))),
        "flops": float(images.mean()) * cost["flops_per_image"] + head_flops,
        "seconds": cost["seconds"] + head_s * len(episodes),
    }
    return predicted, head_s + images / images_per_s, facts


def _of_bytes(head: Head) -> Head:
    """For pixels from 0 to 255, a head of those from 0 to 1 that `embedder` gives."""
    return lambda support, labels, queries: head(support / 255, labels, queries / 255)


def _fitted(task: EpisodesTask, num_features: int) -> dict[str, Tensor]:
    """What the method's head is made of."""
    if task.fitted_uri:
        return read_tensors(task.fitted_uri)[0]
    metric = read_metric(task.metric_of, num_features=num_features) if task.metric_of else None
    return {} if metric is None else metric.tensors()


def _predict_by_tuning(
    task: EpisodesTask, data: LabelledImages, episodes: Sequence[DrawnEpisode]
) -> tuple[list[np.ndarray], np.ndarray, dict[str, Any]]:
    config, chosen = task.config, find_method(task.label)
    assert isinstance(chosen.method, TunedMethod)
    backbone = held_backbone(config.backbone, worker_device(config.ray))
    begin_peak_memory(backbone.device)
    predicted: list[np.ndarray] = []
    seconds: list[float] = []
    trained: list[int] = []
    calls: list[list[FewShotTask]] = []
    with chosen.method.adapt(_inputs(config, backbone), chosen.settings) as adapt:
        drawn = (task_of(episode, data, backbone.image_px) for episode in episodes)
        for together in _alike(drawn, chosen.method.at_once(chosen.settings)):
            first = config.seed * 1_000_003 + task.start + len(predicted)
            began = time.perf_counter()
            adaptations = adapt(together, range(first, first + len(together)))
            ways = [adaptation.scores.argmax(dim=-1).cpu().numpy() for adaptation in adaptations]  # a GPU is done only now
            seconds += [(time.perf_counter() - began) / len(together)] * len(together)
            size = episodes[len(predicted)].size
            predicted += [of_episode.reshape(size) for of_episode in ways]
            trained += [adaptation.num_trained for adaptation in adaptations]
            if task.start == 0 and (not calls or not isinstance(task.shape, EpisodeShape)):
                calls.append(together)
        peak = peak_memory_mib(backbone.device)
        facts = {"peak_memory_mib": peak, "trained_parameters": round(float(np.mean(trained)))}
        if task.start == 0:
            flops = [count_flops(lambda call=call: adapt(call[:1], [0])) for call in calls]  # type: ignore[misc]
            facts["flops"] = float(np.average(flops, weights=[len(call) for call in calls]))
    return predicted, np.array(seconds), facts


def task_of(episode: DrawnEpisode, data: LabelledImages, image_px: int) -> FewShotTask:
    """The episode's images, at that size."""
    support, queries = (data.pixels(found, image_px) for found in (episode.support, episode.queries))
    return FewShotTask(support=support, labels=torch.from_numpy(episode.support_ways), queries=queries)


def _alike(tasks: Iterable[FewShotTask], at_once: int) -> Iterator[list[FewShotTask]]:
    """Successive tasks that one call may take, at most so many."""
    together: list[FewShotTask] = []
    for task in tasks:
        if together and (len(together) == at_once or not task.is_like(together[0])):
            yield together
            together = []
        together.append(task)
    yield together
