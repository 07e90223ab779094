"""`recycle`: nearest class centre on the features of backbone + meta-LoRA, in their metric; the method of this project."""

from lr_ray.fewshot.methods import FeatureMethod
from lr_ray.fewshot.methods.features import RECYCLE
from lr_ray.fewshot.methods.nn_metric import MetaLoRASettings, centre_in_metric

METHOD = FeatureMethod(
    name="recycle",
    source="Hu et al., LoRA Recycle, CVPR 2025, arXiv 2412.02220, as docs/method.md changes it",
    settings=MetaLoRASettings,
    features=lambda _settings: RECYCLE,
    head=lambda _settings, trained: centre_in_metric(trained),
    metric=lambda settings: bool(settings.metric),
)
