import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from lr_ray.fewshot.episodes import ClassImages
from lr_ray.report import pictures
from lr_ray.report.html import render_report
from lr_ray.report.pictures import _references, accuracy_bars, contact_sheet, grid_bars, masked, training_curves

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib warns where a picture would be a mess

EVIL = '<script>alert("1")</script>&amp;$name'


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    assert min(image.size) > 0
    return image


def row(method: str, n_shot: int = 1, accuracy: float = 60.0, n_way: int = 5) -> dict[str, Any]:
    return {
        "method": method,
        "dataset": "digits[6:10]",
        "n_way": n_way,
        "n_shot": n_shot,
        "accuracy": accuracy,
        "ci95": 1.25,
        "episodes": 600,
        "images_per_s": 123.4,
    }


def adapters_of(*class_names: str, per_class: int = 2, side_px: int = 8) -> list[list[ClassImages]]:
    """An adapter for each string, a class for each of its letters."""
    generator = torch.Generator().manual_seed(0)

    def images_of(name: str, adapter: str, slot: int) -> ClassImages:
        images = torch.randint(0, 256, (per_class, 3, side_px, side_px), dtype=torch.uint8, generator=generator)
        orders = torch.stack([torch.randperm(4, generator=generator) for _ in range(per_class)])
        return ClassImages(name=name, adapter=adapter, slot=slot, images=images, patch_order=orders)

    return [[images_of(name, adapter, slot) for slot, name in enumerate(adapter)] for adapter in class_names]


# ------------------------------------------------------------------------------------------------------- grid_bars


def summary_row(cell: str, method: str, accuracy: float, n_shot: int = 1) -> dict[str, Any]:
    seeds = {"0": accuracy - 1, "1": accuracy + 1}
    spread = {"seeds": seeds, "lowest": accuracy - 1, "highest": accuracy + 1}
    return {**row(method, n_shot, accuracy), "cell": cell, **spread}


def test_a_grid_has_a_bar_for_every_cell_and_method():
    few = [summary_row("references", "nn", 50.0), summary_row("recycle", "recycle", 60.0)]
    many = [*few, summary_row("references", "loras-avg:2", 55.0), summary_row("control: $noise$ <b>", "recycle", 40.0)]
    heights = [opened(grid_bars(rows)).size[1] for rows in (few, many)]
    assert heights[1] > heights[0]
    both = [*few, summary_row("recycle", "recycle", 80.0, n_shot=5)]
    assert opened(grid_bars(both)).size[0] > opened(grid_bars(few)).size[0]


def test_a_bar_is_called_by_its_cell_and_its_method_where_that_stands_in_several(monkeypatch: pytest.MonkeyPatch):
    figures: list[Figure] = []

    def keep(figure: Figure) -> bytes:
        figures.append(figure)
        return b""

    monkeypatch.setattr(pictures, "to_png", keep)
    rows = [
        summary_row(cell, method, 50.0)
        for cell, method in (("refs", "nn"), ("a", "recycle"), ("a", "bpa"), ("b", "recycle"), ("b", "bpa"))
    ]
    grid_bars(rows)
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == ["nn", "a", "a, bpa", "b", "b, bpa"]


def test_the_line_of_the_averaged_loras_is_that_of_their_best_scale():
    rows = [
        summary_row("r", name, value) for name, value in (("loras-avg", 50.0), ("loras-avg:2", 54.0), ("loras-avg:3", 53.0))
    ]
    found = _references([*rows, summary_row("recycle", "recycle", 90.0), summary_row("r", "raw-pixels", 95.0)])
    assert {name: entry["accuracy"] for name, entry in found.items()} == {"loras-avg": 54.0}


# ---------------------------------------------------------------------------------------------------------- masked


def test_masked_keeps_the_kept_patches_and_fades_the_others():
    """2 × 2 patches of 4 px; of the first image patches 3 and 0 are kept, of the second 1 and 2."""
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = masked(images, torch.tensor([[3, 0, 1, 2], [1, 2, 0, 3]]), keep_ratio=0.5)
    corners = [(slice(0, 4), slice(0, 4)), (slice(0, 4), slice(4, 8)), (slice(4, 8), slice(0, 4)), (slice(4, 8), slice(4, 8))]
    for image, result, kept in zip(images.float() / 255, out, [{0, 3}, {1, 2}], strict=True):
        for patch, (rows, columns) in enumerate(corners):
            if patch in kept:
                assert torch.equal(result[:, rows, columns], image[:, rows, columns])
            else:
                tint = torch.tensor([0.09, 0.12, 0.15])[:, None, None]
                assert torch.allclose(result[:, rows, columns], 0.85 + tint * image[:, rows, columns])


def test_masked_tells_black_pixels_from_dropped_ones():
    out = masked(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.tensor([[2, 0, 1, 3]]), keep_ratio=0.25)
    assert out[0, 0].tolist() == [pytest.approx([0.85] * 4)] * 2 + [pytest.approx([0, 0, 0.85, 0.85])] * 2


def test_masked_with_every_patch_kept_changes_nothing():
    images = torch.randint(0, 256, (3, 3, 9, 9), dtype=torch.uint8)
    out = masked(images, torch.arange(9).repeat(3, 1), keep_ratio=1.0)
    assert torch.equal(out, images.float() / 255)


# -------------------------------------------------------------------------------------------------------- pictures


def test_a_contact_sheet_grows_with_its_adapters_and_classes():
    one = opened(contact_sheet(adapters_of("ab"), keep_ratio=0.5)).size
    higher = opened(contact_sheet(adapters_of("ab", "cd"), keep_ratio=0.5)).size
    wider = opened(contact_sheet(adapters_of("abcd"), keep_ratio=0.5)).size
    assert higher[0] == one[0] < wider[0]
    assert higher[1] > one[1] == wider[1]


def test_a_contact_sheet_of_unequal_adapters_and_few_images():
    opened(contact_sheet(adapters_of("ab", "c", per_class=1), keep_ratio=0.5))


@pytest.mark.parametrize("name", ["latin/$", r"$\nothing$", "a_b^c", "щ", "W" * 80])
def test_a_contact_sheet_takes_any_class_name(name: str):
    ((shown,),) = adapters_of("a")
    opened(contact_sheet([[replace(shown, name=name)]], keep_ratio=0.5))


def test_a_picture_is_the_same_twice():
    adapters = adapters_of("a", "b")
    assert contact_sheet(adapters, keep_ratio=0.5) == contact_sheet(adapters, keep_ratio=0.5)
    assert accuracy_bars([row("nn")]) == accuracy_bars([row("nn")])


HISTORY = [{"step": step, "loss": 1 / (step + 1), "accuracy": 0.5} for step in range(25)]
VALIDATED = [entry | ({"validation_accuracy": 0.6} if entry["step"] % 5 == 4 else {}) for entry in HISTORY]


@pytest.mark.parametrize(
    "histories",
    [
        {"recycle": HISTORY},
        {"recycle": VALIDATED, "oracle": VALIDATED},
        {"recycle": VALIDATED[:1]},
        {"recycle": VALIDATED, "oracle": []},
    ],
    ids=["no validation", "two", "one step", "an empty one"],
)
def test_training_curves(histories: dict[str, list[dict[str, float]]]):
    opened(training_curves(histories))


def test_training_curves_show_the_validation():
    assert training_curves({"recycle": HISTORY}) != training_curves({"recycle": VALIDATED})


def test_accuracy_bars_have_a_panel_a_shape():
    one = opened(accuracy_bars([row("nn"), row("recycle")])).size
    two = opened(accuracy_bars([row(method, n_shot) for method in ("nn", "recycle") for n_shot in (1, 5)])).size
    assert two == (2 * one[0], one[1])


def test_a_varying_shape_has_a_panel_too():
    varying = {"shape": "varying-way varying-shot (ways 5-20, max_query 5, max_support 200)", "n_way": None, "n_shot": None}
    bars = [accuracy_bars([row("nn"), row("nn") | varying | {"chance": chance}]) for chance in (5.0, 9.0)]
    assert opened(bars[0]).size[0] == 2 * opened(accuracy_bars([row("nn")])).size[0]
    assert bars[0] != bars[1]
    opened(grid_bars([summary_row("recycle", "nn", 60.0), summary_row("recycle", "nn", 60.0) | varying]))


def test_accuracy_bars_differ_with_the_accuracy():
    assert accuracy_bars([row("nn", accuracy=60)]) != accuracy_bars([row("nn", accuracy=61)])


# ---------------------------------------------------------------------------------------------------------- report


class Page(HTMLParser):
    """What a page refers to, the tags it has, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def report(**changes: Any) -> str:
    values: dict[str, Any] = {
        "name": "demo",
        "rows": [row("nn", accuracy=60), row("recycle", accuracy=72.34), row("nn", 5), row("recycle", 5)],
        "adapters": [{"held_out_accuracy": 0.9}, {"held_out_accuracy": 0.8}, {}],
        "num_images": 120,
        "config": {"name": "demo", "seed": 0},
        "versions": {"torch": "2.9", "ray": "2.50"},
        "pictures": dict.fromkeys(("bars", "time", "classes", "embeddings"), b"chart")
        | {"sheet": b"sheet", "curves": b"curves"},
    }
    return render_report(**values | changes)


def test_a_report_is_self_contained():
    html = report()
    references = Page(html).references
    assert references == [f"data:image/png;base64,{content}" for content in [*["Y2hhcnQ="] * 4, "Y3VydmVz", "c2hlZXQ="]]
    assert html.count("<img alt=") == 6
    assert not re.search(r"url\(|@import|https?://", html)


def test_a_report_states_the_results():
    text = Page(report()).text
    assert "5-way 1-shot tasks of unseen classes: 72.3 % with the meta-LoRA, 60.0 % without it" in text
    assert "120 images, inverted from 3 adapters, 85.0 % accurate on images they did not see" in text
    assert "72.34 ± 1.25" in text
    assert "torch 2.9, ray 2.50" in text
    assert "seed: 0" in text


def test_a_report_without_recycling_or_accuracies_claims_nothing():
    text = Page(report(rows=[row("nn")], adapters=[{}])).text
    assert "with the meta-LoRA" not in text
    assert "inverted from 1 adapters. No real image" in text


def test_only_our_row_is_highlighted():
    html = report()
    assert re.findall(r"<tr class=ours><td>([^<]*)", html) == ["recycle"]


def test_a_report_escapes_html():
    adapters = [{"adapter_id": EVIL, "class_names": [EVIL]}]
    rows = [row(EVIL) | {"source": EVIL, "dataset": EVIL}]
    plain = Page(report(rows=[row("nn") | {"source": "x"}]))
    html = report(name=EVIL, rows=rows, config={EVIL: EVIL}, versions={EVIL: EVIL}, adapters=adapters)
    page = Page(html)
    assert page.tags.count("script") == 0
    assert set(page.tags) == set(plain.tags)
    assert "<script" not in html
    assert page.text.count("alert") >= 10
    assert f"LR-Ray: {EVIL}" in page.text


def test_pictures_that_are_not_there_leave_no_heading():
    html = report(pictures={"bars": b"bars", "sheet": b"sheet", "curves": b"curves"})
    assert html.count("<img") == 3
    assert "Class by class" in report()
    for heading in ("Class by class", "Accuracy and time", "One episode's features"):
        assert heading not in html


def test_a_report_names_the_adapters_and_the_sources_of_the_methods():
    adapters = [{"adapter_id": "a-1", "class_names": [f"class {i}" for i in range(20)], "held_out_accuracy": 0.912}, {}]
    text = Page(report(adapters=adapters, rows=[row("nn") | {"source": "Snell et al."}, row("recycle")])).text
    assert "a-191.2class 0, class 1" in text
    assert "class 11, and 8 more" in text
    assert "unknown" in text
    assert "nnSnell et al." in text
    assert "from" not in Page(report(adapters=[])).text.partition("Where the methods")[2]


def test_very_many_adapters_are_cut():
    text = Page(report(adapters=[{"adapter_id": f"adapter-{i:04}"} for i in range(1000)])).text
    assert text.count("adapter-0") == 100
    assert "and 900 more." in text


def test_a_report_of_rows_of_another_data_set_tells_that_of_the_last():
    old = [row("nn", accuracy=10) | {"dataset": "old"}, row("recycle", accuracy=20) | {"dataset": "old"}]
    text = Page(report(rows=[*old, row("nn", 5, 40.0), row("recycle", 5, 50.0)])).text
    assert "5-way 5-shot tasks of unseen classes: 50.0 % with the meta-LoRA, 40.0 % without it" in text
    assert "recycle (old)" in text
