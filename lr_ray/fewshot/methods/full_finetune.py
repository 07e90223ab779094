"""`full-finetune`, `full-finetune:sgd`: all weights and a linear head are trained on each episode's support set."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import Field

from lr_ray.fewshot.methods import Adapt, Adaptation, FewShotTask, MethodInputs, TunedMethod
from lr_ray.fewshot.methods.episode_tuning import (
    HeadStart,
    OptimizerName,
    Tuning,
    one_by_one,
    trainable_copies,
    tune_with_linear_heads,
)
from lr_ray.section import Section

_LEARNING_RATES: dict[OptimizerName, float] = {"adam": 5e-5, "sgd": 1e-4}


class FullFinetuneSettings(Section):
    """Of `full-finetune`."""

    optimizer: OptimizerName = "adam"
    """Adam, or SGD with a momentum of 0.9."""
    num_steps: int = Field(default=5, ge=0)
    """Of the whole support set (LoRA Recycle: 5 and 50; a step of 25 images of a ViT-S takes about half a second on a
    processor)."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Default 5e-5 for Adam (Dhillon et al.), 1e-4 for SGD: the highest power of ten that leaves the embedded backbone's
    features of use on CIFAR-FS' validation classes (1e-3: 34/44 %, 1e-2: chance, near which the paper's Table 1 ends too)."""
    head: HeadStart = "probe"
    """What the head starts from."""


@contextmanager
def _adapt(inputs: MethodInputs, settings: FullFinetuneSettings) -> Iterator[Adapt]:
    learning_rate = settings.learning_rate or _LEARNING_RATES[settings.optimizer]
    tuning = Tuning(
        optimizer=settings.optimizer,
        learning_rate=learning_rate,
        head_learning_rate=learning_rate,
        num_steps=settings.num_steps,
        head=settings.head,
    )

    def adapt(task: FewShotTask, _seed: int) -> Adaptation:
        with trainable_copies(inputs.backbone.model) as weights:
            return tune_with_linear_heads(inputs.embed, [task], weights, tuning)[0]

    yield one_by_one(adapt)


METHOD = TunedMethod(
    name="full-finetune",
    source="Hu et al., LoRA Recycle, CVPR 2025, arXiv 2412.02220: its full fine-tuning, whose learning rates it does not "
    "give; that of Adam is from Dhillon et al., ICLR 2020, arXiv 1909.02729; the head starts from the linear probe",
    settings=FullFinetuneSettings,
    adapt=_adapt,
)
