"""What runs on Ray Serve: replicas of the backbone, and in front of them one replica of the HTTP application.

A pass of the backbone takes the images of whatever requests wait, of any tasks and owners; prototypes are applied to each
request by itself, in the application. This module is imported by who starts the service, too, so that what takes long to
import, torch before all, is imported where it is used.
"""

import asyncio
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lr_ray.errors import RequestError
from lr_ray.serving.batches import Batcher
from lr_ray.serving.config import ServingConfig
from lr_ray.serving.keys import Keyring
from lr_ray.serving.metrics import Metrics, Pass
from lr_ray.serving.models import Catalogue
from lr_ray.serving.tracing import tracer_of_environment

if TYPE_CHECKING:
    from fastapi import FastAPI
    from torch import Tensor

    from lr_ray.serving.service import Service

BACKBONE = "backbone"
APPLICATION = "application"
_GROUP = 32
"""Images of a request that travel to a replica together."""
_ONGOING = 64
"""Groups that a replica has at once; more replicas are wanted where each has an eighth of that."""
_IMAGES_PER_PASS = {"cpu": 64, "cuda": 256}
"""By device; on processors more together are no faster, and the next wait longer."""
_ATTEMPTS = 6
_BEYOND_THE_GATE = 512
"""Requests that Ray Serve lets into the application and has wait before it: more than the gate does, which answers the
others with problem+json."""
_SHUTDOWN_S = 30.0


async def ask_replicas(method: Any, pixels: "Tensor", model: str, metrics: Metrics, *, pause_s: float = 0.5) -> "Tensor":
    """(N, …) what the replicas make of (N, 3, H, W) pixels; what a replica dies of is asked of another.

    Args:
        method: `embed` or `attend` of the handle of the backbone's deployment.
        model: its digest.
        metrics: are told of the passes.
        pause_s: before the second attempt; longer before each further one.

    Raises:
        RequestError: 503 no replica answers, or none that has the model.
    """
    import torch

    groups = (_ask_of_group(method, part.numpy(), model, metrics, pause_s) for part in pixels.split(_GROUP))
    return torch.from_numpy(np.concatenate(await asyncio.gather(*groups)))


async def _ask_of_group(method: Any, group: np.ndarray, model: str, metrics: Metrics, pause_s: float) -> np.ndarray:
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    for attempt in range(_ATTEMPTS):
        if attempt:
            await asyncio.sleep(pause_s * attempt)
        try:
            found: tuple[np.ndarray, Pass | None] | None = await method.remote(group, model)
            if found is not None:
                if found[1] is not None:
                    metrics.count_pass(found[1])
                return found[0]
        except BackPressureError as error:
            raise RequestError("too many requests wait already; come again", 503, 1) from error
        except DeploymentUnavailableError:
            break  # Serve has given it up
        except RayActorError:
            pass  # what it was asked is asked of another
    raise RequestError("the backbone does not answer; come again", 503, 5)


Models: TypeAlias = tuple[Catalogue, int]
"""What the backbone's replicas have loaded, and the side of their images."""
_services: list["Service"] = []
"""Of this process, where it is a replica of the application; one at most. Only functions of this module may use it: the
deployments' own methods travel with copies of what they name."""


async def _start_service(config: ServingConfig, models: Models | None, backbone: Any) -> None:
    from lr_ray.serving.service import Service
    from lr_ray.serving.store import TaskStore

    metrics = Metrics(tracer_of_environment())
    catalogue, image_px = models or await backbone.describe.remote()

    async def embed(pixels: "Tensor", model: str) -> "Tensor":
        return await ask_replicas(backbone.embed, pixels, catalogue.find(model).digest, metrics)

    async def attend(pixels: "Tensor", model: str) -> "Tensor":
        return await ask_replicas(backbone.attend, pixels, catalogue.find(model).digest, metrics)

    store = TaskStore(root=config.tasks, models=catalogue.digests)
    keyring = None if config.keys is None else Keyring(path=config.keys)
    _services[:] = [
        Service(
            embed=embed,
            attend=attend,
            models=catalogue,
            image_px=image_px,
            store=store,
            keyring=keyring,
            metrics=metrics,
        )
    ]


def _application_of_this_process() -> "FastAPI":
    from lr_ray.serving.api import make_app

    return make_app(_services[0])


async def _drain_this_process(timeout_s: float) -> bool:
    return await _services[0].gate.drain(timeout_s)


def backbone_options(config: ServingConfig, resources: Mapping[str, float]) -> dict[str, Any]:
    """Of the backbone's deployment.

    A replica computes with all of its processors but reserves half of them, so that while it is exchanged for another there
    is room for both.

    Args:
        resources: that Ray has.
    """
    most = config.max_replicas or config.replicas
    share = resources.get("CPU", 1) / most
    cpus = config.cpus_per_replica or min(share, max(1, int(share)))
    shared = 1 / math.ceil(most / there) if (there := resources.get("GPU", 0.0)) else 0.0  # none lies on two GPUs
    gpus = shared if config.gpus_per_replica is None else config.gpus_per_replica
    count: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas is not None:
        scaling = {"min_replicas": config.replicas, "initial_replicas": config.replicas, "max_replicas": config.max_replicas}
        count = {"autoscaling_config": {**scaling, "target_ongoing_requests": _ONGOING // 8}}
    return count | {
        "ray_actor_options": {"num_cpus": cpus / 2, "num_gpus": gpus},
        "max_ongoing_requests": _ONGOING,
        "max_queued_requests": -1,  # the gate has let them in
        "max_surge_percent": 0 if gpus else 100,
        "health_check_period_s": 2,
        "graceful_shutdown_timeout_s": _SHUTDOWN_S,
    }


def application(config: ServingConfig, models: Models | None) -> Any:
    """What Ray Serve runs.

    Args:
        config: of it.
        models: that the backbone's replicas are going to load. None asks the first of them, which must be there before any
            request then and is not tried twice: for a service that takes no other's place.
    """
    import ray
    from ray import serve

    options = backbone_options(config, ray.cluster_resources())
    if models is None:
        options["max_constructor_retry_count"] = 1
    device = "cuda" if options["ray_actor_options"]["num_gpus"] else "cpu"

    @serve.deployment(name=BACKBONE, **options)
    class Backbone:
        def __init__(self, config: ServingConfig, threads: int, device: str) -> None:
            import torch

            from lr_ray.serving.multiplex import load_multiplex

            torch.set_num_threads(threads)
            self._multiplex = load_multiplex(config.meta_loras, device, precision=config.precision, threads=threads)
            self._names = {model.digest: model.name for model in self._multiplex.catalogue.models}
            self._passes = Batcher(self._embed, size=lambda asked: len(asked[0]), most=_IMAGES_PER_PASS[device])

        async def describe(self) -> Models:
            """What was loaded."""
            return self._multiplex.catalogue, self._multiplex.image_px

        async def embed(self, group: np.ndarray, model: str) -> tuple[np.ndarray, Pass | None] | None:
            """Features of (n, 3, H, W) images; None where this replica has not that model."""
            name = self._names.get(model)
            return None if name is None else await self._passes.ask((group, name))

        async def _embed(self, asked: list[tuple[np.ndarray, str]]) -> list[tuple[np.ndarray, Pass | None]]:
            groups, names = [group for group, _ in asked], [name for _, name in asked]
            start = time.perf_counter()
            found = await asyncio.to_thread(self._multiplex.embed_groups, groups, names)
            told = Pass(images=sum(map(len, groups)), groups=len(groups), seconds=time.perf_counter() - start)
            return [(features, None if index else told) for index, features in enumerate(found)]

        async def attend(self, group: np.ndarray, model: str) -> tuple[np.ndarray, None] | None:
            """Attention maps, likewise."""
            name = self._names.get(model)
            if name is None:
                return None
            import torch

            return (await asyncio.to_thread(self._multiplex.attend, name, torch.from_numpy(group))).numpy(), None

    @serve.deployment(
        name=APPLICATION,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_BEYOND_THE_GATE,
        max_queued_requests=_BEYOND_THE_GATE,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=_SHUTDOWN_S,
    )
    @serve.ingress(_application_of_this_process)
    class Application:
        async def __init__(self, config: ServingConfig, models: Models | None, backbone: Any) -> None:  # type: ignore[misc]
            await _start_service(config, models, backbone)

        async def drain(self, timeout_s: float) -> bool:
            """See `Gate.drain`."""
            return await _drain_this_process(timeout_s)

    deployed: Any = Application  # what the decorators make of a class is typed as the class
    backbone: Any = Backbone
    threads = 1 if device == "cuda" else max(1, round(2 * options["ray_actor_options"]["num_cpus"]))
    return deployed.bind(config, models, backbone.bind(config, threads, device))
