"""How a cluster grows from no workers on the demand of an inversion, and shrinks when it is idle.

    python -m bench.autoscaling

Writes bench/results/autoscaling.json. The autoscaler is Ray's own; its nodes are raylets on this machine, started and
ended by Ray's fake provider, and the job comes by `lr-ray invert --cluster`, as it would to a real cluster.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from lr_ray.bench.processes import lr_ray, wait_until
from lr_ray.bench.speed import write_result

from lr_ray.storage.adapters import with_digest, write_adapter
from lr_ray.vit.backbone import load_backbone
from lr_ray.vit.lora import Adapter, AdapterSpec, LoRAConfig, attach_lora, extract_lora
from tests.jobs import changed, tiny

MOST_WORKERS = 2
IDLE_S = 6
CPUS_OF_A_WORKER = 2
"""One more than the head has: the actors of an inversion that take as many fit on workers alone."""
TOKEN = "a-token-for-a-cluster-on-loopback-only"
_HEAD_ID = 51 * "f" + "00000"
_HEAD_TYPE = "ray.head.default"


def environment() -> dict[str, str]:
    """Of every process of the cluster and of those that talk to it."""
    return os.environ | {
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }


@contextmanager
def autoscaling_cluster() -> Iterator[str]:
    """A head on loopback that wants a token and starts up to `MOST_WORKERS` workers; yields its dashboard's URL."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lr-ray-", ignore_cleanup_errors=True)))
        port, dashboard_port, client_port = _free_ports(3)
        config = folder / "autoscaling.yaml"
        config.write_text(json.dumps(_autoscaling_config(port)))
        log = stack.enter_context((folder / "head.log").open("w+"))
        command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
        command += [f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={client_port}"]
        command += ["--dashboard-agent-listen-port=0", "--node-ip-address=127.0.0.1", "--num-cpus=1", f"--temp-dir={folder}"]
        command += ["--disable-usage-stats", f"--autoscaling-config={config}"]
        settings = {
            "RAY_AUTH_MODE": "token",
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        }
        head = subprocess.Popen(command, env=environment() | settings, stdout=log, stderr=log, start_new_session=True)
        stack.callback(_end_session, head)
        url = f"http://127.0.0.1:{dashboard_port}"
        wait_until(lambda: _answers(url) or head.poll() is not None, "the dashboard")
        log.seek(0)
        assert head.poll() is None, log.read()
        yield url


@contextmanager
def sizes(url: str) -> Iterator[list[tuple[float, int]]]:
    """The number of workers over time, as (seconds, workers) at each change; goes on as long as the context lasts."""
    found: list[tuple[float, int]] = []
    over = threading.Event()
    start = time.monotonic()

    def look() -> None:
        while True:
            workers = count_workers(url)
            if not found or found[-1][1] != workers:
                found.append((round(time.monotonic() - start, 1), workers))
            if over.wait(0.3):
                return

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


@contextmanager
def no_new_workers() -> Iterator[None]:
    """As in a cloud that has no machine to give: the autoscaler stands still for as long as the context lasts."""
    of_head = [process for process in psutil.process_iter() if _is_autoscaler(process)]
    assert of_head, "a cluster's autoscaler was expected"
    for process in of_head:
        process.suspend()
    try:
        yield
    finally:
        for process in of_head:
            process.resume()


def count_workers(url: str) -> int:
    """Nodes that are alive, without the head."""
    nodes = _get(f"{url}/api/v0/nodes?detail=false")["data"]["result"]["result"]
    return sum(node["state"] == "ALIVE" and not node["is_head_node"] for node in nodes)


def write_job(folder: Path, *, num_adapters: int, num_steps: int) -> Path:
    """The config of an inversion whose actors need a worker each, and untrained adapters for it."""
    ray = {"cpus_per_actor": CPUS_OF_A_WORKER, "max_actors": MOST_WORKERS}
    config = changed(tiny(folder), inversion={"num_steps": num_steps}, ray=ray)
    backbone = load_backbone(config.backbone)
    attach_lora(backbone.model, LoRAConfig(rank=2), generator=torch.Generator().manual_seed(0))
    modules, head_weight = extract_lora(backbone.model), torch.eye(3, backbone.num_features)
    for index in range(num_adapters):
        spec = AdapterSpec(
            adapter_id=f"adapter-{index}",
            digest="",
            backbone="tiny",
            backbone_digest=backbone.digest,
            class_names=("a", "b", "c"),
        )
        adapter = Adapter(spec=spec, modules=modules, head_weight=head_weight, head_bias=torch.full((3,), float(index)))
        write_adapter(f"{config.adapters_root}/{spec.adapter_id}", with_digest(adapter), inputs={}, facts={})
    path = folder / "experiment.yaml"
    path.write_text(json.dumps(config.resolved()))
    return path


def _autoscaling_config(port: int) -> dict[str, Any]:
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
    commands = ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    return {
        "cluster_name": "loopback",
        "max_workers": MOST_WORKERS,
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 1000,
        "provider": {
            "type": "external",
            "module": "bench.fake_nodes.FakeNodes",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
        },
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": CPUS_OF_A_WORKER},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MOST_WORKERS,
            },
        },
        **{name: {} for name in ("docker", "auth", "file_mounts")},
        **{name: [] for name in (*lists, *commands)},
    }


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _get(url: str) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def _answers(url: str) -> bool:
    try:
        return bool(_get(f"{url}/api/v0/nodes?detail=false")["data"]["result"]["result"])
    except OSError:
        return False


def _is_autoscaler(process: psutil.Process) -> bool:
    try:
        of_head = process.environ().get("RAY_CLOUD_INSTANCE_ID") == _HEAD_ID
        return of_head and any(word.endswith("monitor.py") for word in process.cmdline())
    except psutil.Error:  # ended, or another user's
        return False


def _end_session(head: subprocess.Popen[bytes]) -> None:
    """End the head and all that it started: the fake provider's raylets outlive it."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == head.pid:
                process.send_signal(signal.SIGKILL)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    head.wait()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, autoscaling_cluster() as url:
        config = write_job(Path(folder), num_adapters=6, num_steps=200)
        with sizes(url) as found:
            start = time.monotonic()
            subprocess.run(lr_ray("invert", "-c", str(config), "--cluster", url), env=environment(), check=True)
            finished = round(time.monotonic() - start, 1)
            wait_until(lambda: found[-1][1] == 0, "a cluster without workers")
    rows = [{"seconds": seconds, "workers": workers} for seconds, workers in found]
    result = {"sizes": rows, "job_finished_s": finished, "idle_timeout_s": IDLE_S}
    print(json.dumps(write_result("autoscaling", result)))


if __name__ == "__main__":
    main()
