"""What people would rather see than read: synthetic images with their masks, training curves, accuracies."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lr_ray.fewshot.episodes import ClassImages
from lr_ray.report.drawing import COLOURS, INK, MUTED, PALE, to_png
from lr_ray.report.tables import chance_of, shape_of, shapes_of, wrapped
from lr_ray.vit.tokens import num_kept

_TILE, _GAP, _LABEL, _HEADER, _NARROWEST = 1.0, 0.04, 0.3, 0.4, 7.5
"""Of a contact sheet, in inches: an image with its margins, a margin, a class's name, the title, what that needs."""
_ROW = _LABEL + 2 * _TILE + 0.1


def masked(images: Tensor, patch_order: Tensor, *, keep_ratio: float) -> Tensor:
    """Images whose less attended patches are faded to a light tint.

    Args:
        images: (B, 3, H, W) uint8.
        patch_order: (B, P) most attended first, P a square.
        keep_ratio: share of the patches left as they are.

    Returns:
        (B, 3, H, W) floats in [0, 1].
    """
    num_patches = patch_order.shape[1]
    side = math.isqrt(num_patches)
    keep = torch.zeros(len(images), num_patches)
    keep.scatter_(1, patch_order[:, : num_kept(num_patches, keep_ratio)], 1.0)
    mask = torch.nn.functional.interpolate(keep.view(-1, 1, side, side), size=images.shape[-2:], mode="nearest")
    faded = 0.85 + 0.15 * images.float() / 255 * torch.tensor([0.6, 0.8, 1.0])[:, None, None]
    return torch.where(mask.bool(), images.float() / 255, faded)


def contact_sheet(adapters: Sequence[Sequence[ClassImages]], *, keep_ratio: float, images_per_class: int = 2) -> bytes:
    """PNG: a row an adapter, and for each of its classes a few images, each above its masked self."""
    columns = max(map(len, adapters)) * images_per_class
    width, height = max(_TILE * columns, _NARROWEST), _ROW * len(adapters) + _HEADER
    figure = Figure(figsize=(width, height), dpi=110)
    axis = figure.add_axes((0, 0, 1, 1))  # one for all, for an axis costs more than its image
    axis.axis("off")
    for row, classes in enumerate(adapters):
        for slot, shown in enumerate(classes):
            images, orders = shown.images[:images_per_class], shown.patch_order
            assert orders is not None
            pairs = zip(images.float() / 255, masked(images, orders[:images_per_class], keep_ratio=keep_ratio), strict=True)
            left, top = _TILE * slot * images_per_class, _HEADER + _ROW * row
            axis.text(left + _GAP, top + _LABEL - _GAP, shown.name[:20], fontsize=9, color=INK, va="bottom", parse_math=False)
            for column, pair in enumerate(pairs):
                for half, image in enumerate(pair):
                    x, y = left + _TILE * column, top + _LABEL + _TILE * half
                    sides = (x + _GAP, x + _TILE - _GAP, y + _TILE - _GAP, y + _GAP)
                    axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest", extent=sides)
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    title = f"Synthetic images, a row an adapter; below each the {100 * keep_ratio:.0f} % of patches that [CLS] attends to most"
    axis.text(width / 2, _HEADER / 2, title, fontsize=10, color=INK, ha="center", va="center", wrap=True)
    return to_png(figure)


def training_curves(histories: dict[str, Sequence[dict[str, float]]]) -> bytes:
    """PNG: loss and accuracy on the training episodes, smoothed, and validation accuracy, by step."""
    figure = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
    loss_axis, accuracy_axis = figure.subplots(1, 2)
    for name, history in histories.items():
        colour = COLOURS.get(name, MUTED)
        steps = [entry["step"] for entry in history]
        loss_axis.plot(steps, _smoothed([entry["loss"] for entry in history]), color=colour, label=name)
        accuracy_axis.plot(steps, _smoothed([entry["accuracy"] for entry in history]), color=colour, label=f"{name}, training")
        validated = [entry for entry in history if "validation_accuracy" in entry]
        if validated:
            accuracy_axis.plot(
                [entry["step"] for entry in validated],
                [entry["validation_accuracy"] for entry in validated],
                "o--",
                color=colour,
                markersize=4,
                label=f"{name}, validation",
            )
    for axis, title in ((loss_axis, "loss of the training episodes"), (accuracy_axis, "accuracy")):
        axis.set_title(title, fontsize=10, loc="left", color=INK)
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    return to_png(figure)


def accuracy_bars(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG: accuracy of each method with its 95 % confidence interval, a panel a shape."""
    shapes = shapes_of(rows)
    figure = Figure(figsize=(4.6 * len(shapes), 0.42 * len(rows) / len(shapes) + 1.1), dpi=110, layout="constrained")
    for axis, shape in zip(figure.subplots(1, len(shapes), squeeze=False).flat, shapes, strict=True):
        chosen = [row for row in rows if shape_of(row) == shape][::-1]
        names, values = [row["method"] for row in chosen], [row["accuracy"] for row in chosen]
        colours = [COLOURS.get(name, MUTED) for name in names]
        axis.barh(range(len(names)), values, xerr=[row["ci95"] for row in chosen], color=colours, ecolor=INK, height=0.65)
        axis.set_yticks(range(len(names)), names, parse_math=False)
        axis.set_ylim(-0.6, len(names) - 0.4)
        for position, row in enumerate(chosen):
            axis.text(row["accuracy"] + row["ci95"] + 0.8, position, f"{row['accuracy']:.1f}", va="center", fontsize=8)
        axis.axvline(chance_of(chosen[-1]), color=INK, linestyle=":", linewidth=0.8)
        axis.set_xlim(0, 108)
        axis.set_title(wrapped(f"{shape} accuracy, % (dotted: chance)", 52), fontsize=10, loc="left", color=INK)
        axis.spines[["top", "right"]].set_visible(False)
    return to_png(figure)


def grid_bars(summary: Sequence[dict[str, Any]]) -> bytes:
    """PNG: a bar for each cell and method, the mean over the seeds with its 95 % confidence interval, a dot for each seed.

    A bar is called by its cell, and by its method too where that stands in several cells; `recycle` is understood. Dashed
    lines carry the best of each other method but `raw-pixels` across the bars.
    """
    shapes = shapes_of(summary)
    bars = list(dict.fromkeys((row["cell"], row["method"]) for row in summary))
    cells_of = Counter(method for _, method in bars)
    labels = [
        cell if method == "recycle" else method if cells_of[method] == 1 else f"{cell}, {method}" for cell, method in bars
    ]
    figure = Figure(figsize=(2.2 + 3.9 * len(shapes), 0.3 * len(bars) + 1.0), dpi=110, layout="constrained")
    for axis, shape in zip(figure.subplots(1, len(shapes), squeeze=False, sharey=True).flat, shapes, strict=True):
        found = {(row["cell"], row["method"]): row for row in summary if shape_of(row) == shape}
        for position, bar in enumerate(bars):
            if bar not in found:
                continue
            row = found[bar]
            colour = PALE if bar[1] == "recycle" and bar[0] != "recycle" else COLOURS.get(bar[1], MUTED)
            axis.barh(position, row["accuracy"], xerr=row["ci95"], color=colour, ecolor=INK, height=0.65)
            seeds = list(row["seeds"].values())
            axis.plot(seeds, [position] * len(seeds), ".", color=INK, markersize=3)
            axis.text(
                max(row["highest"], row["accuracy"] + row["ci95"]) + 0.6,
                position,
                f"{row['accuracy']:.1f}",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )
        lowest, highest = (pick(row[end] for row in found.values()) for pick, end in ((min, "lowest"), (max, "highest")))
        axis.set_xlim(max(0, lowest - 6), min(104, highest + 6))
        axis.set_yticks(range(len(bars)), labels, fontsize=8, parse_math=False)
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.set_title(wrapped(f"{shape} accuracy, %", 44), fontsize=10, loc="left", color=INK)
        axis.spines[["top", "right"]].set_visible(False)
        for method, row in _references(found.values()).items():
            axis.axvline(row["accuracy"], color=COLOURS.get(method, INK), linestyle="--", linewidth=0.8)
    return to_png(figure)


def _references(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The best row of each method but `recycle` and `raw-pixels`, all scales of `loras-avg` together."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        method = row["method"].partition(":")[0]
        if method not in ("recycle", "raw-pixels") and row["accuracy"] > best.get(method, row)["accuracy"] - 1e-9:
            best[method] = row
    return best


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """Mean over the last tenth of the curve's length at each point."""
    if not values:
        return np.zeros(0)
    window = max(1, len(values) // 10)
    padded = np.concatenate([np.full(window - 1, values[0]), values])
    return np.convolve(padded, np.ones(window) / window, mode="valid")
