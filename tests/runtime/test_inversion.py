"""Inversion on Ray: exactly once, whatever is lost on the way; what is damaged is named and the rest is done."""

import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lr_ray.cli.main import app
from ray import cloudpickle
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lr_ray
from lr_ray.config import ExperimentConfig
from lr_ray.errors import AdapterError, ClusterError, ConfigError, InversionError, StorageError
from lr_ray.fewshot.relations import RelationsConfig
from lr_ray.report.progress import UnderWay
from lr_ray.runtime import inversion
from lr_ray.runtime.board import Board, start_board
from lr_ray.runtime.inversion import InversionActor, PartialFile, invert_library
from lr_ray.runtime.inversion_plan import inspect_library, plan_inversion
from lr_ray.runtime.session import actor_pool
from lr_ray.runtime.training import train_meta_lora
from lr_ray.runtime.tuning import tune_library
from lr_ray.storage.adapters import list_adapters, read_adapters
from lr_ray.storage.synthetic import list_synthetic, read_pool
from tests.jobs import QUIET, changed, kill_worker, snapshot

pytestmark = pytest.mark.usefixtures("ray_cluster")


def undisturbed(config: ExperimentConfig, folder: Path) -> dict[str, bytes]:
    """The files of a set that nothing happens to."""
    other = config.model_copy(update={"synthetic": str(folder)})
    return {Path(uri).name: Path(uri).read_bytes() for uri in invert_library(other, QUIET).uris}


def files_of(config: ExperimentConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.synthetic_root).iterdir() if path.name != "claim.json"}


@pytest.mark.slow
def test_an_inversion_goes_on_where_its_killed_actor_saved_it(library: ExperimentConfig, tmp_path: Path) -> None:
    config = changed(library, inversion={"num_steps": 100}, ray={"max_actors": 1, "checkpoint_every_s": 0.05})

    job = threading.Thread(target=lambda: invert_library(config, QUIET))
    job.start()
    while not list(Path(config.synthetic_root).glob("*.partial")):
        job.join(timeout=0.05)
        assert job.is_alive()
    kill_worker("InversionActor")
    job.join()

    assert files_of(config) == undisturbed(config, tmp_path / "twin")


def test_a_saved_state_that_is_damaged_and_one_that_is_left_over(inverted: ExperimentConfig) -> None:
    first, second, _ = plan_inversion(inverted).items
    kept = files_of(inverted)
    Path(first.uri).unlink()
    Path(second.uri + ".partial").write_bytes(b"left over")
    Path(first.uri + ".partial").write_bytes(b"damaged")

    with pytest.raises(InversionError, match=r"\.partial: damaged .* delete it and run again"):
        invert_library(inverted, QUIET, strict=True)
    Path(first.uri + ".partial").unlink()
    invert_library(inverted, QUIET)

    assert files_of(inverted) == kept


def test_a_partial_file_keeps_the_last_state(tmp_path: Path) -> None:
    uri = str(tmp_path / "a.partial")
    file = PartialFile(uri, every_s=1e-9)
    assert file.load() is None
    for step in (1, 2):
        assert file.due()
        file.save({"step": torch.tensor(step)})
    assert not PartialFile(uri, every_s=1e9).due()
    again = PartialFile(uri, every_s=1)
    assert again.load() == load_safetensors(Path(uri).read_bytes()) == {"step": torch.tensor(2)}
    again.delete()
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_many_classes_is_several_pieces_of_work(library: ExperimentConfig) -> None:
    whole = changed(library, inversion={"classes_per_item": 3})
    config = changed(library, inversion={"classes_per_item": 2})
    items = plan_inversion(config).items
    assert [item.classes for item in items] == [(0,), (1, 2)] * 3
    assert len({item.seed for item in items}) == len({item.uri for item in items}) == 6

    assert invert_library(config, QUIET).uris == tuple(item.uri for item in items)

    pool = read_pool(config.synthetic_root, list_synthetic(config.synthetic_root))
    assert pool.slot_of.tolist() == [0, 1, 2] * 3
    assert pool.adapter_of.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.bincount(pool.class_of).tolist() == [4] * 9
    names = [name for adapter in read_adapters(config.adapters_root) for name in adapter.spec.class_names]
    assert list(pool.class_names) == names
    with pytest.raises(StorageError, match="classes_per_item was 2, now 3"):
        plan_inversion(whole)
    Path(items[0].uri).unlink()
    lacking = read_pool(config.synthetic_root, list_synthetic(config.synthetic_root))
    assert lacking.slot_of.tolist() == [1, 2, 0, 1, 2, 0, 1, 2]
    assert np.bincount(lacking.class_of).tolist() == [4] * 8


def test_inversion_is_reproducible_and_idempotent(inverted: ExperimentConfig, tmp_path: Path) -> None:
    before = snapshot(inverted.synthetic_root)
    report = invert_library(inverted, QUIET)
    assert report.uris == tuple(item.uri for item in plan_inversion(inverted).items)
    assert report.failures == ()
    assert snapshot(inverted.synthetic_root) == before
    assert files_of(inverted) == undisturbed(inverted, tmp_path / "again")


def test_inversion_with_another_config_is_refused(inverted: ExperimentConfig) -> None:
    before = snapshot(inverted.synthetic_root)

    with pytest.raises(StorageError, match="inversion.num_steps was 4, now 5"):
        invert_library(changed(inverted, inversion={"num_steps": 5}), QUIET)

    assert snapshot(inverted.synthetic_root) == before


def test_images_of_another_version_of_an_adapter_are_refused(inverted: ExperimentConfig) -> None:
    changed_one = Path(list_adapters(inverted.adapters_root)[1], "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in load_file(changed_one).items()}, changed_one)
    before = snapshot(inverted.synthetic_root)

    with pytest.raises(StorageError, match=rf"made from another version of adapter '{changed_one.parent.name}', as 1 files"):
        invert_library(inverted, QUIET)

    assert snapshot(inverted.synthetic_root) == before


DAMAGES: dict[str, Callable[[Path], object]] = {
    "NaN or infinite weights": lambda weights: save_file(
        {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(weights).items()}, weights
    ),
    "damaged": lambda weights: weights.write_bytes(weights.read_bytes()[:-100]),
    "only safetensors are read": lambda weights: weights.rename(weights.with_suffix(".bin")),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_adapter_is_rejected(library: ExperimentConfig, reason: str) -> None:
    victim = list_adapters(library.adapters_root)[1]
    DAMAGES[reason](Path(victim, "adapter_model.safetensors"))

    with pytest.raises(AdapterError, match=reason):
        plan_inversion(library)
    assert not Path(library.synthetic_root).exists()

    inspected = inspect_library(library, strict=False)
    assert len(plan_inversion(library, inspected).items) == 2
    ((folder, why),) = inspected.rejected.items()
    assert folder == victim
    assert reason in why


def test_a_damaged_adapter_is_skipped_and_the_rest_is_done(library: ExperimentConfig, tmp_path: Path) -> None:
    victim = Path(list_adapters(library.adapters_root)[1])
    DAMAGES["damaged"](victim / "adapter_model.safetensors")
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(library.resolved()))

    done = CliRunner().invoke(app, ["invert", "-c", str(path), "--json"])
    assert done.exit_code == 2
    report = json.loads(done.stdout)
    assert len(report["uris"]) == len(list_synthetic(library.synthetic_root)) == 2
    (failure,) = report["failures"]
    assert victim.name in failure
    spoken = CliRunner().invoke(app, ["invert", "-c", str(path)])
    assert (spoken.exit_code, len(spoken.stderr.splitlines())) == (2, 3)
    assert f"lr-ray: failed: {failure}" in spoken.stderr
    strict = CliRunner().invoke(app, ["invert", "-c", str(path), "--strict"])
    assert isinstance(strict.exception, AdapterError)


@pytest.mark.slow
def test_an_inversion_that_fails_on_the_way(library: ExperimentConfig) -> None:
    victim = Path(list_adapters(library.adapters_root)[1], "adapter_model.safetensors")
    tensors = load_file(victim)
    save_file({name: torch.full_like(t, 1e30) if "lora_B" in name else t for name, t in tensors.items()}, victim)
    (uri,) = [item.uri for item in plan_inversion(library).items if item.adapter_folder == str(victim.parent)]

    report = invert_library(library, QUIET)

    assert uri not in report.uris
    assert len(report.uris) == 2
    assert [("NaN or infinite" in line, victim.parent.name in line) for line in report.failures] == [(True, True)]
    with pytest.raises(InversionError, match="the loss became NaN or infinite.*what was finished is kept"):
        invert_library(library, QUIET, strict=True)


def test_memory_that_runs_out_is_of_one_adapter(inverted: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation")

    monkeypatch.setattr(inversion, "invert", fail)
    item = plan_inversion(inverted).items[0]
    Path(item.uri).unlink()
    message = rf"adapter {item.adapter_id}: out of memory \(CUDA out of memory. Tried .* GiB.\); lower inversion.batch_size"
    with pytest.raises(InversionError, match=message):
        InversionActor((inverted,), start_board()).commit(item)


def test_a_block_that_the_backbone_lacks_is_told_before_the_work(library: ExperimentConfig) -> None:
    wrong = library.inversion.model_copy(update={"keep_ratios": {12: 0.5}})
    for part in ("inversion", "metric_inversion"):
        with pytest.raises(ConfigError, match="keep_ratios: the backbone has blocks 0 to 11, not 12; remove that key"):
            invert_library(library.model_copy(update={part: wrong}), QUIET)
    assert not Path(library.synthetic_root).exists()


@pytest.mark.parametrize("start", [{"relations": RelationsConfig()}, {"init_scale": 0.0}], ids=["average", "relations"])
def test_nothing_is_learnt_from_an_adapter_of_another_backbone(inverted: ExperimentConfig, start: dict[str, Any]) -> None:
    """Which `lr-ray invert` has left out."""
    stranger = Path(list_adapters(inverted.adapters_root)[0]).with_name("stranger")
    shutil.copytree(list_adapters(inverted.adapters_root)[0], stranger)
    manifest = stranger / "lr_ray.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"adapter_id": "stranger", "backbone_digest": "0" * 64}))
    with pytest.raises(AdapterError, match="adapter stranger was tuned on .*; set backbone.name to the former or remove"):
        train_meta_lora(changed(inverted, training=start), QUIET)
    assert not Path(inverted.meta_lora_root).exists()


@pytest.mark.parametrize(
    ("ray", "message"),
    [
        ({"num_gpus_per_actor": 1}, "ray.num_gpus_per_actor 1: this machine has 0 GPU for Ray; lower it"),
        ({"cpus_per_actor": 64}, "ray.cpus_per_actor 64: this machine has 2 CPU for Ray; lower it"),
    ],
)
def test_a_worker_that_this_machine_cannot_hold(library: ExperimentConfig, ray: dict[str, object], message: str) -> None:
    for work in (invert_library, tune_library):
        config = changed(library, ray=ray, tuning={"num_adapters": 4})
        with pytest.raises(ClusterError, match=message):
            work(config, QUIET)


def test_no_adapter_fits(library: ExperimentConfig) -> None:
    with pytest.raises(AdapterError, match="was tuned on 'vit_tiny_patch16_224'.*not on 'vit_small_patch16_224'"):
        invert_library(changed(library, backbone={"name": "vit_small_patch16_224"}), QUIET)
    assert not Path(library.synthetic_root).exists()


@pytest.mark.slow
def test_a_dataset_gives_rows_while_the_inversion_goes_on(library: ExperimentConfig) -> None:
    config = changed(library, inversion={"num_steps": 150}, ray={"max_actors": 1})

    rows = iter(lr_ray.invert_dataset(config).iter_rows())
    first = next(rows)
    assert len(list_synthetic(config.synthetic_root)) < 3
    others = list(rows)

    assert len(list_synthetic(config.synthetic_root)) == 3
    found = [(row["adapter_id"], row["class_index"]) for row in [first, *others]]
    expected = [(item.adapter_id, c) for item in plan_inversion(config).items for c in item.classes for _ in range(4)]
    assert sorted(found) == sorted(expected)
    assert all(len(row["image"]["bytes"]) > 100 for row in others)
    assert lr_ray.invert_dataset(config).count() == len(expected)


class DyingActor(InversionActor):
    def _invert(self, *_arguments: Any) -> None:
        os._exit(1)


@pytest.mark.slow
def test_a_piece_of_work_that_kills_its_process_is_given_up_and_the_rest_is_done(inverted: ExperimentConfig) -> None:
    config = changed(inverted, ray={"max_failures": 1, "max_actors": 1})
    deadly, *others = plan_inversion(config).items
    Path(deadly.uri).unlink()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])

    rows = actor_pool([deadly, *others], config.ray, DyingActor, (config,), start_board()).take_all()

    errors = {row["adapter_id"]: row["error"] for row in rows}
    assert "its worker was lost 2 times at the same point" in errors[deadly.adapter_id]
    assert [errors[item.adapter_id] for item in others] == ["", ""]


def test_what_fails_among_the_images_for_the_metric_says_so(inverted: ExperimentConfig) -> None:
    config = inverted.model_copy(update={"metric_inversion": inverted.inversion})
    item, *_ = plan_inversion(config.for_metric).items
    Path(item.adapter_folder, "adapter_model.safetensors").unlink()
    actor = InversionActor((config, config.for_metric), start_board())

    for part, called in enumerate(("", "metric_inversion: ")):
        row = {name: np.array([value]) for name, value in asdict(replace(item, part=part)).items()}
        (error,) = actor(row)["error"]
        assert error.startswith(f"{called}adapter {item.adapter_folder} has no adapter_model.safetensors")


def test_a_board_shows_what_is_under_way() -> None:
    board = Board()
    for name, share in (("b", 0.5), ("a", 0.1), ("b", 0.7)):
        board.write(UnderWay(name=name, share=share, note=""))
    assert [(line.name, line.share) for line in board.read()] == [("a", 0.1), ("b", 0.7)]
    assert [board.begin("a", "start"), board.begin("a", "start"), board.begin("a", "saved"), board.begin("b", "start")] == [
        1,
        2,
        1,
        1,
    ]
    board.erase("a")
    board.erase("a")
    assert [line.name for line in board.read()] == ["b"]
