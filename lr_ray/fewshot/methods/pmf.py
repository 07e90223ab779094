"""`pmf`: pre-trained, meta-trained on real images (the oracle), then all weights are fine-tuned on each episode's support
set, whose augmented images are the queries."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from lr_ray.fewshot.methods import Adapt, Adaptation, FewShotTask, MethodInputs, TunedMethod
from lr_ray.fewshot.methods.episode_tuning import make_optimizer, one_by_one, trainable_copies
from lr_ray.fewshot.protonet import centres_of_ways, prototype_logits
from lr_ray.section import Section
from lr_ray.vit.augment import AugmentationConfig, random_views
from lr_ray.vit.lora import merged

_AUGMENTATION = AugmentationConfig(flip=True, crop=0.25, colour=0.5)
"""A crop for the authors' translation by an eighth of the side; colours here brighter, darker or tinted, theirs also paler."""
_COSINE_SCALE = 10.0
"""Of the authors' classifier before it is trained."""


class PMFSettings(Section):
    """Of `pmf`."""

    num_steps: int = Field(default=3, ge=0)
    """Of Adam on the whole support set (the authors: 50, and none where the domain is that of the meta-training, as
    CIFAR-FS is, which is `oracle` by cosine; 3 keep an episode to three seconds of a processor)."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """The authors choose among 0 and 1e-4 to 1e-2 for each domain. Of the embedded backbone 1e-4 undoes the features within
    5 steps on CIFAR-FS' validation classes."""


@contextmanager
def _adapt(inputs: MethodInputs, settings: PMFSettings) -> Iterator[Adapt]:
    model = inputs.backbone.model

    def scores(support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
        return prototype_logits(queries, centres_of_ways(support, labels), distance="cosine", scale=_COSINE_SCALE)

    def adapt(task: FewShotTask, seed: int) -> Adaptation:
        generator = torch.Generator().manual_seed(seed)
        images, labels = task.support.float() / 255, task.labels.to(inputs.backbone.device)
        with trainable_copies(model) as weights:
            optimizer = make_optimizer("adam", [{"params": weights, "lr": settings.learning_rate}])
            for _ in range(settings.num_steps):
                views = random_views(images, _AUGMENTATION, generator=generator)[0]
                with torch.enable_grad():
                    features, of_views = inputs.embed(torch.cat([images, views])).chunk(2)
                    optimizer.zero_grad()
                    F.cross_entropy(scores(features, labels, of_views), labels).backward()
                optimizer.step()
            with torch.no_grad():
                features, of_queries = inputs.embed(images), inputs.embed(task.queries)
            num_trained = sum(weight.numel() for weight in weights)
        return Adaptation(scores=scores(features, labels, of_queries), num_trained=num_trained)

    with merged(model, inputs.oracle().updates()):
        yield one_by_one(adapt)


METHOD = TunedMethod(
    name="pmf",
    source="Hu et al., Pushing the Limits of Simple Pipelines for Few-Shot Learning, CVPR 2022, arXiv 2204.07305; the "
    "meta-training is the oracle's, of a LoRA; one learning rate for all domains",
    settings=PMFSettings,
    needs=lambda _settings: ("oracle",),
    adapt=_adapt,
)
