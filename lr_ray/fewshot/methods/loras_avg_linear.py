"""`loras-avg-linear`: logistic regression on the features with the average of the LoRAs."""

from pydantic import Field

from lr_ray.fewshot.methods import FeatureMethod
from lr_ray.fewshot.methods.features import LORAS_AVG
from lr_ray.fewshot.methods.linear_probe import linear_head
from lr_ray.section import Section


class LorasAvgLinearSettings(Section):
    """Of `loras-avg-linear`."""

    scale: float = 1.0
    """Of the average."""
    c: float = Field(default=1.0, gt=0, le=10_000)
    """As of `linear-probe`."""


METHOD = FeatureMethod(
    name="loras-avg-linear",
    source="Hu et al., LoRA Recycle, CVPR 2025, arXiv 2412.02220: its LoRAs Avg + Linear; the probe is that of `linear-probe`",
    settings=LorasAvgLinearSettings,
    features=lambda settings: f"{LORAS_AVG}:{settings.scale:g}",
    head=lambda settings, _trained: linear_head(settings.c),
    num_trained=lambda _settings, n_way, dim: n_way * (dim + 1),
)
