"""`oracle`: the same meta-training on the real images that the LoRAs were tuned on; what recycling aims at."""

from lr_ray.fewshot.methods.features import ORACLE
from lr_ray.fewshot.methods.nn_metric import meta_lora_method

METHOD = meta_lora_method(
    "oracle",
    ORACLE,
    "a ceiling: Snell et al., Prototypical Networks, NeurIPS 2017, arXiv 1703.05175, on a LoRA",
)
