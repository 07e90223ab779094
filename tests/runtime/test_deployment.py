"""How the service is deployed: what Ray Serve is asked for, and the configs for `serve deploy` and KubeRay."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lr_ray.cli.main import app
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from lr_ray.errors import ConfigError, StorageError
from lr_ray.runtime import serving
from lr_ray.runtime.deployments import backbone_options
from lr_ray.runtime.serving import build_application, served, write_serve_config
from lr_ray.serving.config import ServingConfig
from lr_ray.serving.keys import add_key

ROOT = Path(__file__).parents[2]
MANIFEST = yaml.safe_load((ROOT / "cluster" / "rayservice.yaml").read_text())
HOST = {"CPU": 16.0}


def config(**changes: Any) -> ServingConfig:
    return ServingConfig(meta_loras={"x": "/x"}, tasks="/tasks", **changes)


def test_replicas_share_out_the_processors_and_leave_room_for_their_successors():
    options = backbone_options(config(replicas=4), HOST)
    assert (options["num_replicas"], options["max_surge_percent"]) == (4, 100)
    assert options["ray_actor_options"] == {"num_cpus": 2.0, "num_gpus": 0.0}
    assert "autoscaling_config" not in options


def test_more_replicas_than_processors_find_room_too():
    reserved = backbone_options(config(replicas=40), HOST)["ray_actor_options"]["num_cpus"]
    assert 2 * 40 * reserved == pytest.approx(HOST["CPU"])


def test_autoscaling_starts_with_the_fewest_and_shares_for_the_most():
    options = backbone_options(config(replicas=1, max_replicas=4), HOST)
    scaling = options["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["initial_replicas"], scaling["max_replicas"]) == (1, 1, 4)
    assert 0 < scaling["target_ongoing_requests"] < options["max_ongoing_requests"]
    assert options["ray_actor_options"]["num_cpus"] == 2
    assert "num_replicas" not in options


@pytest.mark.parametrize(
    ("gpus", "changes", "each"),
    [
        (8.0, {"replicas": 2}, 1.0),
        (1.0, {"replicas": 4}, 0.25),
        (2.0, {"replicas": 3}, 0.5),
        (3.0, {"replicas": 1, "max_replicas": 4}, 0.5),
        (0.0, {"gpus_per_replica": 0.5}, 0.5),
        (2.0, {"gpus_per_replica": 0}, 0),
    ],
)
def test_gpus_are_shared_out_or_given(gpus: float, changes: dict[str, Any], each: float):
    options = backbone_options(config(**changes), HOST | {"GPU": gpus})
    assert options["ray_actor_options"]["num_gpus"] == each
    assert options["max_surge_percent"] == (0 if each else 100)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    add_key(tmp_path / "keys.json", "ann")
    return tmp_path / "keys.json"


def test_serve_build_writes_what_ray_serve_takes(meta_lora: str, tmp_path: Path, keys: Path):
    path = tmp_path / "folder" / "serve.yaml"
    arguments = [
        "serve",
        "build",
        meta_lora,
        "-o",
        str(path),
        "--tasks",
        str(tmp_path / "tasks"),
        "--port",
        "8123",
        "--keys",
        str(keys),
    ]
    done = CliRunner().invoke(app, [*arguments, "--replicas", "1:4", "--precision", "bf16"])
    assert done.exit_code == 0, done.output
    content = yaml.safe_load(path.read_text())
    (built,) = ServeDeploySchema.model_validate(content).applications
    assert content["http_options"] == {"host": "127.0.0.1", "port": 8123}
    module, _, name = built.import_path.partition(":")
    assert (module, getattr(serving, name)) == (serving.__name__, build_application)
    found = ServingConfig(**built.args)
    assert (list(found.meta_loras.values()), found.replicas, found.max_replicas, found.precision) == ([meta_lora], 1, 4, "bf16")
    assert found.tasks == str(tmp_path / "tasks")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "0"], "--replicas '0': give a number from 1, or MIN:MAX such as 1:4"),
        (["--replicas", "4:1"], "4 replicas, 1 at most; give the fewest first, such as 1 and 4"),
        (["--replicas", "1:"], "--replicas '1:'"),
        (["--precision", "int8"], "--precision 'int8': give fp32, bf16 or auto"),
        ([], "no keys: under Ray Serve's own commands the service needs them"),
        (["--keys", "/nowhere/keys.json"], "keys /nowhere/keys.json: No such file"),
    ],
)
def test_what_serve_build_refuses(meta_lora: str, tmp_path: Path, options: list[str], message: str):
    done = CliRunner().invoke(app, ["serve", "build", meta_lora, "-o", str(tmp_path / "serve.yaml"), *options])
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)
    assert not (tmp_path / "serve.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replica": 2}, "replica = 2: Unexpected keyword argument; allowed are meta_loras, tasks, keys, host, port, replicas"),
        ({"replicas": 0}, "replicas = 0: Input should be greater than or equal to 1"),
        ({"precision": "int8"}, "precision = 'int8': Input should be 'auto', 'fp32' or 'bf16'"),
        ({"meta_loras": 3}, "meta_loras = 3: Input should be a valid dictionary"),
        ({"meta_loras": {}}, "no meta-LoRA; give the folder of one"),
        ({"meta_loras": {"backbone": "/x"}}, "model name 'backbone' means the plain backbone"),
        ({"meta_loras": {"a b": "/x"}}, "model name 'a b': give 1 to 63 of"),
        ({"replicas": 3, "max_replicas": 1}, "3 replicas, 1 at most; give the fewest first, such as 1 and 4"),
    ],
)
def test_arguments_of_a_config_are_checked(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_application({"meta_loras": {"x": "/x"}, "tasks": "/tasks", **changes})


def test_a_missing_argument_is_named():
    with pytest.raises(ConfigError, match="args of the application: tasks: Field required"):
        build_application({"meta_loras": {"x": "/x"}})


def test_ray_serve_listens_where_it_likes_so_that_keys_are_needed():
    with pytest.raises(ConfigError, match="no keys: under Ray Serve's own commands the service needs them"):
        build_application({"meta_loras": {"x": "/x"}, "tasks": "/tasks", "host": "127.0.0.1"})


def test_a_config_that_cannot_be_written_is_one_line(meta_lora: str, keys: Path):
    arguments = ["serve", "build", meta_lora, "--keys", str(keys), "-o", "/proc/nope/x.yaml"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, StorageError)
    assert "cannot write /proc/nope/x.yaml: No such file or directory" in str(done.exception)


def test_traces_that_cannot_be_made_are_an_error_of_the_driver(keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    found = config(keys=keys)
    for work in (
        lambda: served(found).__enter__(),
        lambda: build_application(found.arguments()),
        lambda: write_serve_config(found, tmp_path / "serve.yaml"),
    ):
        with pytest.raises(ConfigError, match=r"is not installed; `pip install 'lr-ray\[otel\]'`"):
            work()


def test_the_rayservice_serves_what_ray_serve_takes():
    (built,) = ServeDeploySchema.model_validate(yaml.safe_load(MANIFEST["spec"]["serveConfigV2"])).applications
    assert built.import_path == f"{serving.__name__}:{build_application.__name__}"
    found = ServingConfig(**built.args)
    assert found.keys is not None
    assert (found.replicas, found.max_replicas, found.gpus_per_replica, found.precision) == (1, 4, 1, "bf16")
    (group,) = MANIFEST["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["maxReplicas"] >= found.max_replicas
    (container,) = group["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert "livenessProbe" not in container  # of Serve's proxy, which is only where replicas are
    assert MANIFEST["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
