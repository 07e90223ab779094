"""The service on Ray Serve: replicas of the backbone, and in front of them one replica of the HTTP application.

A pass of the backbone takes the images of whatever requests wait, of any tasks and owners; prototypes are applied to each
request by itself, in the application.
"""

import asyncio
import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from torch import Tensor

from lr_ray.config import RayConfig
from lr_ray.errors import ClusterError, ConfigError, RequestError
from lr_ray.runtime.session import ray_session
from lr_ray.serving.api import Service, make_app
from lr_ray.serving.keys import Keyring, read_keys
from lr_ray.serving.models import Catalogue
from lr_ray.serving.multiplex import load_multiplex
from lr_ray.serving.problems import is_loopback
from lr_ray.serving.store import TaskStore

APP_NAME = "lr-ray"
_BACKBONE = "backbone"
_GROUP = 32
"""Images of a request that travel to a replica together."""
_GROUPS_PER_PASS = 8
_WAIT_S = 0.005
"""How long a pass waits for images of other requests."""
_ATTEMPTS = 6
_AT_ONCE = 32
"""Requests that are worked on; more wait, then so many again, then they are refused (503)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
    """What is served, and where.

    Attributes:
        meta_loras: folders or URIs of meta-LoRAs that `lr-ray train` wrote, by name; the first is the default.
        tasks: folder or URI where tasks are kept.
        keys: file of API keys; None for no keys, on this machine only.
        host: to listen on.
        port: of it.
        replicas: of the backbone.
        cpus_per_replica: processors of each; None shares out those that Ray has.
    """

    meta_loras: Mapping[str, str]
    tasks: str
    keys: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    cpus_per_replica: int | None = None


def serve_until_stopped(config: ServingConfig) -> Iterator[str]:
    """Serve; yields the service's URL when it is ready, then ends on Ctrl-C or SIGTERM.

    Raises: as `served`.
    """
    stopped = threading.Event()
    with served(config) as url, _signals(stopped):  # after Ray has set its own
        yield url
        stopped.wait()


@contextmanager
def served(config: ServingConfig) -> Iterator[str]:
    """The service, for as long as the context lasts; yields its URL when every replica is ready.

    Raises:
        AdapterError, BackboneError, StorageError: a meta-LoRA cannot be loaded.
        ClusterError: Ray cannot be started or joined, runs a Serve of its own, or the port is taken.
        ConfigError: another host than this machine without keys, an unusable file of keys, or meta-LoRAs that do not share
            a backbone and an image size.
    """
    check_exposure(config)
    loaded = load_multiplex(config.meta_loras)  # here first, for one line of error instead of a replica that will not start
    catalogue, image_px = loaded.catalogue, loaded.image_px
    del loaded
    with ray_session(RayConfig()):
        from ray import serve
        from ray.serve.config import HTTPOptions

        for noisy in ("ray.serve", "ray._common"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        if serve.status().applications:
            raise ClusterError("Ray Serve runs applications already on this Ray; end them, or start this on another Ray")
        try:
            serve.start(
                proxy_location="HeadOnly", http_options=HTTPOptions(host=config.host, port=config.port), logging_config=_quiet()
            )
            serve.run(_application(config, catalogue, image_px), name=APP_NAME, route_prefix="/")
            yield f"http://{'[' + config.host + ']' if ':' in config.host else config.host}:{config.port}"
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ClusterError(f"Ray Serve on {config.host}:{config.port}: {reason}; is the port free?") from error
        finally:
            serve.shutdown()


def check_exposure(config: ServingConfig) -> None:
    """Raise where others than this machine could come in without a key, or the keys cannot be read.

    Raises:
        ConfigError: see there.
    """
    if config.keys is not None:
        read_keys(config.keys)
    elif not is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host} is reached from other machines; add --keys FILE (`lr-ray serve key add NAME` makes one), "
            "or leave --host out"
        )


async def ask_replicas(method: Any, pixels: Tensor, model: str, *, pause_s: float = 0.5) -> Tensor:
    """(N, …) what the replicas make of (N, 3, H, W) pixels; what a replica dies of is asked of another.

    Args:
        method: `embed` or `attend` of the handle of the backbone's deployment.
        model: its name.
        pause_s: before the second attempt; longer before each further one.

    Raises:
        RequestError: 503 no replica answers, or too many requests wait already.
    """
    return torch.from_numpy(
        np.concatenate(
            await asyncio.gather(*(_ask_of_group(method, part.numpy(), model, pause_s) for part in pixels.split(_GROUP)))
        )
    )


async def _ask_of_group(method: Any, group: np.ndarray, model: str, pause_s: float) -> np.ndarray:
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError

    for attempt in range(1, _ATTEMPTS + 1):
        try:
            found: np.ndarray = await method.remote(group, model)
            return found
        except BackPressureError as error:
            raise RequestError("too many requests wait already; come again", 503, 1) from error
        except RayActorError:
            await asyncio.sleep(pause_s * attempt)
    raise RequestError("the backbone does not answer; come again", 503, 5)


_services: list[Service] = []
"""Of this process, where it is a replica of the application; one at most."""


def _start_service(config: ServingConfig, catalogue: Catalogue, image_px: int, backbone: Any) -> None:
    async def embed(pixels: Tensor, model: str) -> Tensor:
        return await ask_replicas(backbone.embed, pixels, model)

    async def attend(pixels: Tensor, model: str) -> Tensor:
        return await ask_replicas(backbone.attend, pixels, model)

    store = TaskStore(root=config.tasks, models=catalogue.digests)
    keyring = None if config.keys is None else Keyring(path=config.keys)
    _services[:] = [Service(embed=embed, attend=attend, models=catalogue, image_px=image_px, store=store, keyring=keyring)]


def _application_of_this_process() -> FastAPI:
    return make_app(_services[0])


def _application(config: ServingConfig, catalogue: Catalogue, image_px: int) -> Any:
    """What Ray Serve runs."""
    import ray
    from ray import serve

    cpus = config.cpus_per_replica or max(1, int(ray.cluster_resources()["CPU"]) // config.replicas)

    @serve.deployment(
        name=_BACKBONE,
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": cpus},
        max_ongoing_requests=4 * _GROUPS_PER_PASS,
        max_queued_requests=16 * _GROUPS_PER_PASS,
        health_check_period_s=2,
    )
    class Backbone:
        def __init__(self, meta_loras: Mapping[str, str], cpus: int) -> None:
            torch.set_num_threads(cpus)
            self._multiplex = load_multiplex(meta_loras)

        @serve.batch(max_batch_size=_GROUPS_PER_PASS, batch_wait_timeout_s=_WAIT_S)  # type: ignore[untyped-decorator]
        async def embed(self, groups: list[np.ndarray], models: list[str]) -> list[np.ndarray]:
            return await asyncio.to_thread(self._multiplex.embed_groups, groups, models)

        async def attend(self, group: np.ndarray, model: str) -> np.ndarray:
            return (await asyncio.to_thread(self._multiplex.attend, model, torch.from_numpy(group))).numpy()

    @serve.deployment(
        name="application", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=_AT_ONCE, max_queued_requests=_AT_ONCE
    )
    @serve.ingress(_application_of_this_process)
    class Application:
        def __init__(self, config: ServingConfig, catalogue: Catalogue, image_px: int, backbone: Any) -> None:
            _start_service(config, catalogue, image_px, backbone)

    deployed: Any = Application  # what the decorators make of a class is typed as the class
    backbone: Any = Backbone
    return deployed.bind(config, catalogue, image_px, backbone.bind(config.meta_loras, cpus))


def _quiet() -> Any:
    """No line for every request: a service may have many, and none of it is anyone else's business."""
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="WARNING", enable_access_log=False)


@contextmanager
def _signals(stopped: threading.Event) -> Iterator[None]:
    """Within the context SIGTERM and Ctrl-C set the event."""
    wanted = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
