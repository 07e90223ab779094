"""`--cluster`: the same command as a Ray job on a cluster, its log here, its exit code as ours."""

import asyncio
import json
import logging
import os
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from lr_ray.config import ExperimentConfig
from lr_ray.data.load import EMBEDDED_DATA
from lr_ray.errors import ClusterError
from lr_ray.report.progress import Reporter
from lr_ray.report.relay import Relay
from lr_ray.runtime.clusters import bring_up, check_launchable, is_launcher_yaml, is_up, job_server
from lr_ray.runtime.session import storage_environment
from lr_ray.storage.manifest import digest_of

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

CONFIG_NAME = "config.yaml"
"""What the config is called where the job runs."""
DETACHED = 130
"""Exit code after Ctrl-C, as a shell gives it."""
_SECONDS_TO_ANSWER = 10
_OF_THIS_MACHINE = {"AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CA_BUNDLE"}
"""AWS variables that name a file of this machine, or a profile in one."""


def submit_and_follow(
    words: Sequence[str], config: ExperimentConfig, cluster: str, *, up: bool, reads: Sequence[str], reporter: Reporter
) -> int:
    """Run `lr-ray WORDS` on a cluster and show its log; the same call again joins the job while it runs.

    Args:
        words: a command and its options, with `CONFIG_NAME` where the config goes.
        cluster: a cluster-launcher YAML, the address of a cluster's dashboard, or `auto`.
        up: bring up the cluster of that YAML, if it is not up.
        reads: the sections of `config.data` whose images the command reads.

    Returns:
        The command's exit code, or `DETACHED` after Ctrl-C; the job goes on then.

    Raises:
        ClusterError: the cluster cannot be brought up or reached, the config names files that it does not see, or the
            job ended without an exit code.
    """
    if is_launcher_yaml(cluster):
        check_launchable(cluster)
        _refuse_paths_of_this_machine(config, cluster, reads)
        if up and not is_up(cluster):
            bring_up(cluster)
    elif up:
        raise ClusterError(f"--up starts the cluster of a YAML such as cluster/aws.yaml, and --cluster {cluster} is an address")
    with job_server(cluster) as url:
        client = connect(url)
        here = not is_launcher_yaml(cluster) and _is_this_machine(client, url)
        if not here:
            _refuse_paths_of_this_machine(config, cluster, reads)
        with _errors_of(url):
            job = _submit_or_join(client, words, config, here=here, reporter=reporter)
        return _follow(client, job, stop=_stop_command(job, cluster, url), relay=Relay(reporter))


def connect(url: str) -> "JobSubmissionClient":
    """A client of the job server, with the token if it wants one.

    Raises:
        ClusterError: nothing answers there in time, it is no dashboard of Ray, or the token is missing or wrong.
    """
    headers = {"Authorization": f"Bearer {_token(url)}"} if _wants_token(url) else {}
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # else RAY_ADDRESS, where it is set, would win over the argument
    from ray.job_submission import JobSubmissionClient

    for chatty in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{chatty}").setLevel(logging.WARNING)  # they set their levels when imported
    with _errors_of(url):
        return JobSubmissionClient(url, headers=headers)


def cluster_status(cluster: str) -> str:
    """Nodes, resources and demands as the autoscaler sees them, and the jobs.

    Raises:
        ClusterError: it is not up, or does not answer.
    """
    with job_server(cluster) as url:
        client = connect(url)
        with _errors_of(url):
            status = client._do_request("GET", "/api/cluster_status?format=1").json()["data"]["clusterStatus"]
            jobs = [job for job in client.list_jobs() if job.submission_id]
    lines = [f"{job.submission_id}: {job.status}" for job in jobs]
    return "\n".join([str(status).strip(), "Jobs", "-" * 63, *(lines or ["(none)"])])


def _refuse_paths_of_this_machine(config: ExperimentConfig, cluster: str, reads: Sequence[str]) -> None:
    """Raise if the command would read or write a path that only this machine has."""
    results = {name: getattr(config, name) for name in ("output", "adapters", "synthetic", "metric_synthetic", "relations")}
    for name, path in results.items():
        if path is not None and "://" not in path:
            raise ClusterError(
                f"--cluster {cluster}: {name} {path} is a path of this machine, which its nodes do not see; give a URI such as "
                f"s3://BUCKET/{name}, or file:///… for a disk that all nodes share"
            )
    read = {section: data for section in reads if (data := getattr(config.data, section)) is not None}
    inputs = {f"data.{section}.source": data.source for section, data in read.items() if data.source not in EMBEDDED_DATA}
    inputs |= {f"data.{section}.root": data.root for section, data in read.items()}
    for name, path in (inputs | {"backbone.weights": config.backbone.weights}).items():
        if path is not None and Path(path).exists():
            raise ClusterError(
                f"--cluster {cluster}: {name} {path} is on this machine; put it on every node (file_mounts in the cluster's "
                "YAML) and give its path there, or file:///… on a disk that all nodes share"
            )


def _wants_token(url: str) -> bool:
    try:
        with urlopen(f"{url}/api/authentication_mode", timeout=_SECONDS_TO_ANSWER) as answer:
            return bool(json.load(answer)["authentication_mode"] != "disabled")
    except HTTPError as error:
        if error.code == 404:  # a Ray that knows no tokens
            return False
        raise _no_job_server(url, error) from error
    except (URLError, OSError, ValueError, KeyError, TypeError) as error:
        raise _no_job_server(url, error) from error


def _no_job_server(url: str, error: Exception) -> ClusterError:
    return ClusterError(
        f"--cluster: no job server of Ray answers at {url} ({error}); give the address of a running cluster's dashboard "
        "(`ray start --head` prints it; its port is 8265 unless chosen otherwise)"
    )


def _token(url: str) -> str:
    """As Ray looks for it: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, the file ~/.ray/auth_token."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return path.read_text().strip()
    except OSError as error:
        raise ClusterError(
            f"--cluster: {url} wants a token, and {path} cannot be read ({error.strerror}); put the cluster's token there "
            "(`ray get-auth-token` on its head prints it) or into RAY_AUTH_TOKEN"
        ) from error


@contextmanager
def _errors_of(url: str) -> Iterator[None]:
    """What the job client raises for a server that refuses or does not answer becomes a ClusterError."""
    from ray.exceptions import AuthenticationError
    from requests import RequestException

    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(
            f"--cluster: {url} does not accept the token; it is that of RAY_AUTH_TOKEN, else of the file RAY_AUTH_TOKEN_PATH, "
            "else of ~/.ray/auth_token, and `ray get-auth-token` on the cluster's head prints the right one"
        ) from error
    except (ConnectionError, RuntimeError, ValueError, RequestException) as error:
        raise ClusterError(f"--cluster: the job server at {url} refused: {error}") from error


def _is_this_machine(client: "JobSubmissionClient", url: str) -> bool:
    """Whether the cluster runs here: a loopback address may also be a tunnel, then its nodes have other names."""
    host = urlsplit(url).hostname or ""
    if host != "localhost" and not host.startswith("127."):
        return False
    with _errors_of(url):
        nodes = client._do_request("GET", "/nodes?view=summary", timeout=_SECONDS_TO_ANSWER).json()["data"]["summary"]
    return {node.get("hostname") for node in nodes} <= {socket.gethostname()}


def _submit_or_join(
    client: "JobSubmissionClient", words: Sequence[str], config: ExperimentConfig, *, here: bool, reporter: Reporter
) -> str:
    """The id of the job: of one that runs this very command with this config already, or of a new one."""
    there = config.model_copy(update={"ray": config.ray.model_copy(update={"address": "auto"})})
    name = f"lr-ray-{words[0]}-{digest_of([list(words), there.resolved()])[:12]}"
    earlier = {job.submission_id: job.status for job in client.list_jobs() if (job.submission_id or "").startswith(name)}
    for job, status in earlier.items():
        if not status.is_terminal():
            reporter.say(f"job {job} runs already: here is its log")
            return str(job)
    numbers = [int(number) for job in earlier if (number := str(job).removeprefix(f"{name}-")).isdecimal()]
    python = sys.executable if here else "python"
    with tempfile.TemporaryDirectory() as folder:
        _ship(there, Path(folder))
        job = client.submit_job(
            entrypoint=shlex.join([python, "-m", "lr_ray.cli", *words]),
            submission_id=f"{name}-{max(numbers, default=0) + 1}",
            runtime_env={"working_dir": folder, "env_vars": _environment(config, here=here)},
            metadata={"experiment": config.name},
        )
    reporter.say(f"job {job}: Ctrl-C leaves it running, the same command comes back to it")
    return str(job)


def _ship(config: ExperimentConfig, folder: Path) -> None:
    """What the job runs from: the package exactly as it is here, whatever is installed on the nodes, and the config."""
    for package in ("lr_ray", "lr_ray.cli", "lr_ray.configs"):
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        target = folder.joinpath(*package.split("."))
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(spec.submodule_search_locations[0], target, ignore=ignore, dirs_exist_ok=True)
    try:
        installed = distribution("lr-ray")
    except PackageNotFoundError:
        pass  # run from a checkout: artefacts will say that the version is unknown, as they do here
    else:
        metadata = folder / f"lr_ray-{installed.version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        found = installed.read_text("METADATA") or installed.read_text("PKG-INFO")  # the latter beside a checkout's code
        metadata.write_text(found or "", encoding="utf-8")
    (folder / CONFIG_NAME).write_text(json.dumps(config.resolved(), ensure_ascii=False), encoding="utf-8")


def _environment(config: ExperimentConfig, *, here: bool) -> dict[str, str]:
    """Of this process, what the job needs: AWS's variables, and those of the trackers that are asked for."""
    names = storage_environment().keys() - (set() if here else _OF_THIS_MACHINE)
    trackers = [f"{name.upper()}_" for name, where in config.tracking if where is not None]
    names |= {name for name in os.environ if name.startswith(tuple(trackers))}
    return {name: os.environ[name] for name in sorted(names)} | {"PYTHONUNBUFFERED": "1"}


def _stop_command(job: str, cluster: str, url: str) -> str:
    if is_launcher_yaml(cluster):
        return f"ray exec {shlex.quote(cluster)} 'ray job stop {job}'"
    return f"ray job stop {job} --address {url}"


def _follow(client: "JobSubmissionClient", job: str, *, stop: str, relay: Relay) -> int:
    """Print the job's log until it ends; returns its exit code."""
    import aiohttp

    async def tail() -> None:
        async for line in _lines(client.tail_job_logs(job)):
            relay.show(line)

    comes_back = f"the same command comes back to it, `{stop}` ends it"
    try:
        with closing(relay):
            asyncio.run(tail())
        info = client.get_job_info(job)
    except KeyboardInterrupt:
        print(f"detached from job {job}, which goes on; {comes_back}", file=sys.stderr)
        return DETACHED
    except (aiohttp.ClientError, OSError, RuntimeError) as error:
        raise ClusterError(f"lost the log of job {job} ({error}), which may go on; {comes_back}") from error
    if not info.status.is_terminal():
        raise ClusterError(f"lost the log of job {job}, which is {info.status.lower()}; {comes_back}")
    code: Any = info.driver_exit_code
    if code is None or info.status == "STOPPED":
        raise ClusterError(f"job {job} {info.status.lower()}: {info.message}; the same command starts it again")
    return int(code)


async def _lines(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """Whole lines of a job's log, without those that Ray puts before the job's own."""
    rest, started = "", False
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            if started:
                yield line
            started = started or line.startswith("Running entrypoint for job ")
    if rest:
        yield rest
