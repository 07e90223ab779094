"""Tuning on a toy problem: the class is the colour."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from lr_ray.errors import ConfigError
from lr_ray.tuning.tune import TuneConfig, TunedWeights, tune
from lr_ray.vit.augment import AugmentationConfig
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import LoRAConfig, lora_modules, merged
from lr_ray.vit.tokens import encode

COLOURS = torch.tensor([[220, 40, 40], [40, 220, 40], [40, 40, 220]])
CONFIG = TuneConfig(
    lora=LoRAConfig(targets=("q", "v", "fc1"), rank=2),
    num_steps=30,
    batch_size=12,
    learning_rate=1e-2,
    precision="fp32",
)


@pytest.fixture
def backbone() -> Backbone:
    """An untrained ViT of 16 patches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0)
    return Backbone(
        name="tiny",
        model=model.eval().requires_grad_(False),
        image_px=32,
        mean=torch.full((3,), 0.5),
        std=torch.full((3,), 0.5),
        digest="",
        source="random",
    )


def solid_colours(images_per_class: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(3·M, 3, 32, 32) uint8 with noise, and the colours' indices."""
    labels = torch.arange(3).repeat_interleave(images_per_class)
    noise = torch.randint(-40, 36, (len(labels), 3, 32, 32), generator=torch.Generator().manual_seed(seed))
    return (COLOURS[labels][:, :, None, None] + noise).to(torch.uint8), labels


def run(backbone: Backbone, config: TuneConfig = CONFIG, *, seed: int = 0) -> TunedWeights:
    images, labels = solid_colours(10, seed=1)
    held_out_images, held_out_labels = solid_colours(8, seed=2)
    return tune(
        backbone,
        config,
        images=images,
        labels=labels,
        held_out_images=held_out_images,
        held_out_labels=held_out_labels,
        generator=torch.Generator().manual_seed(seed),
    )


def tensors_of(weights: TunedWeights) -> dict[str, torch.Tensor]:
    modules = weights.modules.items()
    factors = {f"{name}.a": low.a for name, low in modules} | {f"{name}.b": low.b for name, low in modules}
    return factors | {"head.weight": weights.head_weight, "head.bias": weights.head_bias}


def test_colours_are_learnt(backbone):
    weights = run(backbone)
    assert weights.accuracy >= 0.95
    assert weights.head_weight.shape == (3, 24)
    assert weights.head_bias.shape == (3,)
    assert weights.modules.keys() == {f"blocks.{block}.{name}" for block in (0, 1) for name in ("attn.qkv", "mlp.fc1")}
    assert all(low.delta().abs().max() > 1e-4 for low in weights.modules.values()), "LoRA is trained, not the head alone"


def test_the_accuracy_is_that_of_the_weights_returned(backbone):
    weights = run(backbone, CONFIG.model_copy(update={"num_steps": 3, "batch_size": 5}))
    images, labels = solid_colours(8, seed=2)
    with merged(backbone.model, {f"{name}.weight": low.delta() for name, low in weights.modules.items()}):
        features = encode(backbone.model, backbone.normalize(images)).features
    predicted = (features @ weights.head_weight.T + weights.head_bias).argmax(dim=1)
    assert weights.accuracy == (predicted == labels).double().mean().item()


def test_the_backbone_is_left_as_it_was(backbone):
    modules = dict(backbone.model.named_modules())
    before = {name: (value, value.clone()) for name, value in backbone.model.named_parameters()}
    run(backbone)
    assert {name: id(module) for name, module in backbone.model.named_modules()} == {
        name: id(module) for name, module in modules.items()
    }
    for name, parameter in backbone.model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None
        assert not parameter.requires_grad
    assert not backbone.model.training


def test_the_same_seed_gives_the_same_bits(backbone):
    config = CONFIG.model_copy(update={"num_steps": 6, "augmentation": AugmentationConfig(crop=0.2, blur=0.5, colour=0.2)})
    one, other = tensors_of(run(backbone, config, seed=4)), tensors_of(run(backbone, config, seed=5))
    torch.manual_seed(99)  # only the given generator counts
    two = tensors_of(run(backbone, config, seed=4))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert not any(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("batch_size", "seen"), [(12, [12, 12, 12, 12, 12]), (7, [7, 7, 7, 7, 7]), (100, [30] * 5)])
def test_a_step_sees_one_batch(backbone, batch_size, seen, monkeypatch):
    sizes = []

    def watched(model, images, **kwargs):
        if torch.is_grad_enabled():
            sizes.append(len(images))
        return encode(model, images, **kwargs)

    monkeypatch.setattr("lr_ray.tuning.tune.encode", watched)
    run(backbone, CONFIG.model_copy(update={"num_steps": 5, "batch_size": batch_size}))
    assert sizes == seen


def test_a_failure_leaves_no_lora_behind(backbone, monkeypatch):
    def broken(*_args, **_kwargs):
        raise KeyboardInterrupt

    with pytest.raises(ConfigError, match=r"lora rank 99 of 1\.fc1"):
        run(backbone, CONFIG.model_copy(update={"lora": LoRAConfig(targets=("q", "fc1"), rank_pattern={"1.fc1": 99})}))
    assert lora_modules(backbone.model) == {}
    monkeypatch.setattr("lr_ray.tuning.tune.encode", broken)
    with pytest.raises(KeyboardInterrupt):
        run(backbone)
    assert lora_modules(backbone.model) == {}
