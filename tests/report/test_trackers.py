"""Weights & Biases offline, and MLflow's own client on a folder and on a port where nothing answers."""

import json
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lr_ray.config import TrackingConfig
from lr_ray.errors import ConfigError
from lr_ray.report.progress import Reporter
from lr_ray.report.trackers import MlflowTracker, TrackedRun, open_trackers

RUN = TrackedRun(name="demo", kind="meta_lora", digest="abcdef0123456789", config={"seed": 3, "training": {"num_steps": 2}})
POINTS = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "validation_accuracy": 0.25}]


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return str(tmp_path / "mlruns")


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("tracking.")]


def runs_of(uri: str) -> list[Any]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("demo")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def curve(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient(uri).get_metric_history(run_id, name)]


def test_mlflow_gets_the_curves_the_config_and_how_it_ended(uri: str) -> None:
    with open_trackers(TrackingConfig(mlflow=uri), RUN, Reporter(quiet=True)) as (tracker,):
        for point in POINTS:
            tracker.add(point)

    (run,) = runs_of(uri)
    assert run.data.params == {"seed": "3", "training.num_steps": "2"}
    assert run.info.status == "FINISHED"
    assert curve(uri, run.info.run_id, "loss") == [(1, 2.0), (2, 1.5)]
    assert curve(uri, run.info.run_id, "validation_accuracy") == [(2, 0.25)]


def test_a_training_that_goes_on_is_the_same_run(uri: str) -> None:
    with suppress(KeyboardInterrupt), open_trackers(TrackingConfig(mlflow=uri), RUN, Reporter(quiet=True)) as (tracker,):
        tracker.add(POINTS[0])
        raise KeyboardInterrupt
    (run,) = runs_of(uri)
    assert run.info.status == "FAILED"

    with open_trackers(TrackingConfig(mlflow=uri), RUN, Reporter(quiet=True)) as (tracker,):
        tracker.add(POINTS[1])

    (again,) = runs_of(uri)
    assert again.info.run_id == run.info.run_id
    assert again.info.status == "FINISHED"
    assert curve(uri, run.info.run_id, "loss") == [(1, 2.0), (2, 1.5)]


def test_what_a_server_does_not_take_is_offered_again(
    uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_trackers(TrackingConfig(mlflow=uri), RUN, Reporter(quiet=False)) as (tracker,):
        assert isinstance(tracker, MlflowTracker)
        working = tracker._client
        monkeypatch.setattr(tracker, "_client", MlflowClient("http://127.0.0.1:9"))
        for point in POINTS:
            tracker.add(point)
            tracker.commit()
        monkeypatch.setattr(tracker, "_client", working)

    (run,) = runs_of(uri)
    assert curve(uri, run.info.run_id, "loss") == [(1, 2.0), (2, 1.5)]
    _, complaint = said(capsys)  # once, after the line of the start
    assert "Connection refused" in complaint
    assert complaint.endswith("the training goes on and tries again")


def test_a_server_that_does_not_answer_is_an_error_before_the_training() -> None:
    with (
        pytest.raises(
            ConfigError, match="tracking.mlflow http://127.0.0.1:9: .*give the URI of a tracking server that answers"
        ),
        open_trackers(TrackingConfig(mlflow="http://127.0.0.1:9"), RUN, Reporter(quiet=True)),
    ):
        pass


def test_trainings_side_by_side_are_runs_of_one_experiment(uri: str) -> None:
    kinds, both = ("meta_lora", "oracle"), threading.Barrier(2, timeout=60)

    def train(kind: str) -> None:
        both.wait()
        with open_trackers(TrackingConfig(mlflow=uri), replace(RUN, kind=kind), Reporter(quiet=True)) as (tracker,):
            both.wait()
            tracker.add(POINTS[0])

    with ThreadPoolExecutor() as pool:
        list(pool.map(train, kinds))
    assert sorted(run.info.run_name for run in runs_of(uri)) == sorted(kinds)


def records_of(path: Path) -> Iterator[Any]:
    """Of a run kept offline: LevelDB's log, whose records here are whole (checksum, length, type, content) in one block."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, start = path.read_bytes(), 7
    assert len(content) < 32768
    while start < len(content):
        length, kind = struct.unpack_from("<HB", content, start + 4)
        assert kind == 1
        yield Record.FromString(content[start + 7 : start + 7 + length])
        start += 7 + length


def points_of(path: Path) -> list[dict[str, Any]]:
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records_of(path)
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.fixture
def wandb_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of a process that has not spoken to Weights & Biases yet, as a user without an account."""
    import wandb

    for name in ("HOME", "NETRC", "WANDB_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()
    yield tmp_path
    wandb.teardown()


def test_wandb_gets_the_curves_and_the_config(wandb_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    with open_trackers(TrackingConfig(wandb="group/project"), RUN, Reporter(quiet=True)) as (tracker,):
        for point in POINTS:
            tracker.add(point)
    wandb.teardown()  # its process writes the file and may still be at it when the run has ended

    (path,) = wandb_folder.rglob("*.wandb")
    records = list(records_of(path))
    (started,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (started.entity, started.project, started.run_id) == ("group", "project", "meta_lora-abcdef012345")
    assert {item.key: json.loads(item.value_json) for item in started.config.update}["training"] == {"num_steps": 2}
    points = points_of(path)
    assert [(point["_step"], point["loss"], point.get("validation_accuracy")) for point in points] == [
        (1, 2.0, None),
        (2, 1.5, 0.25),
    ]


def test_wandb_keeps_trainings_side_by_side_apart(wandb_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    config, other = TrackingConfig(wandb="project"), replace(RUN, kind="oracle")
    with (
        open_trackers(config, RUN, Reporter(quiet=True)) as (first,),
        open_trackers(config, other, Reporter(quiet=True)) as (second,),
    ):
        first.add(POINTS[0])
        second.add(POINTS[1])
    wandb.teardown()

    found = {
        record.run.run_id: path
        for path in wandb_folder.rglob("*.wandb")
        for record in records_of(path)
        if record.WhichOneof("record_type") == "run"
    }
    assert found.keys() == {RUN.run_id, other.run_id}
    assert len(set(found.values())) == 2
    for run, step in ((RUN, 1), (other, 2)):
        assert [point["_step"] for point in points_of(found[run.run_id])] == [step]


@pytest.mark.usefixtures("wandb_folder")
def test_wandb_without_a_key_is_an_error_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with (
        pytest.raises(ConfigError, match="tracking.wandb project: No API key configured.*; set WANDB_API_KEY, or"),
        open_trackers(TrackingConfig(wandb="project"), RUN, Reporter(quiet=True)),
    ):
        pass


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_package_that_is_missing(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with (
        pytest.raises(
            ConfigError, match=rf"tracking.{package} x: {package} is not installed; pip install 'lr-ray\[tracking\]'"
        ),
        open_trackers(TrackingConfig(**{package: "x"}), RUN, Reporter(quiet=True)),
    ):
        pass
