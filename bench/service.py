"""A service for `lr-ray bench serve`: `lr-ray serve` as a person starts it, with a key of high limits."""

import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch
from lr_ray.bench.processes import lr_ray

from lr_ray.config import ExperimentConfig
from lr_ray.errors import ClusterError
from lr_ray.serving.keys import add_key
from lr_ray.storage.adapters import write_adapter
from lr_ray.vit.backbone import load_backbone
from lr_ray.vit.lora import Adapter, AdapterSpec, LowRank

FATAL_S = 60.0
"""After this no single request is waited for."""
NUM_TASKS = 1000
_START_TIMEOUT_S = 240.0


@dataclass(frozen=True, kw_only=True)
class Running:
    """A service that was started for the bench.

    Attributes:
        process: of the command.
        url: without a slash at its end.
        headers: with the key.
        ready_s: from the command to its first answer.
    """

    process: subprocess.Popen[bytes]
    url: str
    headers: Mapping[str, str]
    ready_s: float

    def memory(self) -> Counter[str]:
        """Bytes of RSS, by title of process, the command's own included."""
        found: Counter[str] = Counter()
        above = psutil.Process(self.process.pid)
        for process in [above, *above.children(recursive=True)]:
            try:
                title = (
                    "lr-ray serve" if process == above else (process.cmdline() or [""])[0].partition(".")[0]
                )  # Ray adds the method at work
                found[title if title.startswith(("ray::", "lr-ray")) else "Ray's own"] += process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return found


def make_meta_lora(root: str, image_px: int) -> str:
    """As `lr-ray train` leaves one; of drawn weights, for time does not depend on them."""
    experiment = ExperimentConfig.model_validate(
        {"name": "bench", "output": f"{root}/run", "backbone": {"name": "embedded", "image_px": image_px}}
    )
    backbone = load_backbone(experiment.backbone)
    generator, width = torch.Generator().manual_seed(0), backbone.num_features
    modules = {
        f"blocks.{index}.attn.qkv": LowRank(
            a=0.02 * torch.randn(4, width, generator=generator),
            b=0.02 * torch.randn(3 * width, 4, generator=generator),
            scale=1.0,
        )
        for index in range(len(backbone.model.blocks))
    }
    spec = AdapterSpec(adapter_id="bench", digest="", backbone=backbone.name, backbone_digest=backbone.digest, class_names=())
    facts = {"kind": "meta_lora", "config": experiment.resolved()}
    write_adapter(experiment.meta_lora_root, Adapter(spec=spec, modules=modules), inputs={}, facts=facts)
    return experiment.meta_lora_root


@contextmanager
def running(meta_lora: str, root: str, image: bytes) -> Iterator[Running]:
    """`lr-ray serve`, with a key of high limits; ends with the context."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    keys = Path(root, "keys.json")
    secret = add_key(keys, "bench", requests_per_minute=10**7, bytes_per_minute=2**40, tasks=2 * NUM_TASKS, task_bytes=2**32)
    command = lr_ray("serve", meta_lora, "--port", str(port), "--tasks", f"{root}/tasks", "--keys", str(keys))
    url, headers, begun = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {secret}"}, time.perf_counter()
    with open(f"{root}/log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            ready_s = _first_answer(process, url, headers, image, begun, Path(root, "log"))
            yield Running(process=process, url=url, headers=headers, ready_s=ready_s)
        finally:
            process.terminate()
            try:
                process.wait(FATAL_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def _first_answer(
    process: subprocess.Popen[bytes], url: str, headers: Mapping[str, str], image: bytes, begun: float, log: Path
) -> float:
    """Seconds since `begun` until the features of an image came back."""
    pause = threading.Event()
    while time.perf_counter() - begun < _START_TIMEOUT_S and process.poll() is None:
        try:
            answer = httpx.post(
                f"{url}/v1/embeddings", content=image, headers={**headers, "Content-Type": "image/png"}, timeout=FATAL_S
            )
            if answer.status_code == 200:
                return time.perf_counter() - begun
        except httpx.TransportError:
            pass  # it does not listen yet
        pause.wait(0.05)
    raise ClusterError(f"the service did not answer in {_START_TIMEOUT_S:.0f} s: {log.read_text()[-500:]}")
