"""The service on Ray Serve: the answers of `lr_ray.load`, also after a replica is killed; and how it is started."""

import asyncio
import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import lr_ray
from bench.processes import wait_until
from lr_ray.data.images import DataConfig
from lr_ray.data.load import load_data
from lr_ray.errors import AdapterError, ClusterError, ConfigError, RequestError
from lr_ray.runtime.deployments import ask_replicas
from lr_ray.runtime.serving import check_exposure, served
from lr_ray.serving.config import ServingConfig
from lr_ray.serving.keys import add_key
from lr_ray.serving.metrics import Metrics, Pass
from lr_ray.storage.filesystem import absolute_path
from lr_ray.storage.manifest import MANIFEST_NAME


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, list[Path]]:
    """Files of three digits, two to be labelled and two to be classified of each."""
    digits = load_data(DataConfig(source="digits", classes=("6:9",)))
    files: dict[str, list[Path]] = {}
    for index in [i for label in range(3) for i in np.flatnonzero(digits.labels == label)[:4]]:
        name = digits.class_names[digits.labels[index]]
        members = files.setdefault(name, [])
        folder = tmp_path / ("support" if len(members) < 2 else "query") / name
        folder.mkdir(parents=True, exist_ok=True)
        members.append(folder / f"{name}-{len(members)}.png")
        digits.open_image(int(index)).convert("RGB").resize((40, 36), Image.Resampling.NEAREST).save(members[-1])
    return files


def base64_of(files: Sequence[Path]) -> list[str]:
    return [base64.b64encode(file.read_bytes()).decode() for file in files]


def replicas_of_the_backbone() -> list[Any]:
    import ray

    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [ray.get_actor(name, namespace="serve") for name in names if name.startswith("SERVE_REPLICA::lr-ray#backbone#")]


@pytest.mark.slow
def test_the_answers_are_those_of_load_also_after_a_replica_is_killed(
    ray_cluster: None, meta_lora: str, pictures: dict[str, list[Path]], tmp_path: Path
):
    import ray

    support = {name: files[:2] for name, files in pictures.items()}
    queries = [file for files in pictures.values() for file in files[2:]]
    labels = [name for name in support for _ in range(2)]
    logits = lr_ray.load(meta_lora).classify([file for files in support.values() for file in files], labels, queries)
    names = sorted(set(labels))
    config = ServingConfig(meta_loras={"tiny": meta_lora}, tasks=str(tmp_path / "tasks"), port=free_port(), cpus_per_replica=1)

    def check(results: list[dict[str, Any]]) -> None:
        assert [row["class"] for row in results] == [names[column] for column in logits.argmax(dim=1)]
        distances = torch.tensor([[{c["class"]: c["distance"] for c in row["ranked"]}[n] for n in names] for row in results])
        torch.testing.assert_close(distances, -logits, rtol=0.02, atol=0.02)

    with served(config) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/readyz").json() == {"status": "ready"}
        task = client.post("/v1/tasks", json={"classes": {name: base64_of(files) for name, files in support.items()}}).json()
        body = {"images": base64_of(queries)}
        check(client.post(f"/v1/tasks/{task['id']}/classify", json=body).json()["results"])
        maps = {name: client.post("/v1/attention", json=body, params={"model": name}).json() for name in ("tiny", "backbone")}
        torch.testing.assert_close(torch.tensor(maps["tiny"]["grids"]), lr_ray.load(meta_lora).attend(queries))
        assert maps["backbone"] != maps["tiny"]
        assert client.get("/").text.startswith("<!doctype html>")

        (replica,) = replicas_of_the_backbone()
        ray.kill(replica)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: client.post(f"/v1/tasks/{task['id']}/classify", json=body), range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4, answers[0].text
        for answer in answers:
            check(answer.json()["results"])

        with httpx.Client(base_url=url, headers={"host": "evil.example"}) as foreign:
            assert foreign.get("/v1/tasks").status_code == 403
        with pytest.raises(ClusterError, match="Ray Serve runs already on this Ray; end it"), served(config):
            pass
        assert client.get("/v1/tasks").json()["tasks"][0]["id"] == task["id"]
        counted = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if not line.startswith("#"))
        assert float(counted["lr_ray_pass_images_sum"]) >= len(labels) + 5 * len(queries)  # told by replicas, also new ones
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")
    assert ray.is_initialized()


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_end(meta_lora: str, pictures: dict[str, list[Path]], tmp_path: Path):
    """In a process and a Ray of its own, as a person starts it: keys, SIGTERM under a request, which is finished."""
    port, keys = free_port(), tmp_path / "keys.json"
    secret = add_key(keys, "ann")
    command = [sys.executable, "-m", "lr_ray.cli", "serve", meta_lora, "--port", str(port), "--keys", str(keys)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(lr_ray.__file__).parents[1]), *sys.path])}
    process = subprocess.Popen(
        [*command, "--tasks", str(tmp_path / "tasks")],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        assert process.stdout.readline().startswith(f"http://127.0.0.1:{port}/v1, described in ")
        names = {name: base64_of(files[:2]) for name, files in pictures.items()}
        url, headers = f"http://127.0.0.1:{port}", {"authorization": f"Bearer {secret}"}
        assert httpx.post(f"{url}/v1/tasks", json={"classes": names}, timeout=60).status_code == 401
        large = {"classes": {name: 80 * images for name, images in names.items()}}
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(httpx.post, f"{url}/v1/tasks", json=large, timeout=120, headers=headers)
            under_way = "lr_ray_requests_under_way 1.0"
            wait_until(lambda: under_way in httpx.get(f"{url}/metrics", headers=headers, timeout=60).text, "the request")
            process.send_signal(signal.SIGTERM)
            assert slow.result().status_code == 201, slow.result().text
    except BaseException:
        process.send_signal(signal.SIGTERM)  # once only: the second ends it at once
        raise
    finally:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "ended with" not in err
    assert secret not in out
    assert secret not in err
    assert list((tmp_path / "tasks" / "ann").iterdir())


def test_other_machines_need_keys(meta_lora: str, tmp_path: Path):
    config = ServingConfig(meta_loras={"tiny": meta_lora}, tasks=str(tmp_path), host="0.0.0.0")
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 is reached from other machines; add --keys FILE"), served(config):
        pass
    with pytest.raises(ConfigError, match="No such file"):
        check_exposure(ServingConfig(meta_loras={"tiny": meta_lora}, tasks="", host="0.0.0.0", keys=tmp_path / "missing"))
    add_key(tmp_path / "keys.json", "ann")
    check_exposure(ServingConfig(meta_loras={"tiny": meta_lora}, tasks="", host="0.0.0.0", keys=tmp_path / "keys.json"))


def test_what_is_no_meta_lora_is_an_error_before_ray_starts(tmp_path: Path):
    with pytest.raises(AdapterError, match="is no adapter"), served(ServingConfig(meta_loras={"x": str(tmp_path)}, tasks="")):
        pass


@pytest.mark.slow
def test_a_backbone_that_cannot_load_is_one_line(ray_cluster: None, meta_lora: str, tmp_path: Path):
    shutil.copytree(meta_lora, other := tmp_path / "other")
    manifest = json.loads((other / MANIFEST_NAME).read_text())
    (other / MANIFEST_NAME).write_text(json.dumps(manifest | {"backbone_digest": 64 * "0"}))
    config = ServingConfig(meta_loras={"tiny": str(other)}, tasks=str(tmp_path / "tasks"), port=free_port(), cpus_per_replica=1)
    with pytest.raises(AdapterError, match=r"^meta-LoRA .*other was trained on .*train again$"), served(config):
        pass


def test_paths_are_absolute_and_uris_stay():
    assert absolute_path("tasks") == str(Path.cwd() / "tasks")
    assert absolute_path("s3://bucket/tasks") == "s3://bucket/tasks"


# ---------------------------------------------------------------------------------------------- batches and lost replicas


class Method:
    """A method of the backbone's handle that answers with means, after it has raised what is given."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures = list(failures)
        self.sizes: list[int] = []

    async def remote(self, group: np.ndarray, _model: str) -> tuple[np.ndarray, Pass | None] | None:
        self.sizes.append(len(group))
        if self.failures:
            failure = self.failures.pop(0)
            if failure is None:
                return None
            raise failure
        return group.mean(axis=(2, 3), dtype=np.float32), Pass(images=len(group), groups=1, seconds=0.1)


def test_large_requests_travel_in_groups_and_come_back_in_order():
    pixels = torch.randint(0, 256, (70, 3, 4, 4), dtype=torch.uint8)
    features = asyncio.run(ask_replicas(method := Method(), pixels, "m", metrics := Metrics()))
    assert sorted(method.sizes) == [6, 32, 32]
    torch.testing.assert_close(features, pixels.float().mean(dim=(2, 3)))
    assert b"lr_ray_pass_images_sum 70.0" in (exposed := metrics.expose())
    assert b"lr_ray_pass_groups_count 3.0" in exposed


def test_a_replica_without_the_model_is_not_the_last():
    pixels = torch.ones(1, 3, 4, 4, dtype=torch.uint8)
    assert asyncio.run(ask_replicas(Method(None, None), pixels, "m", Metrics(), pause_s=0)).tolist() == [[1, 1, 1]]
    with pytest.raises(RequestError, match="does not answer"):
        asyncio.run(ask_replicas(Method(*[None] * 9), pixels, "m", Metrics(), pause_s=0))


def test_a_lost_replica_is_asked_again():
    from ray.exceptions import RayActorError

    pixels = torch.ones(1, 3, 4, 4, dtype=torch.uint8)
    assert asyncio.run(ask_replicas(Method(RayActorError(), RayActorError()), pixels, "m", Metrics(), pause_s=0)).tolist() == [
        [1, 1, 1]
    ]


@pytest.mark.parametrize(("kind", "asked"), [("lost", 6), ("full", 1), ("given up", 1)])
def test_no_replica_and_a_full_queue_are_503(kind: str, asked: int):
    from ray.exceptions import RayActorError
    from ray.serve._private.common import DeploymentID
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    failures: dict[str, list[Exception | None]] = {
        "lost": [RayActorError()] * 9,
        "full": [BackPressureError(num_queued_requests=1, max_queued_requests=1)],
        "given up": [DeploymentUnavailableError(DeploymentID("backbone", "lr-ray"))],
    }
    method = Method(*failures[kind])
    with pytest.raises(RequestError) as caught:
        asyncio.run(ask_replicas(method, torch.ones(1, 3, 4, 4, dtype=torch.uint8), "m", Metrics(), pause_s=0))
    assert len(method.sizes) == asked
    assert caught.value.status == 503
    assert caught.value.retry_after_s


def test_a_fault_of_the_backbone_is_not_hidden():
    with pytest.raises(KeyError):
        asyncio.run(ask_replicas(Method(KeyError("x")), torch.ones(1, 3, 4, 4, dtype=torch.uint8), "m", Metrics()))
