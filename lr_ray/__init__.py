"""LR-Ray: recycle LoRAs of one Vision Transformer into a backbone that classifies new few-shot tasks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lr_ray.model import load
    from lr_ray.runtime.inversion import invert_dataset

__all__ = ["invert_dataset", "load"]

_MODULES = {"invert_dataset": "lr_ray.runtime.inversion", "load": "lr_ray.model"}


def __getattr__(name: str) -> Any:
    """What `__all__` names is imported when it is asked for: Ray and torch take seconds."""
    if name not in _MODULES:
        raise AttributeError(f"module 'lr_ray' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
