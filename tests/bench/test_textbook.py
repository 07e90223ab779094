"""The yardstick does what LR-Ray does, only in another way."""

import pytest
import torch
from lr_ray.bench.inversion import random_adapter
from lr_ray.bench.textbook import TextbookInversion, TextbookTraining, textbook_model
from lr_ray.bench.training import random_batch
from torch import nn

from lr_ray.fewshot.distill import Student, TrainConfig, batch_loss
from lr_ray.inversion.objective import cross_entropy
from lr_ray.inversion.priors import BatchNormPrior
from lr_ray.vit.backbone import Backbone, BackboneConfig, load_backbone
from lr_ray.vit.lora import LoRAConfig, attach_lora, extract_lora, lora_modules, merged
from lr_ray.vit.tokens import encode


@pytest.fixture
def backbone() -> Backbone:
    """ViT-Ti with random weights: 16 patches."""
    return load_backbone(BackboneConfig(name="vit_tiny_patch16_224", image_px=64, pretrained=False))


def small_prior() -> BatchNormPrior:
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    for layer in (network[1], network[3]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return BatchNormPrior(network, mean=torch.full((3,), 0.5), std=torch.full((3,), 0.25))


def test_an_inversion_step_has_our_gradient(backbone: Backbone):
    adapter, labels, prior = random_adapter(backbone), torch.arange(6) % 5, small_prior()
    textbook = TextbookInversion(adapter, backbone, labels, prior, prior_weight=3.0, generator=torch.Generator())
    theirs = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    ours = theirs.detach().clone().requires_grad_()
    textbook.loss(theirs).backward()
    with merged(backbone.model, adapter.updates()), prior:
        logits = encode(backbone.model, ours).features @ adapter.head_weight.T + adapter.head_bias
        (cross_entropy(logits, labels) + 3.0 * prior(backbone.denormalize(ours))).mean().backward()
    torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("keep_ratio", [1.0, 0.25])
def test_a_training_step_has_our_gradient(backbone: Backbone, keep_ratio: float):
    attach_lora(backbone.model, LoRAConfig(), generator=torch.Generator().manual_seed(0))
    for module in lora_modules(backbone.model).values():
        module.lora_b.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    bare = load_backbone(BackboneConfig(name="vit_tiny_patch16_224", image_px=64, pretrained=False))
    textbook, batch = TextbookTraining(bare, extract_lora(backbone.model)), random_batch(backbone, keep_ratio)
    loss, _ = batch_loss(Student(backbone, "fp32"), batch, TrainConfig())
    loss.backward()
    theirs = textbook.loss(batch.pixels, batch.keep_indices, batch.labels, batch.n_way)
    theirs.backward()
    assert theirs.item() == pytest.approx(loss.item(), rel=1e-4)
    for name, module in lora_modules(backbone.model).items():
        other = textbook.model.get_submodule(name)
        torch.testing.assert_close(other.a.grad, module.lora_a.grad, rtol=1e-3, atol=1e-5)


def test_the_whole_attention_matrix_is_kept(backbone: Backbone):
    model = textbook_model(backbone, {})
    model(torch.randn(2, 3, 64, 64))
    assert all(block.attn.matrix.shape == (2, 3, 17, 17) for block in model.blocks)
