"""Heads that easyfsl has, on our features: an optional extra (`pip install 'lr-ray[heads]'`)."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from lr_ray.fewshot.methods import FeatureMethod, Head
from lr_ray.fewshot.methods.features import BACKBONE, FeaturesName
from lr_ray.section import Section

_HEADS = {
    "simple-shot": ("SimpleShot", "Wang et al., SimpleShot, 2019, arXiv 1911.04623"),
    "bd-cspn": ("BDCSPN", "Liu et al., Prototype Rectification, ECCV 2020, arXiv 1911.10713; transductive"),
    "laplacian-shot": ("LaplacianShot", "Ziko et al., LaplacianShot, ICML 2020, arXiv 2006.15486; transductive"),
    "pt-map": ("PTMAP", "Hu et al., PT-MAP, 2020, arXiv 2006.03806; transductive"),
    "tim": ("TIM", "Boudiaf et al., TIM, NeurIPS 2020, arXiv 2008.11297; transductive"),
}
"""{method: (easyfsl's class, source)}; FEAT is not among them: its attention has to be trained with the backbone."""


class EasyfslSettings(Section):
    """Of heads that easyfsl has; their own hyper-parameters are its defaults."""

    features: FeaturesName = BACKBONE
    """What they are of."""


def _head(name: str) -> Head:
    from easyfsl import methods

    build: Callable[..., Any] = getattr(methods, name)
    unit = {"feature_normalization": 2.0} if name == "PTMAP" else {}  # else its transport plan underflows to zeros

    def score(support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        scores = []
        with torch.inference_mode(mode=False), torch.enable_grad():  # some of them learn
            for of_support, of_queries in zip(support.clone(), queries.clone(), strict=True):
                classifier = build(**unit)
                classifier.process_support_set(of_support, labels)
                scores.append(classifier(of_queries).detach())
        return torch.stack(scores)

    return score


def _method(name: str, class_name: str, source: str) -> FeatureMethod:
    return FeatureMethod(
        name=name,
        source=f"{source}, as easyfsl has it",
        settings=EasyfslSettings,
        features=lambda settings: str(settings.features),
        head=lambda _settings, _trained: _head(class_name),
    )


_INSTALLED = find_spec("easyfsl") is not None
METHODS = tuple(_method(name, *found) for name, found in _HEADS.items()) if _INSTALLED else ()
UNAVAILABLE = {} if _INSTALLED else dict.fromkeys(_HEADS, "is a head of easyfsl; pip install 'lr-ray[heads]', or leave it out")
