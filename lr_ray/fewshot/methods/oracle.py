"""`oracle`: the same meta-training on the real images that the LoRAs were tuned on; what recycling aims at."""

from lr_ray.fewshot.methods import FeatureMethod
from lr_ray.fewshot.methods.features import ORACLE
from lr_ray.fewshot.methods.nn_metric import MetaLoRASettings, centre_in_metric

METHOD = FeatureMethod(
    name="oracle",
    source="a ceiling: Snell et al., Prototypical Networks, NeurIPS 2017, arXiv 1703.05175, on a LoRA",
    settings=MetaLoRASettings,
    features=lambda _settings: ORACLE,
    head=lambda _settings, trained: centre_in_metric(trained),
    metric=lambda settings: bool(settings.metric),
)
