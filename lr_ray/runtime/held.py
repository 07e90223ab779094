"""What a process keeps from one task or step to the next."""

from functools import lru_cache
from pathlib import Path

from lr_ray.vit.backbone import Backbone, BackboneConfig, load_backbone


def held_backbone(config: BackboneConfig, device: str = "cpu") -> Backbone:
    """The backbone as `load_backbone` gives it, loaded once as long as its file is the same; whoever uses it leaves it so."""
    file = Path((config.weights or "").removeprefix("file://"))  # as `load_backbone` reads it
    return _loaded(config, device, file.stat().st_mtime_ns if file.is_file() else 0)


@lru_cache(maxsize=1)
def _loaded(config: BackboneConfig, device: str, _changed_ns: int) -> Backbone:
    return load_backbone(config, device=device)
