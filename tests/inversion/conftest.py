"""Adapters of three classes."""

from collections.abc import Callable
from functools import partial

import pytest

from lr_ray.vit.lora import Adapter


@pytest.fixture
def make_adapter(make_adapter: Callable[..., Adapter]) -> Callable[..., Adapter]:
    return partial(make_adapter, num_classes=3)
