"""`nn-metric`: nearest class centre in a metric learnt from the synthetic images: what these give without a meta-LoRA."""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor

from lr_ray.fewshot.methods import FeatureMethod, Head
from lr_ray.fewshot.methods.features import BACKBONE, FeaturesName
from lr_ray.fewshot.methods.nn import nearest_centre
from lr_ray.fewshot.metric import Metric, MetricConfig, fit_metric
from lr_ray.section import Section


class NNMetricSettings(Section):
    """Of `nn-metric`."""

    features: FeaturesName = BACKBONE
    """What they are of."""
    power: float | None = Field(default=None, ge=0)
    """In the place of `training.metric.power`."""
    shrinkage: float | None = Field(default=None, gt=0)
    """In the place of `training.metric.shrinkage`."""


class MetaLoRASettings(Section):
    """Of the methods that LR-Ray trains."""

    metric: bool = True
    """Whether in the metric that was kept with the meta-LoRA, or (the paper) as features are."""


def centre_in_metric(trained: Mapping[str, Tensor]) -> Head:
    """Nearest class centre in the metric of these tensors; as features are where there are none."""
    if not trained:
        return nearest_centre
    metric = Metric.of(trained)
    return lambda support, labels, queries: nearest_centre(metric(support), labels, metric(queries))


def meta_lora_method(name: str, features: str, source: str) -> FeatureMethod:
    """Nearest class centre with a meta-LoRA that LR-Ray trained, in the metric that was kept with it."""
    return FeatureMethod(
        name=name,
        source=source,
        settings=MetaLoRASettings,
        features=lambda _settings: features,
        head=lambda _settings, trained: centre_in_metric(trained),
        metric=lambda settings: bool(settings.metric),
    )


def _fit(settings: NNMetricSettings, features: Tensor, kinds: Tensor, _seed: int, metric: MetricConfig) -> dict[str, Tensor]:
    given = settings.model_dump(include={"power", "shrinkage"}, exclude_none=True)
    return fit_metric(features, kinds, metric.model_copy(update=given)).tensors()


METHOD = FeatureMethod(
    name="nn-metric",
    source="a control of this project; the covariance within classes: Hatch et al., Interspeech 2006; the mean: SimpleShot",
    settings=NNMetricSettings,
    features=lambda settings: str(settings.features),
    head=lambda _settings, trained: centre_in_metric(trained),
    fit=_fit,
    fit_on="synthetic",
)
