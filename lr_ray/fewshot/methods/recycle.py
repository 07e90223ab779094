"""`recycle`: nearest class centre on the features of backbone + meta-LoRA, in their metric; the method of this project."""

from lr_ray.fewshot.methods.features import RECYCLE
from lr_ray.fewshot.methods.nn_metric import meta_lora_method

METHOD = meta_lora_method(
    "recycle",
    RECYCLE,
    "Hu et al., LoRA Recycle, CVPR 2025, arXiv 2412.02220, as docs/method.md changes it",
)
