"""`recycle`: nearest class centre on the features of backbone + meta-LoRA, the method of this project."""

from lr_ray.fewshot.methods import FeatureMethod
from lr_ray.fewshot.methods.features import RECYCLE
from lr_ray.fewshot.methods.nn import nearest_centre

METHOD = FeatureMethod(
    name="recycle",
    source="Hu et al., LoRA Recycle, CVPR 2025, arXiv 2412.02220, as docs/method.md changes it",
    features=lambda _settings: RECYCLE,
    head=lambda _settings, _trained: nearest_centre,
)
