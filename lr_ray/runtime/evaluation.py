"""`lr-ray eval`: every method on the same episodes, each method in its own Ray task."""

import json
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lr_ray.config import ExperimentConfig
from lr_ray.data.load import load_data
from lr_ray.errors import ConfigError
from lr_ray.fewshot.episodes import draw_test_episodes
from lr_ray.fewshot.evaluate import AccuracyReport, episode_accuracies
from lr_ray.fewshot.methods import MethodInputs, find_method
from lr_ray.report.card import complete_card
from lr_ray.report.progress import Reporter
from lr_ray.runtime.session import work_through, worker_device
from lr_ray.storage.adapters import CONFIG_NAME, list_adapters, read_adapter, read_adapters, read_specs
from lr_ray.storage.filesystem import exists, join, read_if_there, write_bytes
from lr_ray.storage.manifest import digest_of
from lr_ray.vit.backbone import load_backbone

RESULTS_NAME = "results.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationTask:
    """One method, measured on all shapes from features computed once."""

    method: str
    config: ExperimentConfig
    digest: str


def evaluate_methods(config: ExperimentConfig, reporter: Reporter) -> list[dict[str, Any]]:
    """Measure the methods that `results.json` lacks; returns these methods' rows, in the order of methods and shapes.

    Rows of other methods, data or shapes stay in the file. The model cards of what was measured tell these methods' rows.

    Raises:
        ConfigError: no test data, or an unknown method.
        EpisodeError: too few classes or images.
    """
    if config.data.test is None:
        raise ConfigError("data.test is not set: name the real images of unseen classes, with --data or in the config")
    data = load_data(config.data.test)
    for shape in config.evaluation.shapes:
        draw_test_episodes(data.labels, shape, num_episodes=1, seed=config.seed)
    tasks = _plan(config, data.digest())
    uri = join(config.output_root, RESULTS_NAME)
    known: list[dict[str, Any]] = json.loads(read_if_there(uri) or b"[]")
    wanted = {task.digest for task in tasks}
    others = [row for row in known if row["digest"] not in wanted]
    rows = [row for row in known if row["digest"] in wanted]
    todo = [task for task in tasks if task.digest not in {row["digest"] for row in rows}]
    reporter.say(f"eval: {len(tasks)} methods on {data.name}, {len(tasks) - len(todo)} measured already")
    order = {task.digest: position for position, task in enumerate(tasks)}

    def take(task: EvaluationTask, result: list[dict[str, Any]]) -> str:
        rows.extend(result)
        rows.sort(key=lambda row: order[row["digest"]])
        write_bytes(uri, json.dumps(others + rows, indent=2, ensure_ascii=False).encode())
        return f"{task.method} " + ", ".join(f"{row['accuracy']:.1f}" for row in result)

    work_through("eval", evaluate_one, todo, config.ray, reporter, take)
    for method, folder in (("recycle", config.meta_lora_root), ("oracle", config.oracle_root)):
        if method in config.evaluation.methods:
            complete_card(folder, rows)
    return rows


def _plan(config: ExperimentConfig, data_digest: str) -> list[EvaluationTask]:
    backbone = load_backbone(config.backbone)
    tasks = []
    for method in config.evaluation.methods:
        find_method(method)
        base = method.partition(":")[0]
        ingredients: dict[str, Any] = {}
        if base == "loras-avg":
            ingredients = {"adapters": [spec.digest for spec in read_specs(list_adapters(config.adapters_root))]}
        elif base in ("recycle", "oracle"):
            folder = config.meta_lora_root if base == "recycle" else config.oracle_root
            if not exists(join(folder, CONFIG_NAME)):
                command = "lr-ray train" + (" --oracle" if base == "oracle" else "")
                raise ConfigError(f"evaluation.methods: {base} needs {folder}; run `{command}` first or leave it out")
            ingredients = {base: read_adapter(folder).spec.digest}
        inputs = {
            "method": method,
            "ingredients": ingredients,
            "backbone": backbone.identity,
            "data": data_digest,
            "shapes": [shape.model_dump() for shape in config.evaluation.shapes],
            "episodes": config.evaluation.episodes,
            "precision": config.evaluation.precision,
            "seed": config.seed,
        }
        tasks.append(EvaluationTask(method=method, config=config, digest=digest_of(inputs)))
    return tasks


def evaluate_one(task: EvaluationTask) -> list[dict[str, Any]]:
    """Features of all test images, then every shape's episodes; a row of `results.json` per shape."""
    config = task.config
    backbone = load_backbone(config.backbone, device=worker_device(config.ray))
    assert config.data.test is not None
    data = load_data(config.data.test)
    images = data.pixels(np.arange(len(data)), backbone.image_px)
    inputs = MethodInputs(
        backbone=backbone,
        precision=config.evaluation.precision,
        adapters=lambda: read_adapters(config.adapters_root),
        meta_lora=lambda: read_adapter(config.meta_lora_root),
        oracle=lambda: read_adapter(config.oracle_root),
    )
    method, argument = find_method(task.method)
    start = time.perf_counter()
    with method(inputs, argument) as embed, torch.inference_mode():
        features = torch.cat([embed(part).cpu() for part in images.split(config.evaluation.batch_size)])
    embedding_s = time.perf_counter() - start
    return [_row(task, data.name, data.labels, features, shape, embedding_s) for shape in config.evaluation.shapes]


def _row(
    task: EvaluationTask, dataset: str, labels: np.ndarray, features: torch.Tensor, shape: Any, embedding_s: float
) -> dict[str, Any]:
    evaluation = task.config.evaluation
    start = time.perf_counter()
    episodes = draw_test_episodes(labels, shape, num_episodes=evaluation.episodes, seed=task.config.seed)
    report = AccuracyReport(
        method=task.method, dataset=dataset, shape=shape, accuracies=episode_accuracies(features, episodes, shape)
    )
    return {
        "method": report.method,
        "dataset": report.dataset,
        "n_way": shape.n_way,
        "n_shot": shape.n_shot,
        "n_query": shape.n_query,
        "episodes": len(report.accuracies),
        "accuracy": round(100 * report.mean, 2),
        "ci95": round(100 * report.ci95, 2),
        "seconds": round(embedding_s + time.perf_counter() - start, 2),
        "images_per_s": round(len(features) / embedding_s, 1),
        "digest": task.digest,
    }
