"""Model cards: Hugging Face's own reader takes them, and they tell what was measured."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from lr_ray.config import ExperimentConfig
from lr_ray.report.card import complete_card, model_card
from lr_ray.storage.adapters import write_adapter
from lr_ray.storage.manifest import read_manifest
from lr_ray.vit.lora import Adapter

CONFIG = ExperimentConfig(name="birds № 7", output="/runs/birds").resolved()


def adapters(count: int, *, stated: str = "") -> list[dict[str, str]]:
    return [{"adapter_id": f"adapter-{i:02}", "digest": f"{i:064x}", "license": stated} for i in range(count)]


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "best_step": 40,
        "validation_accuracy": 0.5625,
        "num_classes": 15,
        "num_images": 300,
        "adapters": adapters(3),
        "kind": "meta_lora",
        "history": [],
        "config": CONFIG,
    } | changes


def manifest(**changes: Any) -> dict[str, Any]:
    inputs = {"backbone": {"digest": "d", "image_px": 42}, "synthetic": ["a.parquet", "b.parquet"], "data": "f" * 64}
    return {"backbone": "embedded", "inputs": inputs, "versions": {"torch": "2.9.1", "timm": "1.0.22"}} | facts(**changes)


def row(method: str, n_shot: int, accuracy: float, **changes: Any) -> dict[str, Any]:
    task = {"dataset": "glyphs[greek/*]", "n_way": 5, "n_shot": n_shot, "n_query": 15, "episodes": 600}
    return {"method": method, "accuracy": accuracy, "ci95": 0.9, "digest": method} | task | changes


ROWS = [row("nn", 1, 58.15), row("nn", 5, 76.81), row("recycle", 1, 78.07), row("recycle", 5, 90.8), row("oracle", 1, 85.41)]


def front_matter(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)---\n", card, re.DOTALL)
    assert found
    metadata: dict[str, Any] = yaml.safe_load(found[1])
    return metadata


def section(card: str, title: str) -> str:
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.fixture
def folder(tmp_path: Path, make_adapter: Any) -> Path:
    """A meta-LoRA on disk, not yet measured."""
    adapter: Adapter = make_adapter()
    write_adapter(str(tmp_path / "meta_lora"), adapter, inputs=manifest()["inputs"], facts=facts(), card=model_card)
    return tmp_path / "meta_lora"


def test_before_it_is_measured_there_is_no_accuracy() -> None:
    card = model_card(manifest())
    assert front_matter(card) == {
        "library_name": "peft",
        "base_model": "timm/vit_small_patch14_dinov2.lvd142m",
        "license": "unknown",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["lora", "meta-lora", "few-shot", "vision-transformer", "lr-ray"],
    }
    assert section(card, "Accuracy").strip() == "Not measured yet; `lr-ray eval` does that."
    assert ModelCard(card).data.eval_results is None


def test_the_numbers_are_those_of_the_results() -> None:
    card = model_card(manifest(), ROWS)
    lines = [line for line in section(card, "Accuracy").splitlines() if "glyphs" in line]
    assert lines == [
        "| `glyphs[greek/*]` | 5-way 1-shot | 600 | 78.07 ± 0.90 | 58.15 ± 0.90 |",
        "| `glyphs[greek/*]` | 5-way 5-shot | 600 | 90.80 ± 0.90 | 76.81 ± 0.90 |",
    ]
    results = ModelCard(card).data.eval_results
    assert [(r.dataset_type, r.dataset_name, r.dataset_config, r.metric_type, r.metric_value) for r in results] == [
        ("glyphs", "glyphs[greek/*]", "5-way 1-shot", "accuracy", 78.07),
        ("glyphs", "glyphs[greek/*]", "5-way 5-shot", "accuracy", 90.8),
    ]
    assert [r.metric_args for r in results] == [{"ci95": 0.9, "episodes": 600}] * 2


def test_nn_stands_beside_only_where_the_same_was_measured() -> None:
    rows = [row("nn", 1, 58.15, dataset="digits"), row("nn", 5, 76.81, n_query=3), row("recycle", 1, 78.07)]
    assert "| 78.07 ± 0.90 |  |" in model_card(manifest(), rows)
    assert "58.15" not in model_card(manifest(), rows)


def test_a_varying_shape_is_a_line_too() -> None:
    varying = {"shape": "varying-way varying-shot"} | dict.fromkeys(("n_way", "n_shot", "n_query"))
    rows = [row("nn", 1, 58.15), row("nn", 1, 40.25) | varying, row("recycle", 1, 50.5) | varying]
    card = model_card(manifest(), rows)
    assert "| `glyphs[greek/*]` | varying-way varying-shot | 600 | 50.50 ± 0.90 | 40.25 ± 0.90 |" in card
    (result,) = ModelCard(card).data.eval_results
    assert (result.task_name, result.dataset_config) == ("varying-way varying-shot classification", "varying-way varying-shot")


def test_an_oracle_tells_its_own_accuracy_and_real_images() -> None:
    card = model_card(manifest(kind="oracle", adapters=[]), ROWS)
    assert "85.41" in section(card, "Accuracy")
    assert "78.07" not in card
    assert "300 images of 15 classes, all real" in section(card, "What it was made of")
    assert front_matter(card)["license"] == "unknown"


@pytest.mark.parametrize(("count", "shown", "rest"), [(20, 20, None), (21, 20, "and 1 more"), (1000, 20, "and 980 more")])
def test_long_lists_of_adapters_are_cut(count: int, shown: int, rest: str | None) -> None:
    made_of = section(model_card(manifest(adapters=adapters(count))), "What it was made of")
    listed = re.findall(r"^\| `(adapter-\d+)` \| `([0-9a-f]{64})` \| `unknown: ask their authors` \|$", made_of, re.MULTILINE)
    assert listed == [(f"adapter-{i:02}", f"{i:064x}") for i in range(shown)]
    assert f"{count} adapters" in made_of
    assert "2 files" in made_of
    assert (rest in made_of) if rest else ("more" not in made_of)


def test_names_of_others_break_no_table() -> None:
    strange = [{"adapter_id": "a|b`c\nd", "digest": "", "license": "my `own`"}]
    made_of = section(model_card(manifest(adapters=strange)), "What it was made of")
    assert "\n| `a\\|b'c d` | `not read` | `my 'own'` |\n" in made_of + "\n"


@pytest.mark.parametrize(
    ("backbone", "base_model", "told"),
    [
        ({"name": "embedded"}, "timm/vit_small_patch14_dinov2.lvd142m", "DINOv2 ViT-S/14 (Apache-2.0, Meta)"),
        ({"name": "vit_base_patch16_clip_224.openai"}, "timm/vit_base_patch16_clip_224.openai", "unknown: ask its authors"),
        (
            {"name": "vit_base_patch16_clip_quickgelu_224.openai"},
            "timm/vit_base_patch16_clip_224.openai",
            "unknown: ask its authors",
        ),
        ({"name": "vit_tiny_patch16_224"}, None, "unknown: ask its authors"),
        ({"name": "embedded", "weights": "/w.safetensors"}, None, "unknown: ask the authors of the weights, `/w.safetensors`"),
        ({"name": "embedded", "pretrained": False}, None, "none, its weights are random"),
    ],
)
def test_the_backbone_is_named_with_its_licence(backbone: dict[str, Any], base_model: str | None, told: str) -> None:
    config = ExperimentConfig.model_validate({"name": "birds", "backbone": backbone}).resolved()
    card = model_card(manifest(config=config))
    assert front_matter(card).get("base_model") == base_model
    assert f"- Backbone: {told}" in section(card, "Licences")


@pytest.mark.parametrize(
    ("made_of", "expected", "told"),
    [
        (adapters(2, stated="Apache-2.0"), "apache-2.0", "2 of 2 state one in their PEFT config."),
        (adapters(2, stated="mit"), "other", "2 of 2 state one in their PEFT config."),
        (
            [*adapters(2, stated="mit"), *adapters(1)],
            "unknown",
            "2 of 3 state one in their PEFT config; the others' are unknown: ask their authors.",
        ),
    ],
)
def test_the_licence_is_that_of_all_it_was_made_of(made_of: list[dict[str, str]], expected: str, told: str) -> None:
    card = model_card(manifest(adapters=made_of))
    assert front_matter(card)["license"] == expected
    assert told in section(card, "Licences")


@pytest.mark.parametrize(
    ("accuracy", "validation", "told"),
    [
        (0.5625, None, "step 40 of at most {steps}, the best on validation episodes: 56.25 % accurate on synthetic images"),
        (0.5625, {"source": "digits"}, "56.25 % accurate on real images"),
        (None, None, "step 40 of at most {steps}, the last; nothing was held out"),
    ],
)
def test_the_best_step_is_told(accuracy: float | None, validation: dict[str, str] | None, told: str) -> None:
    config = ExperimentConfig.model_validate({"name": "birds", "data": {"validation": validation}}).resolved()
    training = section(model_card(manifest(validation_accuracy=accuracy, config=config)), "Training")
    assert told.format(steps=config["training"]["num_steps"]) in training


def test_the_config_can_be_read_back_from_the_card() -> None:
    found = re.search(r"```yaml\n(.*?)```", model_card(manifest()), re.DOTALL)
    assert found
    assert yaml.safe_load(found[1]) == CONFIG
    assert "torch 2.9.1, timm 1.0.22" in model_card(manifest())


def test_completing_is_rendering_again(folder: Path) -> None:
    card = folder / "README.md"
    before = card.read_text(encoding="utf-8")
    found = read_manifest(str(folder))
    assert found is not None
    assert before == model_card(found)

    complete_card(str(folder), ROWS)

    assert card.read_text(encoding="utf-8") == model_card(found, ROWS) != before


def test_the_same_results_leave_the_card_untouched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete_card(str(folder), ROWS)
    before = (folder / "README.md").read_bytes()
    written: list[str] = []
    monkeypatch.setattr("lr_ray.report.card.write_bytes", lambda uri, _content: written.append(uri))

    complete_card(str(folder), [dict(reversed(row.items()), seconds=9.0) for row in ROWS])

    assert not written
    assert (folder / "README.md").read_bytes() == before


@pytest.mark.parametrize("absent", ["README.md", "lr_ray.json", "mark"])
def test_what_is_not_ours_is_left_alone(folder: Path, absent: str) -> None:
    if absent == "mark":
        (folder / "README.md").write_text("# Mine\n")
    else:
        (folder / absent).unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    complete_card(str(folder), ROWS)

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
