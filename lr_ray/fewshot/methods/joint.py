"""`joint`: plain supervision on the synthetic images, all classes at once, in the place of episodes."""

from lr_ray.fewshot.methods import FeatureMethod
from lr_ray.fewshot.methods.features import JOINT
from lr_ray.fewshot.methods.nn import nearest_centre

METHOD = FeatureMethod(
    name="joint",
    source="Hu et al., LoRA Recycle, CVPR 2025, arXiv 2412.02220: its ablation",
    features=lambda _settings: JOINT,
    head=lambda _settings, _trained: nearest_centre,
)
