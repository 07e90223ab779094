"""Charts of what was measured: accuracy against time, accuracy by class, the features of one episode."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox

from lr_ray.errors import cut
from lr_ray.report.drawing import COLOURS, INK, MUTED, to_png
from lr_ray.report.tables import Row, chance_of, shape_of, shapes_of, wrapped

_SAFE_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")
"""Okabe and Ito's, told apart by the colour-blind; without their yellow, which white swallows."""
_QUERY_MARKERS = "os^DvP"
_MAX_CLASSES = 40
_LABEL_SHIFTS = [
    (radius * np.cos(angle), radius * np.sin(angle))
    for radius in (9, 18, 30, 45, 62, 80)
    for angle in np.pi * np.array([0, 1, 0.25, -0.25, 0.75, -0.75, 0.5, -0.5])
]
"""Places of a label beside its point, in points, the nearest first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeFeatures:
    """One episode, as methods see it; N images, support and queries together.

    Attributes:
        features: {method: (N, D)}, `nn` before the meta-LoRA, `recycle` after.
        labels: (N,) indices of `class_names`.
        support: (N,) bool.
    """

    features: Mapping[str, np.ndarray]
    labels: np.ndarray
    class_names: Sequence[str]
    support: np.ndarray


# ------------------------------------------------------------------------------------------------ accuracy and time


def accuracy_against_time(rows: Sequence[Row]) -> bytes | None:
    """PNG: accuracy with its 95 % confidence interval against the time of an episode, a panel a shape.

    None where no row tells its time.
    """
    timed = [row for row in rows if row.get("episode_ms")]
    if not timed:
        return None
    shapes = shapes_of(timed)
    figure = Figure(figsize=(5.6 * len(shapes), 5.6), dpi=110, layout="constrained")
    labels = []
    for axis, shape in zip(figure.subplots(1, len(shapes), squeeze=False).flat, shapes, strict=True):
        chosen = sorted((row for row in timed if shape_of(row) == shape), key=lambda row: row["method"] not in COLOURS)
        labels.append((axis, chosen, _scatter(axis, chosen)))
        axis.set_title(wrapped(f"{shape} accuracy, %", 60), fontsize=10, loc="left", color=INK)
    canvas: Any = FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # places the axes, which the labels are placed within
    for axis, chosen, annotations in labels:
        _spread(axis, chosen, annotations, canvas.get_renderer())
    return to_png(figure)


def _scatter(axis: Axes, rows: Sequence[Row]) -> list[Annotation]:
    """Points with their labels, these still upon them."""
    annotations = []
    for row in rows:
        method, stands_out = row["method"], row["method"] in COLOURS
        colour, point = COLOURS.get(method, MUTED), (row["episode_ms"], row["accuracy"])
        axis.errorbar(*point, yerr=row["ci95"], fmt="o", color=colour, markersize=8 if stands_out else 5, elinewidth=1)
        annotation = axis.annotate(
            method,
            point,
            (0, 0),
            textcoords="offset points",
            fontsize=8,
            fontweight="bold" if stands_out else "normal",
            color=colour if stands_out else INK,
            ha="center",
            va="center",
            parse_math=False,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3},
        )
        annotation.set_in_layout(False)
        annotations.append(annotation)
    axis.set_xscale("log")
    axis.margins(x=0.22, y=0.1)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:,g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("ms an episode, embedding included")
    axis.grid(color="#e6e6ee", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return annotations


def _spread(axis: Axes, rows: Sequence[Row], annotations: Sequence[Annotation], renderer: Any) -> None:
    """Put each label where it covers the least of points, bars and the labels before it, as near as that allows."""
    points = axis.transData.transform([annotation.xy for annotation in annotations])
    tops = axis.transData.transform([(row["episode_ms"], row["accuracy"] + row["ci95"]) for row in rows])[:, 1]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in points]
    taken += [Bbox.from_bounds(x - 2, 2 * y - top, 4, 2 * (top - y)) for (x, y), top in zip(points, tops, strict=True)]
    scale = renderer.dpi / 72
    for (x, y), annotation in zip(points, annotations, strict=True):
        size = Text.get_window_extent(annotation, renderer).size
        boxes = [_box_beside(x, y, dx * scale, dy * scale, *size) for dx, dy in _LABEL_SHIFTS]
        costs = [
            _covered(box, taken, axis.bbox) + 2 * np.hypot(*shift) for box, shift in zip(boxes, _LABEL_SHIFTS, strict=True)
        ]
        placed = boxes[int(np.argmin(costs))]
        taken.append(placed)
        annotation.set_position(((placed.x0 + placed.x1 - 2 * x) / 2 / scale, (placed.y0 + placed.y1 - 2 * y) / 2 / scale))


def _box_beside(x: float, y: float, dx: float, dy: float, width: float, height: float) -> Bbox:
    """Of a label whose nearest edge is shifted by (dx, dy) from the point."""
    left = x + dx - width * (0.5 if abs(dx) < 1 else 0 if dx > 0 else 1)
    return Bbox.from_bounds(left, y + dy - height / 2, width, height)


def _covered(box: Bbox, taken: Sequence[Bbox], frame: Bbox) -> float:
    """Area of other boxes that it covers, and ten times its area outside the frame."""
    inside = Bbox.intersection(box, frame)
    outside = box.width * box.height - (inside.width * inside.height if inside else 0)
    both = [Bbox.intersection(box, other) for other in taken]
    return 10 * outside + sum(overlap.width * overlap.height for overlap in both if overlap)


# --------------------------------------------------------------------------------------------------------- classes


def per_class_bars(rows: Sequence[Row]) -> bytes | None:
    """PNG: accuracy by class on the first shape, the class that gains most by `recycle` over `nn` on top.

    Of more than 40 classes those that gain most and least. None where no row of these methods has classes.
    """
    shape = shape_of(rows[0]) if rows else None
    found = {row["method"]: row["per_class"] for row in rows if shape_of(row) == shape and row.get("per_class")}
    shown = {method: found[method] for method in ("nn", "recycle", "oracle") if method in found}
    if shape is None or not shown:
        return None
    order, title = _ordered_classes(shown)
    figure = Figure(figsize=(8.5, 0.2 * len(order) * len(shown) / 2 + 0.22 * len(order) + 1.2), dpi=110, layout="constrained")
    axis = figure.subplots()
    height = 0.8 / len(shown)
    for i, (method, accuracies) in enumerate(shown.items()):
        present = [(position, accuracies[name]) for position, name in enumerate(order) if name in accuracies]
        positions = [position - 0.4 + height * (i + 0.5) for position, _ in present]
        axis.barh(positions, [value for _, value in present], height, color=COLOURS.get(method, MUTED), label=method)
    axis.axvline(chance_of(rows[0]), color=INK, linestyle=":", linewidth=0.8, label="chance")
    axis.set_yticks(range(len(order)), [_short(name) for name in order], fontsize=8, parse_math=False)
    axis.set_ylim(len(order) - 0.4, -0.6)
    axis.set_xlim(0, 100)
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{shape} accuracy by class, %{title}", fontsize=10, color=INK)
    figure.legend(loc="outside lower center", ncols=len(shown) + 1, frameon=False, fontsize=8)
    return to_png(figure)


def _ordered_classes(shown: Mapping[str, Mapping[str, float]]) -> tuple[list[str], str]:
    """Classes by gain, or by the accuracy of the last method where there is none to tell; what the title says of it."""
    ours, nothing = shown.get("recycle"), shown.get("nn")
    if ours is not None and nothing is not None:
        gains = {name: ours[name] - nothing[name] for name in ours if name in nothing}
        title = ", by gain of recycle over nn"
    else:
        gains, title = dict(list(shown.values())[-1]), ""
    order = sorted(gains, key=lambda name: (-gains[name], name))
    if len(order) <= _MAX_CLASSES:
        return order, title
    half = _MAX_CLASSES // 2
    return order[:half] + order[-half:], f"{title}: the first and last {half} of {len(order)}"


# ------------------------------------------------------------------------------------------------------ embeddings


def embedding_maps(episode: EpisodeFeatures) -> bytes:
    """PNG: t-SNE of one episode by each method, support as stars, queries as dots."""
    titles = {"nn": "nn: before the meta-LoRA", "recycle": "recycle: after it"}
    count = len(episode.features)
    figure = Figure(figsize=(5.0 * count, 5.0), dpi=110, layout="constrained")
    for axis, (method, found) in zip(figure.subplots(1, count, squeeze=False).flat, episode.features.items(), strict=True):
        _draw_classes(axis, _tsne(found), episode.labels, episode.support, episode.class_names)
        axis.set_title(titles.get(method, method), fontsize=10, loc="left", color=INK, parse_math=False)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("#d8d8e0")
    handles, names = figure.axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)), frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.suptitle("t-SNE of one episode's features: stars are support images, dots queries", fontsize=10, color=INK)
    return to_png(figure)


def _tsne(features: np.ndarray) -> np.ndarray:
    """(N, D) → (N, 2), the same each time."""
    from sklearn.manifold import TSNE

    perplexity = max(1.0, min(30.0, (len(features) - 1) / 3))
    tsne = TSNE(perplexity=perplexity, init="pca", method="exact" if len(features) <= 500 else "barnes_hut", random_state=0)
    placed: np.ndarray = tsne.fit_transform(np.asarray(features, dtype=np.float32))
    return placed


def _draw_classes(axis: Axes, placed: np.ndarray, labels: np.ndarray, support: np.ndarray, class_names: Sequence[str]) -> None:
    for i, label in enumerate(np.unique(labels)):
        colour = _SAFE_COLOURS[i % len(_SAFE_COLOURS)]
        marker = _QUERY_MARKERS[i // len(_SAFE_COLOURS) % len(_QUERY_MARKERS)]
        queries, shots = placed[(labels == label) & ~support], placed[(labels == label) & support]
        name = _short(class_names[label])  # after a space in the legend, which leaves out what begins with _
        axis.scatter(
            queries[:, 0],
            queries[:, 1],
            s=26,
            color=colour,
            marker=marker,
            alpha=0.75,
            linewidth=0,
            label=f" {name}",
        )
        axis.scatter(shots[:, 0], shots[:, 1], s=190, color=colour, marker="*", edgecolor=INK, linewidth=0.8, zorder=3)


def _short(name: str) -> str:
    """A class name on one line, with room for the picture."""
    return cut(" ".join(name.split()), 28)
