"""The application over a stand-in for the backbone, as a client of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

from lr_ray.serving.api import Service, make_app
from lr_ray.serving.keys import Keyring, add_key
from lr_ray.serving.limits import Limits
from lr_ray.serving.models import BACKBONE, Catalogue, ServedModel
from lr_ray.serving.store import TaskStore
from tests.serving.pictures import features_of

LIMITS = Limits(body_bytes=400_000, image_bytes=100_000, image_pixels=1_000_000, pixels=3_000_000, images=40, classes=6)


CATALOGUE = Catalogue(
    models=tuple(ServedModel(name=name, digest=name[0]) for name in ("mine", "other", BACKBONE)), num_features=12
)
SIGNS = {"mine": 1, "other": -1, BACKBONE: 0.5}


async def stand_in(pixels: Tensor, model: str) -> Tensor:
    """In the place of the replicas: each model has its own features."""
    return SIGNS[model] * features_of(pixels)


async def look(pixels: Tensor, model: str) -> Tensor:
    """In the place of the replicas: (N, 2, 2) shares, of the first model by brightness."""
    bright = pixels.float().mean(dim=1) if model == "mine" else torch.ones(len(pixels), *pixels.shape[2:])
    quarters = torch.nn.functional.adaptive_avg_pool2d(bright, 2)
    return quarters / quarters.sum(dim=(1, 2), keepdim=True)


@pytest.fixture
def service(tmp_path: Path) -> Service:
    store = TaskStore(root=str(tmp_path / "tasks"), models=CATALOGUE.digests)
    return Service(embed=stand_in, attend=look, models=CATALOGUE, image_px=16, store=store, limits=LIMITS)


@pytest.fixture
def connect() -> Callable[..., TestClient]:
    """`connect(service)`: a client on this machine; what fails is answered, not raised."""

    def open_client(service: Service, **headers: str) -> TestClient:
        app = make_app(service)
        return TestClient(app, base_url="http://127.0.0.1:8000", headers=headers, raise_server_exceptions=False)

    return open_client


@pytest.fixture
def client(service: Service, connect: Callable[..., TestClient]) -> TestClient:
    return connect(service)


@pytest.fixture
def keyed(service: Service, connect: Callable[..., TestClient], tmp_path: Path) -> Callable[..., TestClient]:
    """`keyed(name, **limits)`: a client with a new key of that name."""
    service.keyring = Keyring(path=tmp_path / "keys.json")

    def client_of(name: str, **limits: int) -> TestClient:
        return connect(service, authorization=f"Bearer {add_key(tmp_path / 'keys.json', name, **limits)}")

    return client_of
