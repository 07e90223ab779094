"""From predictions to the rows of `results.json`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lr_ray.errors import StorageError
from lr_ray.fewshot.episodes import EpisodeShape
from lr_ray.fewshot.evaluate import AccuracyReport, is_right, paired_difference
from lr_ray.fewshot.protocol import DrawnEpisode, TestShape, draw_episodes
from lr_ray.runtime.evaluation_plan import REFERENCE, EvaluationPlan, Measurement
from lr_ray.storage.filesystem import join, list_uris
from lr_ray.storage.measurements import read_predictions, read_rows

_UNCOMPARED: dict[str, Any] = dict.fromkeys(
    ("compared_with", "difference", "difference_ci95", "p_value", "difference_episodes")
)


def known_rows(plan: EvaluationPlan, uri: str) -> list[dict[str, Any]]:
    """The rows of `results.json`, which are of this protocol where they are of this data set.

    Raises:
        StorageError: unreadable, or of other settings.
    """
    known = read_rows(uri) or []
    for row in known:
        then = row.get("protocol", plan.protocol)
        if row["dataset"] == plan.data.name and then != plan.protocol:
            changed = "; ".join(
                f"{key} was {then.get(key)}, now {now}" for key, now in plan.protocol.items() if then.get(key) != now
            )
            raise StorageError(
                f"{uri} holds results of other settings ({changed}); choose another --output, or delete that file"
            )
    return known


def merge_rows(known: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of before that are of other methods, data or shapes, and these; none is compared with another meta-LoRA."""

    def task(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("dataset", "shape", "n_way", "n_shot", "n_query"))

    new = {(row["method"], task(row)) for row in rows}
    others = [dict(row) for row in known if (row["method"], task(row)) not in new]
    references = {task(row): row["digest"] for row in rows if row["method"] == REFERENCE}
    for row in others:
        reference = references.get(task(row))
        if reference is not None and row.get("compared_with") not in (None, reference):
            row |= _UNCOMPARED
    return others + list(rows)


def rows_of(plan: EvaluationPlan) -> list[dict[str, Any]]:
    """Of the measurements that are whole, compared with recycling if that was ever measured."""
    done = list_uris(join(plan.config.output_root, "evaluation"), suffix="")
    references: dict[TestShape, tuple[str, np.ndarray]] = {}
    for shape in plan.config.evaluation.shapes:
        reference = plan.reference(shape)
        if reference is not None and all(task.uri in done for task in reference.tasks):
            row, accuracies = _row(plan, reference)
            references[shape] = (row["digest"], accuracies)
    rows = []
    for measurement in plan.measurements:
        if all(task.uri in done for task in measurement.tasks):
            row, accuracies = _row(plan, measurement)
            alone = row["method"] == REFERENCE or measurement.shape not in references
            rows.append(row | (_UNCOMPARED if alone else _compared(accuracies, *references[measurement.shape])))
    return rows


def _compared(accuracies: np.ndarray, digest: str, of_reference: np.ndarray) -> dict[str, Any]:
    """The paired difference to the recycling of that digest, in points."""
    found = paired_difference(accuracies, of_reference)
    return {
        "compared_with": digest,
        "difference": round(100 * found.mean, 2),
        "difference_ci95": round(100 * found.ci95, 2),
        "p_value": found.p_value,
        "difference_episodes": found.num_episodes,
    }


def _row(plan: EvaluationPlan, measurement: Measurement) -> tuple[dict[str, Any], np.ndarray]:
    """A row of `results.json` without its comparison, and the (E,) accuracies."""
    shape, data, chosen = measurement.shape, plan.data, measurement.chosen
    tasks = measurement.tasks
    episodes = draw_episodes(data.labels, shape, num_episodes=tasks[-1].stop, seed=plan.config.seed)
    parts = [read_predictions(task.uri, [drawn.size for drawn in episodes[task.start : task.stop]]) for task in tasks]
    seconds = np.concatenate([took for _, took, _ in parts])
    facts = parts[0][2]
    right = [is_right(predicted) for found, _, _ in parts for predicted in found]
    report = AccuracyReport(right=right, classes=[data.labels[drawn.queries.reshape(drawn.size)[:, 0]] for drawn in episodes])
    per_class = report.per_class(data.class_names)
    row = {
        "method": chosen.label,
        "source": chosen.method.source,
        "dataset": data.name,
        **_shape_keys(shape, episodes),
        "episodes": len(episodes),
        "accuracy": round(100 * report.mean, 2),
        "ci95": round(100 * report.ci95, 2),
        "macro_accuracy": round(100 * float(np.mean(list(per_class.values()))), 2),
        "per_class": {name: round(100 * value, 2) for name, value in per_class.items()},
        "episode_ms": round(1000 * float(seconds.mean()), 2),
        "images_per_s": round(facts["images_per_s"], 1) if "images_per_s" in facts else None,
        "peak_memory_mib": round(max(found["peak_memory_mib"] for _, _, found in parts)),
        "trained_parameters": round(
            float(np.average([of["trained_parameters"] for _, _, of in parts], weights=[len(took) for _, took, _ in parts]))
        ),
        "gflops_per_episode": round(facts["flops"] / 1e9, 2),
        "seconds": round(facts.get("seconds", float(seconds.sum())), 3),
        "protocol": plan.protocol,
        "digest": measurement.digest,
    }
    return row, report.accuracies


def _shape_keys(shape: TestShape, episodes: Sequence[DrawnEpisode]) -> dict[str, Any]:
    """What a row says of its episodes' shape; of a varying one the means, and the accuracy of guessing."""
    if isinstance(shape, EpisodeShape):
        return {"n_way": shape.n_way, "n_shot": shape.n_shot, "n_query": shape.n_query}
    ways = np.array([drawn.n_way for drawn in episodes])
    shots = np.array([len(drawn.support) for drawn in episodes]) / ways
    return {
        **dict.fromkeys(("n_way", "n_shot", "n_query")),
        "shape": shape.name,
        "mean_way": round(float(ways.mean()), 2),
        "mean_shot": round(float(shots.mean()), 2),
        "chance": round(100 * float((1 / ways).mean()), 2),
    }
