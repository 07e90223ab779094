"""Every step on Ray: what is finished stays, what is asked again does nothing, what is damaged is named."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lr_ray.cli.main import app
from safetensors.torch import load_file
from typer.testing import CliRunner

import lr_ray
from lr_ray.config import ExperimentConfig, load_config
from lr_ray.data.images import DataConfig
from lr_ray.data.load import load_data
from lr_ray.errors import AdapterError, ClusterError, DataError, EpisodeError, StorageError
from lr_ray.fewshot.distill import StreamConfig
from lr_ray.fewshot.episodes import EpisodeShape, draw_test_episodes
from lr_ray.fewshot.evaluate import episode_accuracies
from lr_ray.fewshot.relations import RelationsConfig, directions
from lr_ray.report.progress import Reporter
from lr_ray.runtime import training
from lr_ray.runtime.inversion import invert_library
from lr_ray.runtime.relations import relation_targets, see_with_every_adapter
from lr_ray.runtime.training import train_meta_lora
from lr_ray.runtime.training_job import meta_lora_job
from lr_ray.runtime.tuning import tune_library
from lr_ray.storage.adapters import list_adapters, read_adapter
from lr_ray.storage.synthetic import list_synthetic
from lr_ray.vit.backbone import load_backbone
from tests.jobs import QUIET, changed, snapshot

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_whole_job_through_the_command_line(local_run: tuple[Path, list[dict[str, Any]]]) -> None:
    path, rows = local_run
    root = path.parent / "run"
    assert [row["method"] for row in rows] == ["raw-pixels", "nn", "loras-avg", "recycle", "oracle"]
    assert rows == json.loads((root / "results.json").read_text())
    assert all(0 <= row["accuracy"] <= 100 and row["episodes"] == 20 and row["seconds"] > 0 for row in rows)
    assert (root / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")
    assert "meta-LoRA" in (root / "report.html").read_text()
    assert len(list((root / "meta_lora" / "tensorboard").iterdir())) == 1
    assert [row["difference"] is None for row in rows] == [False, False, False, True, False]
    assert rows[4]["difference"] == pytest.approx(rows[4]["accuracy"] - rows[3]["accuracy"], abs=0.011)
    nn, recycle, oracle = (f"{row['accuracy']:.2f} ± {row['ci95']:.2f}" for row in (rows[1], rows[3], rows[4]))
    card = (root / "meta_lora" / "README.md").read_text()
    assert f"| 20 | {recycle} | {nn} |" in card
    assert all(f"`{read_adapter(folder).spec.digest}`" in card for folder in list_adapters(str(root / "adapters")))
    assert f"| 20 | {oracle} | {nn} |" in (root / "oracle" / "README.md").read_text()
    before = {name: content for name, content in snapshot(str(root)).items() if "report" not in name and "sheet" not in name}

    again = CliRunner().invoke(app, ["run", str(path), "--json"], catch_exceptions=False)

    after = snapshot(str(root))
    assert json.loads(again.stdout) == rows
    assert {name: after[name][1] for name in before} == {name: content for name, (_, content) in before.items()}
    adapters_and_images = [name for name in before if name.endswith((".safetensors", ".parquet"))]
    assert all(after[name][0] == before[name][0] for name in adapters_and_images)

    (root / "report.html").unlink()
    drawn = CliRunner().invoke(app, ["report", "-c", str(path), "--json"], catch_exceptions=False)

    assert str(root / "report.html") in json.loads(drawn.stdout)
    assert all(Path(file).stat().st_size for file in json.loads(drawn.stdout))
    (root / "results.json").write_text("[")
    damaged = CliRunner().invoke(app, ["report", "-c", str(path)])
    assert isinstance(damaged.exception, StorageError)
    (root / "results.json").write_text(json.dumps(rows))


def test_a_trained_meta_lora_loads_and_gives_the_accuracy_of_its_evaluation(
    local_run: tuple[Path, list[dict[str, Any]]],
) -> None:
    path, rows = local_run
    config = load_config(path)
    assert config.data.test is not None
    data, (shape,) = load_data(config.data.test), config.evaluation.shapes
    episodes = draw_test_episodes(data.labels, shape, num_episodes=config.evaluation.episodes, seed=config.seed)
    for folder, method in ((config.meta_lora_root, "recycle"), (config.oracle_root, "oracle")):
        features = lr_ray.load(folder).embed(data.pixels(range(len(data)), 32))
        (row,) = (row for row in rows if row["method"] == method)
        assert round(100 * float(episode_accuracies(features, episodes, shape).mean()), 2) == row["accuracy"]


def test_adapters_know_their_classes_and_accuracy(tiny_experiment: ExperimentConfig) -> None:
    manifests = tune_library(tiny_experiment, QUIET)

    folders = list_adapters(tiny_experiment.adapters_root)
    assert len(folders) == len(manifests) == 3
    for folder, manifest in zip(folders, manifests, strict=True):
        adapter = read_adapter(folder)
        assert list(adapter.spec.class_names) == manifest["class_names"]
        assert set(manifest["class_names"]) <= set("012345")
        assert adapter.spec.digest == manifest["tensors_digest"]
        assert 0 <= manifest["held_out_accuracy"] <= 1
        assert manifest["config"]["tuning"]["num_steps"] == 3


def test_more_adapters_of_the_same_library_add_to_it(tiny_experiment: ExperimentConfig) -> None:
    tune_library(changed(tiny_experiment, tuning={"num_adapters": 1}), QUIET)
    before = snapshot(tiny_experiment.adapters_root)

    tune_library(tiny_experiment, QUIET)

    after = snapshot(tiny_experiment.adapters_root)
    assert len(list_adapters(tiny_experiment.adapters_root)) == 3
    assert before == {name: after[name] for name in before}


def test_fewer_adapters_than_there_are_is_refused(library: ExperimentConfig) -> None:
    before = snapshot(library.adapters_root)

    with pytest.raises(
        StorageError, match=r"holds 2 adapters, such as task-0001-.*, that tuning.num_adapters 1 does not ask for"
    ):
        tune_library(changed(library, tuning={"num_adapters": 1}), QUIET)

    assert snapshot(library.adapters_root) == before


def test_tuning_again_with_another_config_is_refused(tiny_experiment: ExperimentConfig) -> None:
    tune_library(tiny_experiment, QUIET)
    before = snapshot(tiny_experiment.adapters_root)

    with pytest.raises(StorageError, match=r"holds another run's results \(tuning.num_steps was 3, now 5\)"):
        tune_library(changed(tiny_experiment, tuning={"num_steps": 5}), QUIET)

    assert snapshot(tiny_experiment.adapters_root) == before


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"n_way": 7}, "n_way 7: digits.* has 6 classes"),
        ({"held_out_per_class": 500}, "has 1[0-9][0-9] images, but tuning.held_out_per_class takes 500"),
    ],
)
def test_too_little_data_to_tune_on(tiny_experiment: ExperimentConfig, tuning: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tune_library(changed(tiny_experiment, tuning=tuning), QUIET)


@pytest.mark.slow
def test_two_training_workers_agree_with_one_also_when_to_stop(inverted: ExperimentConfig, tmp_path: Path) -> None:
    shared = {"adapters": inverted.adapters_root, "synthetic": inverted.synthetic_root}
    found, ends = [], []
    for num_workers in (1, 2):
        config = inverted.model_copy(update={**shared, "output": str(tmp_path / f"workers-{num_workers}")})
        training = {"num_steps": 20, "episodes_per_step": 2, "num_workers": num_workers, "precision": "fp32"}
        config = changed(config, training={**training, "ema": 0.5, "validate_every": 1, "patience": 2})
        manifest = train_meta_lora(config, QUIET)
        found.append(read_adapter(config.meta_lora_root).updates())
        ends.append((manifest["best_step"], len(manifest["history"])))

    assert ends[0] == ends[1]
    assert 0 < ends[0][0] == ends[0][1] - 2 < 18
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


def test_features_of_every_adapter_are_committed_once(inverted: ExperimentConfig) -> None:
    files = list_synthetic(inverted.synthetic_root)
    first, *others = see_with_every_adapter(inverted, files, QUIET)
    before = snapshot(f"{inverted.output_root}/relations")
    Path(others[0]).unlink()

    assert list(see_with_every_adapter(inverted, files, QUIET)) == [first, *others]

    after = snapshot(f"{inverted.output_root}/relations")
    assert {name: content for name, (_, content) in after.items()} == {name: content for name, (_, content) in before.items()}
    assert after[first] == before[first]
    grid_size = load_backbone(inverted.backbone).model.patch_embed.grid_size
    targets = relation_targets(inverted, files, [first, *others], grid_size)
    assert len(targets.images) == len(targets.features) == 2 * 3 * 3 * 4
    assert targets.keep_indices is not None
    concatenated = torch.cat([directions(load_file(uri)["features"].float()) for uri in (first, *others)], dim=1)
    exact = torch.cdist(concatenated, concatenated)
    torch.testing.assert_close(torch.cdist(targets.features, targets.features), exact, rtol=0.1, atol=1e-3 * float(exact.max()))

    Path(first).write_bytes(b"damaged")
    with pytest.raises(StorageError, match=r"features .*damaged.*delete the file"):
        relation_targets(inverted, files, [first, *others], grid_size)


@pytest.mark.slow
def test_a_torn_record_of_checkpoints_is_begun_anew_and_a_torn_checkpoint_is_told(
    inverted: ExperimentConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kills leave them: Ray Train writes its record in place."""
    config = changed(inverted, training={"num_steps": 2, "validate_every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_adapter", Mock(side_effect=StorageError("killed")))
        with pytest.raises(StorageError, match="killed"):
            train_meta_lora(config, QUIET)
    (record,) = Path(config.meta_lora_root, "training").rglob("checkpoint_manager_snapshot.json")
    (checkpoint,) = record.parent.rglob("state.safetensors")
    whole = checkpoint.read_bytes()

    checkpoint.write_bytes(whole[:100])
    with pytest.raises(StorageError, match=r"checkpoint in .*/training is damaged .*; delete that folder to start over"):
        train_meta_lora(config, QUIET)
    record.write_bytes(b"")
    train_meta_lora(config, Reporter())

    assert "which tells the checkpoints, is damaged; beginning anew" in capsys.readouterr().err
    assert Path(config.meta_lora_root, "adapter_config.json").exists()


def test_classes_that_are_read_by_the_file_and_validation_are_checked_before_training(inverted: ExperimentConfig) -> None:
    backbone = load_backbone(inverted.backbone)
    parts = changed(inverted, inversion={"classes_per_item": 2})
    parts = parts.model_copy(update={"synthetic": f"{inverted.output_root}/parts"})
    invert_library(parts, QUIET)
    three_ways = {"episode": EpisodeShape(n_way=3, n_shot=1, n_query=2), "holdout_adapters": 0}
    meta_lora_job(changed(parts, training=three_ways), backbone)
    small = StreamConfig(buffer_classes=6)
    with pytest.raises(EpisodeError, match="9 classes are read by the file, 2 at most, since .*buffer_classes is 6"):
        meta_lora_job(changed(parts, training={**three_ways, "stream": small}), backbone)

    one = changed(inverted, data={"validation": DataConfig(source="digits", classes=("6",))})
    with pytest.raises(EpisodeError, match="data.validation has the class '6' alone, but validation needs two"):
        meta_lora_job(one, backbone)
    few = {"episode": EpisodeShape(n_way=2, n_shot=1, n_query=2)}
    many = changed(inverted, data={"validation": DataConfig(source="digits", classes=("6:8",))}, training=few)
    meta_lora_job(many, backbone)


def test_errors_before_and_inside_training(inverted: ExperimentConfig) -> None:
    with pytest.raises(StorageError, match="no Parquet files; run `lr-ray invert` first"):
        train_meta_lora(inverted.model_copy(update={"synthetic": f"{inverted.output_root}/absent"}), QUIET)
    images = Path(inverted.synthetic_root, list_synthetic(inverted.synthetic_root)[0])
    stale = images.with_name("removed-0123456789ab.parquet")
    stale.write_bytes(images.read_bytes())
    with pytest.raises(
        StorageError, match=r"removed-0123456789ab.parquet are of an adapter that .* does not hold; remove the file"
    ):
        train_meta_lora(inverted, QUIET)
    stale.unlink()
    with pytest.raises(EpisodeError, match="holdout_adapters 3 of 3"):
        train_meta_lora(changed(inverted, training={"holdout_adapters": 3}), QUIET)
    shape = inverted.training.episode.model_copy(update={"n_query": 15})
    with pytest.raises(EpisodeError, match="4 images, but 1 shots and 15 queries need 16"):
        train_meta_lora(changed(inverted, training={"episode": shape}), QUIET)
    crowd = {"num_workers": 3, "episodes_per_step": 3}
    with pytest.raises(ClusterError, match=r"training.num_workers 3: there is room for 2 workers of 1 CPU each; lower it"):
        train_meta_lora(changed(inverted, training=crowd), QUIET)
    larger = inverted.model_copy(update={"backbone": inverted.backbone.model_copy(update={"image_px": 64})})
    with pytest.raises(AdapterError, match=r"was tuned on images of 32 px, not 64 px; set backbone.image_px to 32"):
        train_meta_lora(larger, QUIET)
    with pytest.raises(StorageError, match=r"were made with a backbone of image_px 32, but the config's has 64; correct"):
        train_meta_lora(changed(larger, training={"init_scale": 0.0, "relations": RelationsConfig()}), QUIET)
    assert not Path(inverted.meta_lora_root, "training").exists()


@pytest.mark.slow
def test_what_one_of_two_workers_cannot_do_ends_the_training(inverted: ExperimentConfig) -> None:
    """The first alone reads the images to validate on; the other waits for it."""
    held_out = Path(inverted.synthetic_root, list_synthetic(inverted.synthetic_root)[-1])
    content = bytearray(held_out.read_bytes())
    content[200:1200] = bytes(1000)
    held_out.write_bytes(content)
    training = {"holdout_adapters": 1, "num_workers": 2, "episodes_per_step": 2}

    with pytest.raises(StorageError, match=held_out.name):
        train_meta_lora(changed(inverted, training=training, ray={"max_failures": 0}), QUIET)


@pytest.mark.slow
def test_what_a_loader_cannot_do_is_said_as_it_is(inverted: ExperimentConfig) -> None:
    relations = inverted.training.relations.model_copy(update={"share": 1.0, "batch_size": 10_000})
    with pytest.raises(EpisodeError, match=r"relations.batch_size"):
        train_meta_lora(changed(inverted, training={"relations": relations}), QUIET)
