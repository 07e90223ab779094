"""Clusters of Ray's launcher: check a cluster's YAML, bring it up and down, reach the job server on its head."""

import io
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from lr_ray.errors import ClusterError

PROVIDERS = ("aws", "gcp", "azure", "aliyun", "vsphere", "local")
_KUBERAY_KINDS = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig", "RayCluster": None}
"""And under which key of their spec the cluster is."""
_TUNNEL_SECONDS = 60


def is_launcher_yaml(cluster: str) -> bool:
    """Whether `--cluster` was given a file and not an address."""
    return cluster.endswith((".yaml", ".yml"))


def check_cluster(path: str | Path) -> str:
    """Check a cluster's YAML against Ray's own schema, offline; returns in a few words what it describes.

    Raises:
        ClusterError: unreadable, no cluster, an unknown provider, or not what Ray accepts.
    """
    content = _read(path)
    if str(content.get("kind")) in _KUBERAY_KINDS:
        config = _validated(path, lambda: _from_kuberay(content))
        provider = f"KubeRay {content['kind']}"
    else:
        provider = _provider(path, content)
        config = _validated(path, lambda: content)
        _check_images(path, config)
    return f"{provider}, cluster {config['cluster_name']!r}, at most {config['max_workers']} workers"


def bring_up(path: str) -> None:
    """Start the cluster, or bring a running one to what the YAML says now; jobs that run there go on, unless the head changed.

    Raises:
        ClusterError: the YAML is wrong, or the launcher failed.
    """
    check_launchable(path)
    running = is_up(path)
    from ray.autoscaler.sdk import create_or_update_cluster

    with _launcher(path, "bring it up"):
        create_or_update_cluster(path, no_restart=running)


def take_down(path: str) -> None:
    """End every node of the cluster.

    Raises:
        ClusterError: the YAML is wrong, or the launcher failed.
    """
    check_launchable(path)
    from ray.autoscaler.sdk import teardown_cluster

    with _launcher(path, "take it down"):
        teardown_cluster(path)


def is_up(path: str) -> bool:
    """Whether the cluster has a head.

    Raises:
        ClusterError: the provider cannot be asked.
    """
    from ray.autoscaler.sdk import get_head_node_ip

    with _launcher(path, "look for its head"):
        try:
            get_head_node_ip(path)
        except RuntimeError as error:
            if "not found" not in str(error):
                raise
            return False
    return True


@contextmanager
def job_server(cluster: str) -> Iterator[str]:
    """The URL of the cluster's dashboard, which is its job server; for a launcher's YAML, through an SSH tunnel.

    Args:
        cluster: a launcher's YAML, `auto`, or the dashboard's address with or without `http://`.

    Raises:
        ClusterError: it is not up, or cannot be reached.
    """
    if not is_launcher_yaml(cluster):
        yield _dashboard_url(cluster)
        return
    check_launchable(cluster)
    if not is_up(cluster):
        raise ClusterError(f"cluster {cluster} is not up; add --up, or run `lr-ray cluster up {cluster}`")
    port = _free_port()
    with tempfile.TemporaryFile("w+") as log:
        command = _tunnel_command(cluster, port)
        tunnel = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for_tunnel(tunnel, port, cluster, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end_session(tunnel)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ClusterError(f"cluster {path}: {error}; give a cluster's YAML such as cluster/aws.yaml") from error
    if not isinstance(content, dict):
        raise ClusterError(f"cluster {path}: a mapping is needed at the top, not {type(content).__name__}")
    return content


def _provider(path: str | Path, content: dict[str, Any]) -> str:
    provider = content.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    if kind not in PROVIDERS:
        what = "no cluster of Ray's launcher: it lacks provider.type" if kind is None else f"unknown provider {kind!r}"
        raise ClusterError(
            f"cluster {path}: {what}; allowed are {', '.join(PROVIDERS)}, or a KubeRay {' or '.join(_KUBERAY_KINDS)}"
        )
    return str(kind)


def _validated(path: str | Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The config with Ray's defaults, valid by Ray's schema."""
    from click import ClickException
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler").setLevel(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it prints what it also raises
            config: dict[str, Any] = prepare_config(deepcopy(make()))
            validate_config(config)
    except ValidationError as error:
        raise ClusterError(f"cluster {path}: {error.json_path.removeprefix('$.')}: {error.message}") from error
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        RuntimeError,
        ClickException,
    ) as error:  # Ray's reader expects a valid file
        raise ClusterError(f"cluster {path}: Ray does not accept it: {type(error).__name__}: {error}") from error
    return config


def _check_images(path: str | Path, config: dict[str, Any]) -> None:
    """Raise where Ray's autoscaler would find no image for a type of node, as its own schema does not say."""
    for name, node_type in config["available_node_types"].items():
        docker = (config.get("docker") or {}) | (node_type.get("docker") or {})
        if docker.get("container_name") and "image" not in docker:
            raise ClusterError(
                f"cluster {path}: docker.image is missing, without which Ray's autoscaler starts no {name}, also where there "
                "are head_image and worker_image; give the workers' image there"
            )


def _from_kuberay(content: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    part = _KUBERAY_KINDS[content["kind"]]
    spec = content["spec"] if part is None else content["spec"][part]
    metadata = {"namespace": "default"} | content["metadata"]
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": spec})
    return config


def check_launchable(path: str) -> None:
    """Raise a `ClusterError` unless Ray's launcher takes the YAML, as far as that can be said offline."""
    content = _read(path)
    if str(content.get("kind")) in _KUBERAY_KINDS:
        raise ClusterError(
            f"cluster {path} is a KubeRay {content['kind']}, which kubectl brings up and down: `kubectl apply -f {path}`, "
            "then `kubectl port-forward` to its head service and give the address: --cluster http://127.0.0.1:8265"
        )
    check_cluster(path)


@contextmanager
def _launcher(path: str, verb: str) -> Iterator[None]:
    """What the launcher raises, which may be any of a cloud's own exceptions, becomes a ClusterError."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ClusterError(f"cluster {path}: Ray's launcher could not {verb}: {type(error).__name__}: {error}") from error


def _dashboard_url(address: str) -> str:
    if address == "auto":
        return "http://127.0.0.1:8265"
    scheme, separator, rest = address.rpartition("://")
    if separator and scheme not in ("http", "https"):
        raise ClusterError(
            f"--cluster {address}: a job is handed to the cluster's dashboard; give http://HOST:8265, auto (that of this "
            "machine), or a cluster's YAML"
        )
    return f"{scheme or 'http'}://{rest.rstrip('/')}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tunnel_command(path: str, port: int) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", "dashboard", path, "--port", str(port)]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait_for_tunnel(tunnel: subprocess.Popen[bytes], port: int, cluster: str, log: Any) -> None:
    deadline = time.monotonic() + _TUNNEL_SECONDS
    while time.monotonic() < deadline:
        try:
            tunnel.wait(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            if _listens(port):
                return
    log.seek(0)
    last = " ".join(log.read().split()[-40:])
    raise ClusterError(f"cluster {cluster}: no SSH tunnel to its dashboard within {_TUNNEL_SECONDS} s: {last}")


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, and what it started: `ray dashboard` leaves its ssh to itself."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()
