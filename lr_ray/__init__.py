"""LR-Ray: recycle LoRAs of one Vision Transformer into a backbone that classifies new few-shot tasks."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lr_ray.runtime.inversion import invert_dataset

__all__ = ["invert_dataset"]


def __getattr__(name: str) -> Any:
    """What `__all__` names is imported when it is asked for: Ray and torch take seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'lr_ray' has no attribute {name!r}")
    from lr_ray.runtime import inversion

    return getattr(inversion, name)
