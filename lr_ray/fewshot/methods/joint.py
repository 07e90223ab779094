"""`joint`: plain supervision on the synthetic images, all classes at once, in the place of episodes."""

from lr_ray.fewshot.methods import FeatureMethod
from lr_ray.fewshot.methods.features import JOINT
from lr_ray.fewshot.methods.nn_metric import MetaLoRASettings, centre_in_metric

METHOD = FeatureMethod(
    name="joint",
    source="Hu et al., LoRA Recycle, CVPR 2025, arXiv 2412.02220: its ablation",
    settings=MetaLoRASettings,
    features=lambda _settings: JOINT,
    head=lambda _settings, trained: centre_in_metric(trained),
    metric=lambda settings: bool(settings.metric),
)
