"""`--cluster`: a command as a job on a cluster of this machine, which starts workers for it and ends them."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from ray.job_submission import JobStatus

from bench.autoscaling import (
    TOKEN,
    autoscaling_cluster,
    environment,
    no_new_workers,
    sizes,
    write_job,
)
from bench.processes import lr_ray, wait_until
from lr_ray.config import ExperimentConfig
from lr_ray.errors import ClusterError
from lr_ray.report.relay import Relay
from lr_ray.runtime import jobs
from lr_ray.runtime.jobs import CONFIG_NAME, cluster_status, connect, submit_and_follow
from lr_ray.storage.synthetic import list_synthetic
from tests.jobs import QUIET, changed, tiny


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The dashboard of a cluster on loopback that wants a token and has no workers yet."""
    with autoscaling_cluster() as url:
        yield url


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


def written(config: ExperimentConfig, folder: Path) -> str:
    path = folder / "experiment.yaml"
    path.write_text(json.dumps(config.resolved()))
    return str(path)


def start(*arguments: str) -> "subprocess.Popen[str]":
    """The command in a process and session of its own, as one types it."""
    return subprocess.Popen(
        lr_ray(*arguments),
        env=environment(),
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs inherit that it is ignored
    )


# ---------------------------------------------------------------------------------------------------- from end to end


@pytest.mark.slow
def test_a_job_is_left_and_found_again_and_workers_come_and_go(tmp_path: Path, url: str) -> None:
    """Its actors need workers, of which there are none before it and none after."""
    path = write_job(tmp_path, num_adapters=3, num_steps=60)
    synthetic = f"{tmp_path}/run/synthetic"
    arguments = ("invert", "--config", str(path), "--cluster", url)
    with sizes(url) as found:
        with no_new_workers():  # or it may have ended by itself before one is back
            first = start(*arguments)
            assert first.stdout is not None
            assert "invert: 3 adapters into" in first.stdout.readline()
            first.send_signal(signal.SIGINT)
            _, err = first.communicate(timeout=60)
            assert first.returncode == 130
            (job,) = {line.partition(":")[0].removeprefix("job ") for line in err.splitlines() if line.startswith("job ")}
            assert f"detached from job {job}, which goes on; the same command comes back to it" in err
            assert f"`ray job stop {job} --address {url}` ends it" in err

            second = start(*arguments)
            assert second.stderr is not None
            assert f"job {job} runs already: here is its log" in second.stderr.readline()
        out, err = second.communicate(timeout=200)
        assert second.returncode == 0, out + err
        assert "invert: 3/3, " in out
        assert f"3 files of synthetic images in {synthetic}" in out
        assert len(list_synthetic(synthetic)) == 3
        wait_until(lambda: found[-1][1] == 0, "a cluster without workers")
    numbers = [workers for _, workers in found]
    assert numbers[0] == numbers[-1] == 0
    assert max(numbers) in (1, 2), "the second may come when the first has done the work"


def test_the_exit_code_is_that_of_the_command(tmp_path: Path, url: str, token: None) -> None:
    job = start("invert", "--config", written(tiny(tmp_path), tmp_path), "--cluster", url)
    out, err = job.communicate(timeout=200)
    assert job.returncode == 1
    assert f"lr-ray: adapters {tmp_path}/run/adapters: no folder with an adapter_config.json in it" in out
    assert "Running entrypoint" not in out
    name = err.partition(":")[0].removeprefix("job ")
    assert f"{name}: FAILED" in cluster_status(url)


def test_status_shows_the_nodes(url: str, token: None) -> None:
    wait_until(lambda: "Node status" in cluster_status(url), "a status")


# ------------------------------------------------------------------------------------- refused before anything starts


@pytest.mark.parametrize("value", ["", "wrong", "wrong\n"])
def test_a_token_that_is_missing_or_wrong(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", value)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    message = "does not accept the token" if value else "wants a token, and .*/none cannot be read"
    with pytest.raises(ClusterError, match=message):
        connect(url)


class Answers(BaseHTTPRequestHandler):
    """Any other web server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002
        pass


def test_a_server_that_is_no_dashboard() -> None:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(ClusterError, match="no job server of Ray answers at http://127.0.0.1"):
            connect(f"http://127.0.0.1:{server.server_port}")
        thread.join()


def test_nothing_at_the_address() -> None:
    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        port = server.server_port
    with pytest.raises(
        ClusterError, match=r"no job server of Ray answers at .*Connection refused.*8265 unless chosen otherwise"
    ):
        connect(f"http://127.0.0.1:{port}")


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_SECONDS_TO_ANSWER", 0.2)
    with HTTPServer(("127.0.0.1", 0), Answers) as server, pytest.raises(ClusterError, match="timed out"):
        connect(f"http://127.0.0.1:{server.server_port}")  # it listens, and takes no request


REMOTE = {"output": "s3://b/run", "adapters": "s3://b/adapters"}
YAML = str(Path(__file__).parents[2] / "cluster" / "aws.yaml")


def test_a_disk_that_all_nodes_share_may_hold_everything() -> None:
    shared = f"file://{Path(__file__).parent}"
    data = {"test": {"source": "cub/test", "root": shared}, "tune": {"source": shared}}
    paths = {"output": shared, "data": data, "backbone": {"weights": f"file://{__file__}"}}
    jobs._refuse_paths_of_this_machine(ExperimentConfig.model_validate({"name": "x"} | paths), "c.yaml", ("test", "tune"))


@pytest.mark.parametrize(
    ("changes", "reads", "message"),
    [
        ({"output": "/tmp/run"}, (), "output /tmp/run is a path of this machine, .* give a URI such as s3://BUCKET/output"),
        (REMOTE | {"adapters": "/tmp/a"}, (), "adapters /tmp/a is a path of this machine"),
        (REMOTE | {"synthetic": "/tmp/s"}, (), "synthetic /tmp/s is a path of this machine"),
        (REMOTE | {"data": {"test": {"source": __file__}}}, ("test",), r"data\.test\.source .* is on this machine"),
        (
            REMOTE | {"data": {"test": {"source": "cub/test", "root": "/tmp"}}},
            ("test",),
            r"data\.test\.root /tmp is on this machine",
        ),
        (REMOTE | {"backbone": {"weights": __file__}}, (), r"backbone\.weights .* is on this machine"),
    ],
)
def test_paths_that_the_nodes_of_a_cluster_do_not_see(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reads: tuple[str, ...], message: str
) -> None:
    config = ExperimentConfig.model_validate({"name": "x"} | changes)
    with pytest.raises(ClusterError, match=message):
        submit(config, YAML, reads)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"output": "file:///shared/run"},
        {"data": {"test": {"source": "/data/of/nodes"}}},
        {"data": {"test": {"source": "cub/test", "root": "/data/of/nodes"}}},
        {"data": {"test": {"source": "cub/test", "root": "hf://datasets/a/b"}}},
    ],
)
def test_paths_that_they_may_see(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    def reached(_cluster: str) -> None:
        raise ClusterError("reached")

    monkeypatch.setattr(jobs, "job_server", reached)
    with pytest.raises(ClusterError, match="reached"):
        submit(ExperimentConfig.model_validate({"name": "x"} | REMOTE | changes), YAML, ("test",))


def submit(config: ExperimentConfig, cluster: str, reads: tuple[str, ...] = ()) -> int:
    return submit_and_follow(["eval", "--config", CONFIG_NAME], config, cluster, up=False, reads=reads, reporter=QUIET)


def test_a_tunnel_at_a_loopback_address_is_no_cluster_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"hostname": "ray-head-x7"}]
    answer = SimpleNamespace(json=lambda: {"data": {"summary": nodes}})
    monkeypatch.setattr(jobs, "connect", lambda _url: SimpleNamespace(_do_request=lambda *_, **__: answer))
    with pytest.raises(ClusterError, match="output /tmp/run is a path of this machine"):
        submit(ExperimentConfig.model_validate({"name": "x", "output": "/tmp/run"}), "http://127.0.0.1:8265")


# --------------------------------------------------------------------------------------------- what is handed over


class Client:
    """A job server that has some jobs."""

    def __init__(self, *jobs: tuple[str, JobStatus]) -> None:
        self._jobs = [SimpleNamespace(submission_id=name, status=status) for name, status in jobs]
        self.submitted: dict[str, Any] = {}

    def list_jobs(self) -> list[Any]:
        return [SimpleNamespace(submission_id=None, status=JobStatus.RUNNING), *self._jobs]

    def submit_job(self, **arguments: Any) -> str:
        self.submitted = arguments
        folder = Path(arguments["runtime_env"]["working_dir"])
        self.text = (folder / CONFIG_NAME).read_text()
        self.config = json.loads(self.text)
        code = (
            "import lr_ray.cli.main, lr_ray.configs, sys, importlib.metadata as m; print(m.version('lr-ray'), lr_ray.__file__)"
        )
        without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.imported = subprocess.check_output([sys.executable, "-c", code], cwd=folder, env=without, text=True).split()
        self.folder = folder
        return str(arguments["submission_id"])


def handed_over(client: Client, config: ExperimentConfig, *, here: bool = True) -> str:
    return jobs._submit_or_join(client, ["invert", "--config", CONFIG_NAME], config, here=here, reporter=QUIET)  # type: ignore[arg-type]


def test_the_job_is_this_package_and_this_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_PROFILE", "of-this-machine")
    client, config = Client(), tiny(tmp_path)

    job = handed_over(client, config)

    assert client.submitted["entrypoint"] == f"{sys.executable} -m lr_ray.cli invert --config {CONFIG_NAME}"
    assert client.config == changed(config, ray={"address": "auto"}).resolved()
    assert client.imported == [version("lr-ray"), str(client.folder / "lr_ray" / "__init__.py")]
    assert aws_variables(client) == {"AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"}
    assert "secret" not in job + client.submitted["entrypoint"]
    assert not client.folder.exists()


def aws_variables(client: Client) -> set[str]:
    return {name for name in client.submitted["runtime_env"]["env_vars"] if name.startswith("AWS_")}


def test_elsewhere_it_is_the_nodes_python_and_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_PROFILE", "of-this-machine")
    client = Client()
    handed_over(client, tiny(tmp_path), here=False)
    assert aws_variables(client) & {"AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"} == {"AWS_SECRET_ACCESS_KEY"}
    assert client.submitted["entrypoint"].startswith("python -m lr_ray.cli invert ")


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_the_keys_of_a_tracker_go_along_if_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    keys = {"wandb": "WANDB_API_KEY", "mlflow": "MLFLOW_TRACKING_TOKEN"}
    for key in keys.values():
        monkeypatch.setenv(key, "secret")
    client = Client()
    handed_over(client, changed(tiny(tmp_path), tracking={tracker: "http://here"}))
    assert client.submitted["runtime_env"]["env_vars"].keys() & set(keys.values()) == {keys[tracker]}


def test_a_config_arrives_as_it_was_sent(tmp_path: Path) -> None:
    client = Client()
    handed_over(client, tiny(tmp_path).model_copy(update={"name": "😀 щ"}))
    assert client.config["name"] == "😀 щ"
    assert "😀" in client.text


def test_a_job_that_runs_is_joined_and_one_that_ended_starts_again(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    first = handed_over(Client(), config)
    assert first.endswith("-1")
    running = Client((first, JobStatus.RUNNING))
    assert handed_over(running, config) == first
    assert running.submitted == {}
    for status in (JobStatus.FAILED, JobStatus.STOPPED, JobStatus.SUCCEEDED):
        assert handed_over(Client((first, status)), config) == f"{first[:-2]}-2"
    without_the_first = Client((f"{first[:-2]}-2", JobStatus.STOPPED))
    assert handed_over(without_the_first, config) == f"{first[:-2]}-3"
    assert handed_over(running, config.model_copy(update={"seed": 1})) not in (first, f"{first[:-2]}-2")


# --------------------------------------------------------------------------------------------------------- its end


def followed(*chunks: str, fails: Exception | None = None, **info: Any) -> int:
    """What following a job gives whose log comes in these chunks."""

    async def tail(_job: str) -> AsyncIterator[str]:
        for chunk in chunks:
            yield chunk
        if fails is not None:
            raise fails

    client = SimpleNamespace(tail_job_logs=tail, get_job_info=lambda _job: SimpleNamespace(**info))
    return jobs._follow(client, "job-1", stop="ray job stop job-1", relay=Relay(QUIET))  # type: ignore[arg-type]


def test_the_log_is_that_of_the_command_however_it_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    chunks = ("INFO -- Runtime env is set", "ting up.\nRunning entrypoint for job job-1: python\n[\n", ' "a', '"\n]\nend')
    assert followed(*chunks, driver_exit_code=3, status=JobStatus.FAILED) == 3
    assert capsys.readouterr() == ('[\n "a"\n]\nend\n', "")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (JobStatus.STOPPED, -15, "job job-1 stopped: why; the same command starts it again"),
        (JobStatus.FAILED, None, "job job-1 failed: why; the same command starts it again"),
        (
            JobStatus.RUNNING,
            None,
            "lost the log of job job-1, which is running; the same command comes back to it",
        ),
    ],
)
def test_a_job_that_did_not_end_by_itself(status: JobStatus, code: int | None, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        followed(driver_exit_code=code, status=status, message="why")


@pytest.mark.parametrize("error", [RuntimeError("closed"), aiohttp.ClientConnectionError("closed"), OSError("closed")])
def test_a_log_that_breaks_off(error: Exception) -> None:
    with pytest.raises(
        ClusterError, match=r"lost the log of job job-1 \(closed\), which may go on; the same command comes back"
    ):
        followed("a\n", fails=error)
