"""What Hugging Face calls the base models of shared adapters, and what timm calls the same weights.

Written down from the models' cards and timm's tags; not compared with the weights, which cannot be reached where this is
developed.
"""

import re
from itertools import product

_TEMPLATES = (
    (r"google/vit-base-patch(16|32)-224-in21k", r"vit_base_patch\1_224.orig_in21k"),
    (r"google/vit-large-patch(16|32)-224-in21k", r"vit_large_patch\1_224.orig_in21k"),
    (r"google/vit-huge-patch14-224-in21k", "vit_huge_patch14_224.orig_in21k"),
    (r"google/vit-base-patch16-(224|384)", r"vit_base_patch16_\1.orig_in21k_ft_in1k"),
    (r"google/vit-large-patch32-384", "vit_large_patch32_384.orig_in21k_ft_in1k"),
    (r"WinKawaks/vit-(tiny|small)-patch16-224", r"vit_\1_patch16_224.augreg_in21k_ft_in1k"),
    (r"facebook/dinov2-(small|base|large|giant)", r"vit_\1_patch14_dinov2.lvd142m"),
    (r"facebook/dino-vits(8|16)", r"vit_small_patch\1_224.dino"),
    (r"facebook/dino-vitb(8|16)", r"vit_base_patch\1_224.dino"),
    (r"facebook/deit-(tiny|small|base)-distilled-patch16-(224|384)", r"deit_\1_distilled_patch16_\2.fb_in1k"),
    (r"facebook/deit-(tiny|small|base)-patch16-(224|384)", r"deit_\1_patch16_\2.fb_in1k"),
    (r"openai/clip-vit-base-patch(16|32)", r"vit_base_patch\1_clip_quickgelu_224.openai"),
    (r"openai/clip-vit-large-patch14", "vit_large_patch14_clip_quickgelu_224.openai"),
    (r"openai/clip-vit-large-patch14-336", "vit_large_patch14_clip_quickgelu_336.openai"),
    (r"laion/CLIP-ViT-B-(16|32)-laion2B.*", r"vit_base_patch\1_clip_224.laion2b"),
    (r"laion/CLIP-ViT-L-14-laion2B.*", "vit_large_patch14_clip_224.laion2b"),
    (r"laion/CLIP-ViT-H-14-laion2B.*", "vit_huge_patch14_clip_224.laion2b"),
    (r"timm/(.+)", r"\1"),
)


_SHOWN = ("google/", "facebook/", "openai/", "WinKawaks/")
"""Owners whose ids `hugging_face_id` gives; of the others there are several models to a name."""


def backbone_of(base_model: str) -> str | None:
    """timm's name of the model that an adapter says it was tuned from; None where it is not known here."""
    import timm

    for pattern, name in _TEMPLATES:
        if (match := re.fullmatch(pattern, base_model)) is not None:
            return match.expand(name)
    return base_model if "/" not in base_model and timm.is_model(base_model.partition(".")[0]) else None


def hugging_face_id(backbone: str) -> str | None:
    """The model of transformers with the weights of timm's `backbone`; None where it is not known here."""
    for pattern, _ in _TEMPLATES:
        if pattern.startswith(_SHOWN):
            for base_model in _spelt_out(pattern):
                if backbone_of(base_model) == backbone:
                    return base_model
    return None


def _spelt_out(pattern: str) -> list[str]:
    """Every text that a pattern of plain text and alternatives `(a|b)` matches."""
    parts = [part.split("|") for part in re.split(r"[()]", pattern)]
    return ["".join(choice) for choice in product(*parts)]
