"""The yardstick: inversion and meta-training as research code of this field writes them.

LoRA unmerged, eager attention whose whole matrix is kept, all tokens through every block, BatchNorm statistics by permute
and `var`, fp32, channels first, a loop over the images of a batch where tokens are gathered, support and queries in two
passes. The results are those of LR-Ray's dense path (tests/bench); only the way there differs.
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lr_ray.inversion.priors import BatchNormPrior
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import Adapter, LowRank


class UnmergedLinear(nn.Module):
    """W·x + scale · B·(A·x)."""

    def __init__(self, base: nn.Linear, update: LowRank, *, trainable: bool = False) -> None:
        super().__init__()
        self.base, self.scale = base, update.scale
        self.a, self.b = (nn.Parameter(found.clone(), requires_grad=trainable) for found in (update.a, update.b))

    @property
    def weight(self) -> Tensor:
        """Of the frozen layer: timm asks for it to find the device and dtype."""
        return self.base.weight

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.base(inputs) + self.scale * ((inputs @ self.a.T) @ self.b.T)
        return output


def textbook_model(backbone: Backbone, updates: Mapping[str, LowRank], *, trainable: bool = False) -> VisionTransformer:
    """A copy of the backbone with the updates beside its weights; every block keeps its attention as `block.attn.matrix`."""
    model = copy.deepcopy(backbone.model)
    for name, update in updates.items():
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        model.set_submodule(name, UnmergedLinear(base, update, trainable=trainable))
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda _drop, args, attn=block.attn: setattr(attn, "matrix", args[0]))
    return model


def statistics_loss(prior: BatchNormPrior, pixels: Tensor) -> Tensor:
    """R_BN of `BatchNormPrior`, its statistics by permute and `var`."""
    terms: list[Tensor] = []

    def add(layer: nn.BatchNorm2d, args: tuple[Tensor]) -> None:
        channels = args[0].shape[1]
        mean = args[0].mean([0, 2, 3])
        variance = args[0].permute(1, 0, 2, 3).contiguous().view([channels, -1]).var(1, unbiased=False)
        of_layer, spread = layer.running_mean, layer.running_var
        assert of_layer is not None
        assert spread is not None
        size = (of_layer.square().sum() + spread.sum()).sqrt()
        terms.append(torch.norm(of_layer - mean, 2) / size + torch.norm(spread - variance, 2) / torch.norm(spread, 2))

    handles = [layer.register_forward_pre_hook(add) for layer in prior.layers]
    try:
        prior.run(pixels, memory_format=torch.contiguous_format)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(terms).mean()


class TextbookInversion:
    """A batch of pixels that is optimised towards its classes."""

    def __init__(
        self,
        adapter: Adapter,
        backbone: Backbone,
        labels: Tensor,
        prior: BatchNormPrior | None,
        *,
        prior_weight: float,
        generator: torch.Generator,
    ) -> None:
        self._adapter, self._labels = adapter, labels
        self._model = textbook_model(backbone, adapter.modules).requires_grad_(False)
        self._backbone, self._prior, self._prior_weight = backbone, prior, prior_weight
        side = backbone.image_px
        self.pixels = torch.randn(len(labels), 3, side, side, generator=generator).requires_grad_()
        self._generator = generator
        self._optimizer = torch.optim.Adam([self.pixels], lr=0.25, betas=(0.5, 0.99))

    def loss(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) normalised → CE + weight · R_BN."""
        logits = self._adapter.logits(self._model(images))
        loss = F.cross_entropy(logits, self._labels)
        if self._prior is not None:
            loss = loss + self._prior_weight * statistics_loss(self._prior, self._backbone.denormalize(images))
        return loss

    def run_step(self) -> None:
        """Roll, mirror, forward, backward, Adam."""
        reach = self._backbone.image_px // 8
        images = self.pixels.roll(torch.randint(-reach, reach + 1, (2,), generator=self._generator).tolist(), dims=(2, 3))
        if torch.rand(1, generator=self._generator) < 0.5:
            images = images.flip(3)
        self._optimizer.zero_grad()
        self.loss(images).backward()
        self._optimizer.step()


class TextbookTraining:
    """Meta-training on episodes: support, then queries, each token gathered image by image."""

    def __init__(self, backbone: Backbone, updates: Mapping[str, LowRank]) -> None:
        self._backbone = backbone
        self.model = textbook_model(backbone, updates, trainable=True)
        self.trained = [value for value in self.model.parameters() if value.requires_grad]
        self._optimizer = torch.optim.Adam(self.trained, lr=1e-3)

    def features(self, images: Tensor, keep_indices: Tensor | None) -> Tensor:
        """(B, 3, H, W) normalised, (B, K) → (B, D)."""
        if keep_indices is None:
            return self.model(images)
        model = self.model
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        prefix = model.num_prefix_tokens
        gathered = []
        for b in range(len(tokens)):
            kept = [tokens[b, prefix + int(place)] for place in keep_indices[b]]
            gathered.append(torch.cat([tokens[b, :prefix], torch.stack(kept)]))
        found: Tensor = model.fc_norm(model.norm(model.blocks(torch.stack(gathered)))[:, 0])
        return found

    def loss(self, pixels: Tensor, keep_indices: Tensor | None, labels: Tensor, n_way: int) -> Tensor:
        """Of an episode whose (N·S + M, 3, H, W) images in [0, 1] hold the support first; (M,) labels of its queries."""
        images = self._backbone.normalize(pixels)
        count = len(images) - len(labels)
        kept = (None, None) if keep_indices is None else (keep_indices[:count], keep_indices[count:])
        support = self.features(images[:count], kept[0])
        queries = self.features(images[count:], kept[1])
        shots = count // n_way
        prototypes = torch.stack([support[way * shots : (way + 1) * shots].mean(0) for way in range(n_way)])
        distances = (queries[:, None] - prototypes[None]).square().sum(-1).sqrt()
        return F.cross_entropy(-distances, labels)

    def run_step(self, pixels: Tensor, keep_indices: Tensor | None, labels: Tensor, n_way: int) -> None:
        """An optimiser step on one episode."""
        self._optimizer.zero_grad()
        self.loss(pixels, keep_indices, labels, n_way).backward()
        self._optimizer.step()
