"""`loras-avg`, `loras-avg:SCALE`: nearest class centre with the average of the LoRAs, times a scale."""

from lr_ray.fewshot.methods import FeatureMethod
from lr_ray.fewshot.methods.features import LORAS_AVG
from lr_ray.fewshot.methods.nn import nearest_centre
from lr_ray.section import Section


class LorasAvgSettings(Section):
    """Of `loras-avg`."""

    scale: float = 1.0
    """Of the average."""


METHOD = FeatureMethod(
    name="loras-avg",
    source="Hu et al., LoRA Recycle, CVPR 2025, arXiv 2412.02220: its LoRAs Avg + NN, of the products",
    settings=LorasAvgSettings,
    features=lambda settings: f"{LORAS_AVG}:{settings.scale:g}",
    head=lambda _settings, _trained: nearest_centre,
)
