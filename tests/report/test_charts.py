import io
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from lr_ray.report import charts
from lr_ray.report.charts import EpisodeFeatures, accuracy_against_time, embedding_maps, per_class_bars

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib warns where a picture would be a mess

EVIL = "a_b|<c>&%$x"


def opened(png: bytes | None) -> Image.Image:
    assert png is not None
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    return image


def row(method: str, n_shot: int = 1, accuracy: float = 60.0, **changes: Any) -> dict[str, Any]:
    task = {"method": method, "dataset": "digits", "n_way": 5, "n_shot": n_shot, "accuracy": accuracy, "ci95": 1.0}
    return task | {"episode_ms": 90.0, "per_class": {"dolphin": accuracy, "whale": accuracy - 10}} | changes


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures, as they are when they become PNGs."""
    figures: list[Figure] = []
    to_png = charts.to_png

    def keep(figure: Figure) -> bytes:
        figures.append(figure)
        return to_png(figure)

    monkeypatch.setattr(charts, "to_png", keep)
    return figures


def ticks_of(axis: Axes) -> list[str]:
    return [label.get_text() for label in axis.get_yticklabels()]


# ------------------------------------------------------------------------------------------------ accuracy and time


def test_a_panel_a_shape():
    one = opened(accuracy_against_time([row("nn"), row("recycle")])).size
    two = opened(accuracy_against_time([row(method, shot) for method in ("nn", "recycle") for shot in (1, 5)])).size
    assert two == (2 * one[0], one[1])


def test_methods_stand_at_their_time_and_accuracy(drawn: list[Figure]):
    accuracy_against_time([row("nn", episode_ms=12.5), row("recycle", 1, 70.0, episode_ms=3000), row(EVIL)])
    (axis,) = drawn[0].axes
    assert axis.get_xscale() == "log"
    labels: Any = {text.get_text(): text for text in axis.texts}
    assert {name: tuple(label.xy) for name, label in labels.items()} == {
        "nn": (12.5, 60.0),
        "recycle": (3000, 70.0),
        EVIL: (90.0, 60.0),
    }
    assert [labels[name].get_fontweight() for name in ("recycle", "nn")] == ["bold", "normal"]


def test_labels_of_twenty_methods_do_not_cover_each_other(drawn: list[Figure]):
    rng = np.random.default_rng(0)
    accuracy_against_time([row(f"a-method:{i}", 1, rng.uniform(45, 65), episode_ms=rng.uniform(85, 120)) for i in range(20)])
    canvas: Any = FigureCanvasAgg(drawn[0])
    (axis,) = drawn[0].axes
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in axis.texts]
    pairs = [(one, two) for i, one in enumerate(boxes) for two in boxes[:i]]
    assert sum(one.overlaps(two) for one, two in pairs) <= 1
    assert all(drawn[0].bbox.containsx(box.x0) and drawn[0].bbox.containsx(box.x1) for box in boxes)


def test_rows_without_time_are_left_out(drawn: list[Figure]):
    old = {key: value for key, value in row("old").items() if key != "episode_ms"}
    assert accuracy_against_time([old]) is None
    assert accuracy_against_time([]) is None
    accuracy_against_time([old, row("none", episode_ms=None), row("nn"), row("old", 5) | {"episode_ms": None}])
    (axis,) = drawn[0].axes
    assert [text.get_text() for text in axis.texts] == ["nn"]


# --------------------------------------------------------------------------------------------------------- classes


def test_the_class_that_gains_most_is_on_top(drawn: list[Figure]):
    nothing, ours = {"a": 50.0, "b": 50.0, EVIL: 50.0}, {"a": 55.0, "b": 40.0, EVIL: 80.0}
    per_class_bars([row("nn", per_class=nothing), row("recycle", per_class=ours), row("recycle", 5, per_class=nothing)])
    (axis,) = drawn[0].axes
    assert ticks_of(axis) == [EVIL, "a", "b"]
    assert axis.get_ylim()[0] > axis.get_ylim()[1]
    widths = [bar.get_width() for bar in axis.patches]  # type: ignore[attr-defined]
    assert widths == [50.0, 50.0, 50.0, 80.0, 55.0, 40.0]


def test_chance_is_that_of_the_shape(drawn: list[Figure]):
    varying = {"shape": "varying-way varying-shot", "chance": 7.25} | dict.fromkeys(("n_way", "n_shot"))
    per_class_bars([row("nn") | varying, row("recycle", 1)])
    per_class_bars([row("nn")])
    lines: list[Any] = [figure.axes[0].lines[0] for figure in drawn]
    assert [line.get_xdata()[0] for line in lines] == [7.25, 20.0]
    assert len(drawn[0].axes[0].patches) == len(drawn[1].axes[0].patches)


def test_without_recycle_classes_go_by_the_accuracy_of_the_last(drawn: list[Figure]):
    per_class_bars([row("nn", per_class={"a": 10.0, "b": 20.0}), row("other", per_class={"c": 1.0})])
    assert ticks_of(drawn[0].axes[0]) == ["b", "a"]


def test_a_class_that_a_method_lacks_has_no_bar(drawn: list[Figure]):
    per_class_bars([row("nn"), row("recycle"), row("oracle", per_class={"whale": 90.0, "unknown": 1.0})])
    assert len(drawn[0].axes[0].patches) == 5


def test_of_many_classes_the_first_and_last_are_shown(drawn: list[Figure]):
    classes = {f"c{i:03}": float(i) for i in range(41)}
    opened(per_class_bars([row("nn", per_class=dict.fromkeys(classes, 0.0)), row("recycle", per_class=classes)]))
    shown = ticks_of(drawn[0].axes[0])
    assert (len(shown), shown[0], shown[19], shown[20], shown[-1]) == (40, "c040", "c021", "c019", "c000")
    suptitle = drawn[0].get_suptitle()
    assert "the first and last 20 of 41" in suptitle


@pytest.mark.parametrize("rows", [[], [row("other")], [row("nn", per_class=None)], [{**row("nn"), "per_class": {}}]])
def test_without_classes_there_is_no_picture(rows: list[dict[str, Any]]):
    assert per_class_bars(rows) is None


# ------------------------------------------------------------------------------------------------------ embeddings


def episode(n_way: int = 5, each: int = 4, shift: float = 0.0) -> EpisodeFeatures:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(n_way), each)
    features = {name: rng.normal(size=(len(labels), 8)).astype(np.float32) for name in ("nn", "recycle")}
    names = [EVIL, "_hidden", "щ", "W" * 60, "e", *map(str, range(n_way))]
    features["recycle"] += shift * np.arange(len(labels), dtype=np.float32)[:, None]
    support = np.tile(np.arange(each) < 1, n_way)
    return EpisodeFeatures(features=features, labels=labels, class_names=names, support=support)


def test_a_map_is_the_same_twice_and_differs_with_the_features():
    assert embedding_maps(episode()) == embedding_maps(episode()) != embedding_maps(episode(shift=1.0))


def test_support_and_queries_of_each_class_are_drawn(drawn: list[Figure]):
    size = opened(embedding_maps(episode())).size
    assert size[0] > size[1]
    before, after = drawn[0].axes
    for axis in (before, after):
        counts = [len(points.get_offsets()) for points in axis.collections]  # type: ignore[arg-type]
        assert counts == [3, 1] * 5
    assert [text.get_text().strip() for text in drawn[0].legends[0].get_texts()] == [EVIL, "_hidden", "щ", "W" * 27 + "…", "e"]


@pytest.mark.parametrize(("n_way", "each"), [(2, 1), (2, 2), (20, 3)], ids=["two images", "four images", "20 ways"])
def test_any_number_of_images_and_classes(n_way: int, each: int):
    opened(embedding_maps(episode(n_way, each)))


def test_classes_that_share_a_colour_have_other_markers(drawn: list[Figure]):
    embedding_maps(episode(20, 2))
    looks = {
        (tuple(points.get_facecolor()[0]), points.get_paths()[0].vertices.shape)  # type: ignore[index,union-attr]
        for points in drawn[0].axes[0].collections[::2]
    }
    assert len(looks) == 20
