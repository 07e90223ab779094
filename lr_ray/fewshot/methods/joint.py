"""`joint`: plain supervision on the synthetic images, all classes at once, in the place of episodes."""

from lr_ray.fewshot.methods.features import JOINT
from lr_ray.fewshot.methods.nn_metric import meta_lora_method

METHOD = meta_lora_method(
    "joint",
    JOINT,
    "Hu et al., LoRA Recycle, CVPR 2025, arXiv 2412.02220: its ablation",
)
