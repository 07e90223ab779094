"""What makes an adapter one that a library should not take, or should say something about."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lr_ray.library.checks import check, cosine_of, duplicate_of, failure_of, sketch_of
from lr_ray.library.names import backbone_of
from lr_ray.storage.adapters import with_digest, write_adapter
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import Adapter, LowRank

Make = Callable[..., Adapter]


def verdicts(adapter: Adapter, backbone: Backbone, base_model: str = "vit_tiny_patch16_224") -> dict[str, str]:
    return {found.name: found.verdict for found in check(adapter, backbone, base_model=base_model)}


def test_a_sound_adapter_passes_every_check(vit: Backbone, make: Make):
    checks = check(make(), vit, base_model="timm/vit_tiny_patch16_224")
    assert {found.name: found.verdict for found in checks} == dict.fromkeys(
        ("base model", "fits", "trained", "head", "function"), "passed"
    )
    assert failure_of(checks) == ""
    values = {found.name: found.value for found in checks}
    assert values["trained"] is not None
    assert 0 < values["trained"] < 1
    assert values["function"] is not None
    assert 0 < values["function"] <= 1


def test_the_strength_is_that_of_the_largest_update(vit: Backbone, make: Make):
    adapter = make()
    weights = dict(vit.model.named_parameters())
    expected = max(float(low.delta().norm() / weights[f"{name}.weight"].norm()) for name, low in adapter.modules.items())
    assert next(found.value for found in check(adapter, vit) if found.name == "trained") == pytest.approx(expected)


BAD = {
    "untrained": (
        lambda a: replace(a, modules={n: replace(low, b=torch.zeros_like(low.b)) for n, low in a.modules.items()}),
        "trained: every lora_B is zero",
    ),
    "NaN head": (lambda a: replace(a, head_bias=torch.full_like(a.head_bias, torch.nan)), "fits: has NaN"),
    "another backbone": (
        lambda a: replace(a, modules={"blocks.99.attn.qkv": a.modules["blocks.0.attn.qkv"]}),
        "fits: has weights for blocks.99",
    ),
    "another size": (
        lambda a: replace(a, spec=replace(a.spec, image_px=224)),
        "fits: was tuned on images of 224 px, not 32 px",
    ),
    "collapsed head": (
        lambda a: replace(a, head_weight=a.head_weight[:1].expand(3, -1).clone(), head_bias=torch.ones(3)),
        "head: its classes collapse",
    ),
    "empty head": (
        lambda a: replace(a, head_weight=torch.zeros_like(a.head_weight), head_bias=None),
        "head: its classes collapse",
    ),
    "one class": (
        lambda a: replace(
            a, head_weight=a.head_weight[:1], head_bias=a.head_bias[:1], spec=replace(a.spec, class_names=("one",))
        ),
        "head: it has 1 classes; an adapter has 2 to 10,000",
    ),
    "logits that overflow": (
        lambda a: replace(a, head_weight=torch.full_like(a.head_weight, 3e38) * torch.tensor([[1.0], [-1.0], [0.5]])),
        "function: what it gives on noise is NaN or infinite",
    ),
}


@pytest.mark.parametrize("damage", BAD)
def test_a_bad_adapter_is_named_with_its_reason(vit: Backbone, make: Make, damage: str):
    spoil, message = BAD[damage]
    assert failure_of(check(spoil(make()), vit)).startswith(message)


def test_two_classes_that_are_one_are_noted(vit: Backbone, make: Make):
    adapter = make()
    weight, bias = adapter.head_weight.clone(), adapter.head_bias.clone()
    weight[1], bias[1] = weight[0], bias[0]
    assert verdicts(replace(adapter, head_weight=weight, head_bias=bias), vit)["head"] == "noted"


def test_no_head_is_noted_and_not_looked_at(vit: Backbone, without_head: Adapter):
    found = verdicts(without_head, vit)
    assert (found["head"], found["function"]) == ("noted", "passed")


def test_products_that_overflow_fail_without_a_head_too(vit: Backbone, without_head: Adapter):
    loud = {name: replace(low, a=1e30 * low.a, b=1e30 * low.b) for name, low in without_head.modules.items()}
    assert failure_of(check(replace(without_head, modules=loud), vit)).startswith("trained: its products are NaN or infinite")


@pytest.mark.parametrize(
    ("stated", "verdict"),
    [
        ("", "noted"),
        ("vit_tiny_patch16_224", "passed"),
        ("timm/vit_tiny_patch16_224", "passed"),
        ("somebody/a-model", "noted"),
        ("google/vit-base-patch16-224-in21k", "failed"),
        ("vit_tiny_patch16_384.augreg_in21k_ft_in1k", "failed"),
        ("vit_tiny_patch16_224.augreg_in21k", "passed"),  # the backbone's name has no tag
    ],
)
def test_the_base_model_that_is_stated(vit: Backbone, make: Make, stated: str, verdict: str):
    assert verdicts(make(), vit, stated)["base model"] == verdict


def test_base_models_by_hugging_faces_names():
    assert backbone_of("facebook/dinov2-small") == "vit_small_patch14_dinov2.lvd142m"
    assert backbone_of("openai/clip-vit-large-patch14-336") == "vit_large_patch14_clip_quickgelu_336.openai"
    assert backbone_of("google/vit-base-patch16-224") == "vit_base_patch16_224.orig_in21k_ft_in1k"
    assert backbone_of("facebook/dinov2-small-something") is None


def test_the_function_check_leaves_the_backbone_as_it_was(vit: Backbone, make: Make):
    before = dict(vit.model.named_parameters())
    check(make(), vit)
    assert all(value is before[name] for name, value in vit.model.named_parameters())


# Near-duplicates


def test_the_cosine_is_of_the_products(make: Make):
    one, other = make(0, rank=2), make(1, rank=5)
    flat = [torch.cat([update.flatten() for _, update in sorted(a.updates().items())]) for a in (one, other)]
    assert cosine_of(one, other) == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-6)
    assert cosine_of(one, one) == pytest.approx(1)


def test_shifts_count(make: Make):
    shift = {"norm.bias": torch.ones(192)}
    only = replace(make(), modules={}, shifts=shift)
    assert cosine_of(only, replace(only, shifts={"norm.bias": -torch.ones(192)})) == pytest.approx(-1)
    assert cosine_of(only, make()) == 0


def test_a_sketch_does_not_depend_on_the_factors(make: Make):
    adapter = make()
    turned = {}
    for name, low in adapter.modules.items():
        mix = torch.eye(len(low.a)) + 0.1 * torch.randn(len(low.a), len(low.a), generator=torch.Generator().manual_seed(3))
        turned[name] = LowRank(a=mix @ low.a, b=low.b @ torch.linalg.inv(mix), scale=low.scale)
    torch.testing.assert_close(sketch_of(replace(adapter, modules=turned)), sketch_of(adapter), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        sketch_of(replace(adapter, modules={n: replace(low, scale=2 * low.scale) for n, low in adapter.modules.items()})),
        2 * sketch_of(adapter),
    )


def test_blocks_that_are_exchanged_change_the_sketch(make: Make):
    adapter = make()
    first, second = (adapter.modules[f"blocks.{index}.attn.qkv"] for index in (0, 1))
    exchanged = {**adapter.modules, "blocks.0.attn.qkv": second, "blocks.1.attn.qkv": first}
    assert not torch.allclose(sketch_of(replace(adapter, modules=exchanged)), sketch_of(adapter), atol=1e-3)


def test_a_damaged_neighbour_is_no_duplicate(tmp_path, make: Make):
    adapter = make(4)
    (folder := tmp_path / "4").mkdir()
    (folder / "adapter_config.json").write_text("{")
    sketches = {str(folder): sketch_of(adapter), str(tmp_path / "gone"): sketch_of(adapter)}
    assert duplicate_of(adapter, str(tmp_path / "new"), sketch_of(adapter), sketches).verdict == "passed"


def test_a_near_duplicate_is_found_among_others_and_never_itself(tmp_path, make: Make):
    sketches = {}
    for seed in range(6):
        adapter = with_digest(make(seed))
        write_adapter(folder := str(tmp_path / str(seed)), adapter, inputs={}, facts={})
        sketches[folder] = sketch_of(adapter)
    adapter = make(4)
    louder = replace(adapter, modules={n: replace(low, scale=3 * low.scale) for n, low in adapter.modules.items()})
    found = duplicate_of(louder, str(tmp_path / "new"), sketch_of(louder), sketches)
    assert (found.verdict, found.says) == ("noted", "its update is that of birds-4")
    assert duplicate_of(adapter, str(tmp_path / "4"), sketch_of(adapter), sketches).verdict == "passed"
    assert duplicate_of(make(7), str(tmp_path / "new"), sketch_of(make(7)), sketches).verdict == "passed"
    assert duplicate_of(make(7), str(tmp_path / "new"), sketch_of(make(7)), {}).verdict == "passed"
