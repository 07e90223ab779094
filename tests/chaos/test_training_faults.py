"""A meta-training of which some process is killed at a random step ends with the weights and the curve of one left alone."""

import json
import os
import random
import subprocess
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboardX.proto.event_pb2 import SessionLog

from bench.chaos import ENVIRONMENT, two_nodes
from bench.processes import children_of, lr_ray, wait_until
from lr_ray.config import ExperimentConfig
from lr_ray.runtime.training import train_meta_lora
from tests.jobs import QUIET, changed, kill_worker
from tests.report.test_curves import events_in

LAST_STEP, SAVED_EVERY = 60, 3


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def make_config(made_before: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], ExperimentConfig]:
    """Each time the same training into another folder; memory holds one of its two adapters at a time."""

    def make() -> ExperimentConfig:
        folders = {"adapters": made_before.adapters_root, "synthetic": made_before.synthetic_root}
        config = made_before.model_copy(update={**folders, "output": str(tmp_path_factory.mktemp("training"))})
        stream = config.training.stream.model_copy(update={"buffer_classes": 3, "uses_per_class": 4.0})
        return changed(config, training={"num_steps": LAST_STEP, "validate_every": SAVED_EVERY, "stream": stream, "ema": 0.5})

    return make


@pytest.fixture(scope="module")
def undisturbed(make_config: Callable[[], ExperimentConfig]) -> dict[str, Any]:
    config = make_config()
    train_meta_lora(config, QUIET)
    return result_of(config)


def result_of(config: ExperimentConfig) -> dict[str, Any]:
    """The bytes of the best and of the last weights, and the curve."""
    root = Path(config.meta_lora_root)
    history = json.loads((root / "lr_ray.json").read_text())["history"]
    weights = [(root / name / "adapter_model.safetensors").read_bytes() for name in ("", "last")]
    return {"weights": weights, "history": history}


def saved_step(config: ExperimentConfig) -> int:
    """Of the newest checkpoint that is whole."""
    found = [0]
    for path in Path(config.meta_lora_root, "training").rglob("state.json"):
        try:
            found.append(json.loads(path.read_text())["step"])
        except (OSError, ValueError):  # deleted, or not yet whole
            continue
    return max(found)


def wait_for_a_step(config: ExperimentConfig, name: str) -> None:
    """Until a step that the name determines has been saved."""
    step = random.Random(name).randint(1, LAST_STEP - 25)
    wait_until(lambda: saved_step(config) >= step, f"step {step} of a training")


def test_a_killed_worker(make_config: Callable[[], ExperimentConfig], undisturbed: dict[str, Any]) -> None:
    config = make_config()
    training = threading.Thread(target=lambda: train_meta_lora(config, QUIET))
    training.start()

    wait_for_a_step(config, "worker")
    kill_worker("RayTrainWorker")
    training.join()

    assert [entry["step"] for entry in undisturbed["history"]] == list(range(1, LAST_STEP + 1))
    assert result_of(config) == undisturbed


def test_a_killed_loader(make_config: Callable[[], ExperimentConfig], undisturbed: dict[str, Any]) -> None:
    """It draws all that there is room for before the first step is done."""
    config = make_config()
    training = threading.Thread(target=lambda: train_meta_lora(config, QUIET))
    training.start()

    wait_until(lambda: bool(children_of(os.getpid(), "BatchLoader")), "a loader")
    kill_worker("BatchLoader")
    training.join()

    assert result_of(config) == undisturbed


def start(config: ExperimentConfig, *settings: str) -> subprocess.Popen[bytes]:
    """`lr-ray train` in a process of its own."""
    path = Path(config.output_root, "config.json")
    path.write_text(json.dumps(config.resolved()))
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    return subprocess.Popen(
        lr_ray("train", "-c", str(path), "--json", *overrides), stdout=subprocess.DEVNULL, env=os.environ | ENVIRONMENT
    )


def test_a_killed_driver(make_config: Callable[[], ExperimentConfig], undisturbed: dict[str, Any]) -> None:
    config = make_config()
    first = start(config)
    wait_for_a_step(config, "driver")
    psutil.Process(first.pid).kill()
    assert first.wait() != 0
    saved = saved_step(config)
    assert 0 < saved < LAST_STEP

    assert start(config).wait() == 0

    assert result_of(config) == undisturbed
    curves = max(Path(config.meta_lora_root, "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    (began,) = [event.step for event in events_in(curves) if event.session_log.status == SessionLog.START]
    assert began > max(1, saved - SAVED_EVERY), (
        "it begins after the newest checkpoint, or the one before if that was not reported"
    )


def test_a_lost_node(make_config: Callable[[], ExperimentConfig], undisturbed: dict[str, Any]) -> None:
    config = make_config()
    with ExitStack() as stack:
        address, nodes = stack.enter_context(two_nodes())
        training = start(config, f"ray.address={json.dumps(address)}")
        stack.callback(training.kill)
        wait_for_a_step(config, "node")
        raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
        (raylet,) = [pid for pid in raylets if children_of(pid, "RayTrainWorker")]

        psutil.Process(raylet).kill()

        assert training.wait() == 0
    assert result_of(config) == undisturbed
