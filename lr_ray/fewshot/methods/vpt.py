"""`vpt`, `vpt:deep`: prompts among the tokens and a linear head are trained on each episode's support set."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lr_ray.fewshot.methods import Adapt, Adaptation, FewShotTask, MethodInputs, TunedMethod
from lr_ray.fewshot.methods.episode_tuning import HeadStart, Tuning, episodes_at_once, tune_with_linear_heads, within_memory
from lr_ray.section import Section
from lr_ray.vit.backbone import autocast
from lr_ray.vit.tokens import attend, embed_patches, pool_tokens, transform

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class VPTSettings(Section):
    """Of `vpt`."""

    kind: Literal["shallow", "deep"] = "shallow"
    """Prompts that enter the first block, or fresh ones in every block."""
    num_prompts: int = Field(default=5, gt=0)
    """In a block (the authors choose among 1, 5, 10, 50, 100, 200 on a validation set, which an episode lacks)."""
    num_steps: int = Field(default=5, ge=0)
    """Of Adam on the whole support set (the authors: 100 epochs of SGD; 5 keep an episode to two seconds of a
    processor)."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Of the prompts (the authors choose one for each task; of 1e-2 and 1e-3 the better one of `deep` on CIFAR-FS'
    validation classes)."""
    head_learning_rate: float = Field(default=1e-3, gt=0)
    """Of the linear head."""
    head: HeadStart = "probe"
    """What the head starts from."""


def draw_prompts(model: "VisionTransformer", settings: VPTSettings, seeds: Sequence[int]) -> list[nn.Parameter]:
    """(E, P, D) for the first block, or for each, each task's from its seed, uniform as the authors draw them."""
    width = int(model.embed_dim)
    bound = (6 / (model.patch_embed.proj.weight[0].numel() + width)) ** 0.5
    sizes = (len(model.blocks) if settings.kind == "deep" else 1, settings.num_prompts, width)
    drawn = torch.stack([torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) for seed in seeds], dim=1)
    return [nn.Parameter(prompts) for prompts in (bound * (2 * drawn - 1)).to(model.patch_embed.proj.weight.device)]


def encode_prompted(model: "VisionTransformer", images: Tensor, prompts: list[nn.Parameter]) -> Tensor:
    """Forward pass with prompts between the prefix tokens and the patches, which they have no position among.

    Args:
        images: (E·S, 3, H, W), normalised, task by task.
        prompts: (E, P, D) of each of the first blocks; those of a later block take the place of the earlier ones.

    Returns:
        (E·S, D) the normalised class token of the last block.
    """
    num_prefix: int = model.num_prefix_tokens
    with torch.no_grad():
        tokens = embed_patches(model, images)
    last, num_before = len(model.blocks) - 1, 0
    for index, block in enumerate(model.blocks):
        if index < len(prompts):
            prompt = prompts[index].repeat_interleave(len(tokens) // len(prompts[index]), dim=0)
            tokens = torch.cat([tokens[:, :num_prefix], prompt, tokens[:, num_prefix + num_before :]], dim=1)
            num_before = prompt.shape[1]
        tokens = attend(block, tokens)
        if index == last:
            tokens = tokens[:, :num_prefix]
        tokens = transform(block, tokens)
    return pool_tokens(model, tokens, "cls")


@contextmanager
def _adapt(inputs: MethodInputs, settings: VPTSettings) -> Iterator[Adapt]:
    backbone = inputs.backbone
    tuning = Tuning(
        learning_rate=settings.learning_rate,
        head_learning_rate=settings.head_learning_rate,
        num_steps=settings.num_steps,
        head=settings.head,
    )

    def adapt(tasks: Sequence[FewShotTask], seeds: Sequence[int]) -> list[Adaptation]:
        prompts = draw_prompts(backbone.model, settings, seeds)

        def embed(images: Tensor) -> Tensor:
            with autocast(backbone.device, inputs.precision):
                return encode_prompted(backbone.model, backbone.normalize(images), prompts).float()

        return tune_with_linear_heads(embed, tasks, prompts, tuning)

    yield within_memory(backbone, adapt)


METHOD = TunedMethod(
    name="vpt",
    source="Jia et al., Visual Prompt Tuning, ECCV 2022, arXiv 2203.12119; Adam for SGD, one learning rate for all episodes",
    settings=VPTSettings,
    adapt=_adapt,
    at_once=episodes_at_once,
)
