"""What a worker keeps from one of its tasks to the next."""

from functools import lru_cache

from lr_ray.vit.backbone import Backbone, BackboneConfig, load_backbone


@lru_cache(maxsize=1)
def held_backbone(config: BackboneConfig, device: str) -> Backbone:
    """The backbone as `load_backbone` gives it, loaded by the worker's first task; each task leaves it as it was."""
    return load_backbone(config, device=device)
