"""Heads that easyfsl has, on our features: an optional extra (`pip install 'lr-ray[heads]'`).

They were made for features of unit length, which easyfsl leaves to its caller; so all are given those, SimpleShot's centred
before by the mean of real images of other classes, PT-MAP's as in `_powered`. BD-CSPN as easyfsl has it weighs by exp(cos),
where others take a softmax of 10 · cos, and does not shift the queries that it classifies.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lr_ray.fewshot.methods import FeatureMethod, Head
from lr_ray.fewshot.methods.features import BACKBONE, FeaturesName
from lr_ray.fewshot.metric import MetricConfig
from lr_ray.section import Section


class EasyfslSettings(Section):
    """Of a head that easyfsl has; all but the first are arguments of its class."""

    features: FeaturesName = BACKBONE
    """What they are of."""


class LaplacianShotSettings(EasyfslSettings):
    """Of `laplacian-shot`; easyfsl's defaults, tuned on 5-way 5-shot tasks of miniImageNet."""

    knn: int = Field(default=3, gt=0)
    """Neighbours of a query (the authors: 3)."""
    lambda_regularization: float = Field(default=0.7, ge=0)
    """Of the Laplacian (the authors choose among 0.1 to 1.5)."""
    inference_steps: int = Field(default=20, gt=0)
    """At most."""


class PTMAPSettings(EasyfslSettings):
    """Of `pt-map`; the authors' values."""

    fine_tuning_steps: int = Field(default=20, gt=0)
    """Of the centres."""
    fine_tuning_lr: float = Field(default=0.2, gt=0)
    """How far a step takes the centres to the new ones."""
    lambda_regularization: float = Field(default=10.0, gt=0)
    """Of the transport."""


class TIMSettings(EasyfslSettings):
    """Of `tim`; the authors' values, but ten times their learning rate for a tenth of their steps."""

    fine_tuning_steps: int = Field(default=100, gt=0)
    """Of Adam on the centres (the authors: 1000)."""
    fine_tuning_lr: float = Field(default=1e-3, gt=0)
    """Of Adam (the authors: 1e-4)."""
    cross_entropy_weight: float = Field(default=0.1, ge=0)
    """Of the support set's cross-entropy."""
    marginal_entropy_weight: float = Field(default=1.0, ge=0)
    """Of the entropy of the queries' mean prediction."""
    conditional_entropy_weight: float = Field(default=0.1, ge=0)
    """Of the queries' mean entropy."""
    temperature: float = Field(default=15.0, gt=0)
    """Times the cosine."""


_HEADS: dict[str, tuple[str, type[EasyfslSettings], str]] = {
    "simple-shot": (
        "SimpleShot",
        EasyfslSettings,
        "Wang et al., SimpleShot, 2019, arXiv 1911.04623: CL2N, centred by the mean of data.tune",
    ),
    "bd-cspn": ("BDCSPN", EasyfslSettings, "Liu et al., Prototype Rectification, ECCV 2020, arXiv 1911.10713; transductive"),
    "laplacian-shot": (
        "LaplacianShot",
        LaplacianShotSettings,
        "Ziko et al., LaplacianShot, ICML 2020, arXiv 2006.15486; transductive",
    ),
    "pt-map": ("PTMAP", PTMAPSettings, "Hu et al., PT-MAP, 2020, arXiv 2006.03806; transductive"),
    "tim": ("TIM", TIMSettings, "Boudiaf et al., TIM, NeurIPS 2020, arXiv 2008.11297: TIM-GD; transductive"),
}
"""{method: (easyfsl's class, settings, source)}; FEAT is not among them: its attention has to be trained with the backbone."""


def _unit(features: Tensor, trained: Mapping[str, Tensor]) -> Tensor:
    """(n, D) of unit length, centred before by what `_fit` gave."""
    return F.normalize(features - trained.get("mean", torch.zeros(())), dim=-1)


def _powered(features: Tensor, _trained: Mapping[str, Tensor]) -> Tensor:
    """(n, D) as PT-MAP takes them: square roots of unit length, centred by their own mean, of unit length again.

    The authors' features are not negative. Of these the sign is kept, where easyfsl would set half of them to zero.
    """
    roots = F.normalize(features.sign() * features.abs().sqrt(), dim=-1)
    return F.normalize(roots - roots.mean(dim=0), dim=-1)


def _head(name: str, settings: EasyfslSettings, trained: Mapping[str, Tensor]) -> Head:
    from easyfsl import methods

    build: Callable[..., Any] = getattr(methods, name)
    prepare = _powered if name == "PTMAP" else _unit

    def score(support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        scores = []
        with torch.inference_mode(mode=False), torch.enable_grad():  # some of them learn
            for of_support, of_queries in zip(support.clone(), queries.clone(), strict=True):
                classifier = build(**settings.model_dump(exclude={"features"}))
                classifier.compute_features = lambda prepared: prepared  # PT-MAP's own transform, too, is done already
                classifier.process_support_set(prepare(of_support, trained), labels)
                scores.append(classifier(prepare(of_queries, trained)).detach())
        return torch.stack(scores)

    return score


def _fit(_settings: Any, features: Tensor, _labels: Tensor, _seed: int, _metric: MetricConfig) -> dict[str, Tensor]:
    return {"mean": features.mean(dim=0)}


def _method(name: str, class_name: str, settings: type[EasyfslSettings], source: str) -> FeatureMethod:
    return FeatureMethod(
        name=name,
        source=f"{source}, as easyfsl has it",
        settings=settings,
        features=lambda settings: str(settings.features),
        head=lambda settings, trained: _head(class_name, settings, trained),
        fit=_fit if name == "simple-shot" else None,
    )


_INSTALLED = find_spec("easyfsl") is not None
METHODS = tuple(_method(name, *found) for name, found in _HEADS.items()) if _INSTALLED else ()
UNAVAILABLE = {} if _INSTALLED else dict.fromkeys(_HEADS, "is a head of easyfsl; pip install 'lr-ray[heads]', or leave it out")
