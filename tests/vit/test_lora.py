"""LoRA on the fused qkv, merging, averaging, and what makes an adapter unusable."""

from dataclasses import replace

import pytest
import torch

from lr_ray.errors import AdapterError, ConfigError
from lr_ray.vit.lora import (
    Adapter,
    AdapterSpec,
    LoRAConfig,
    LowRank,
    attach_lora,
    average_updates,
    check_adapter,
    detach_lora,
    extract_lora,
    lora_modules,
    merged,
)
from lr_ray.vit.tokens import encode

ROWS = {"q": slice(0, 24), "k": slice(24, 48), "v": slice(48, 72)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomise(loras, seed=1):
    """Fill both factors, the masked places too."""
    generator = seeded(seed)
    with torch.no_grad():
        for lora in loras:
            lora.lora_a.copy_(torch.randn(lora.lora_a.shape, generator=generator) * 0.3)
            lora.lora_b.copy_(torch.randn(lora.lora_b.shape, generator=generator) * 0.3)


def random_adapter(backbone, *, rank=3, scale=0.5, seed=0, num_classes=4, modules=("attn.qkv", "mlp.fc2")):
    generator = seeded(seed)
    lows = {}
    for index in range(len(backbone.model.blocks)):
        for module in modules:
            name = f"blocks.{index}.{module}"
            d_out, d_in = backbone.model.get_submodule(name).weight.shape
            a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
            lows[name] = LowRank(a=a, b=b, scale=scale)
    spec = AdapterSpec(
        adapter_id="birds-7",
        digest="",
        backbone="tiny",
        backbone_digest=backbone.digest,
        class_names=tuple(f"class {index}" for index in range(num_classes)),
    )
    head_weight = torch.randn(num_classes, backbone.num_features, generator=generator)
    return Adapter(spec=spec, modules=lows, head_weight=head_weight, head_bias=torch.zeros(num_classes))


@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("q", "k", "v", "proj", "fc1", "fc2")])
def test_attaching_changes_nothing_at_the_start(make_backbone, images, targets):
    model = make_backbone().model
    before = model(images)
    attach_lora(model, LoRAConfig(targets=targets), generator=seeded())
    assert torch.equal(model(images), before)
    assert torch.equal(encode(model, images).features, encode(make_backbone().model, images).features)


def test_detaching_puts_the_same_objects_back(make_backbone, images):
    model = make_backbone().model
    modules, before = dict(model.named_modules()), model(images)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    randomise(attach_lora(model, LoRAConfig(targets=("q", "proj", "fc1", "fc2")), generator=seeded()))
    assert not torch.equal(model(images), before)
    detach_lora(model)
    after = dict(model.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is modules[name] for name in modules)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(images), before)


@pytest.mark.parametrize(
    ("targets", "modules"),
    [
        (("q",), {"attn.qkv": 4}),
        (("q", "v"), {"attn.qkv": 8}),
        (("q", "k", "v"), {"attn.qkv": 12}),
        (("v", "v"), {"attn.qkv": 4}),
        (("proj",), {"attn.proj": 4}),
        (("fc1", "fc2"), {"mlp.fc1": 4, "mlp.fc2": 4}),
        (("fc2", "k", "q"), {"mlp.fc2": 4, "attn.qkv": 8}),
    ],
)
def test_targets_name_modules_and_add_up_ranks(make_backbone, targets, modules):
    model = make_backbone(depth=2).model
    attached = attach_lora(model, LoRAConfig(targets=targets, rank=4), generator=seeded())
    found = {name: lora.lora_a.shape[0] for name, lora in lora_modules(model).items()}
    assert found == {f"blocks.{block}.{name}": rank for block in (0, 1) for name, rank in modules.items()}
    assert {id(lora) for lora in attached} == {id(lora) for lora in lora_modules(model).values()}
    trainable = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"lora_a", "lora_b"}, "the base stays frozen"


@pytest.mark.parametrize("targets", [("q",), ("k",), ("v",), ("q", "v"), ("v", "k")])
def test_only_the_targeted_rows_of_qkv_get_an_update(make_backbone, images, targets):
    model = make_backbone().model
    loras = attach_lora(model, LoRAConfig(targets=targets, rank=2), generator=seeded())
    randomise(loras)
    delta = extract_lora(model)["blocks.0.attn.qkv"].delta()
    for target, rows in ROWS.items():
        assert bool(delta[rows].any()) == (target in targets)
        assert torch.linalg.matrix_rank(delta[rows]) == (2 if target in targets else 0)
    encode(model, images).features.square().sum().backward()
    assert ((loras[0].lora_b.grad != 0) == (loras[0].mask != 0)).all()


def test_each_target_has_its_own_low_rank_factor(make_backbone):
    """The update in closed form: rows of target t are alpha_t / r_t · b[rows, slots_t] @ a[slots_t]."""
    model = make_backbone(depth=1).model
    config = LoRAConfig(targets=("q", "v"), rank=2, alpha=6, rank_pattern={"v": 3}, alpha_pattern={"v": 12})
    (lora,) = attach_lora(model, config, generator=seeded())
    randomise([lora])
    a, b = lora.lora_a.detach(), lora.lora_b.detach()
    expected = torch.zeros(72, 24)
    expected[ROWS["q"]] = 6 / 2 * b[ROWS["q"], :2] @ a[:2]
    expected[ROWS["v"]] = 12 / 3 * b[ROWS["v"], 2:] @ a[2:]
    torch.testing.assert_close(lora.low_rank().delta(), expected, rtol=0, atol=1e-6)
    inputs = torch.randn(5, 24)
    torch.testing.assert_close(lora(inputs) - lora.base(inputs), inputs @ expected.T, rtol=0, atol=1e-5)


def test_patterns_by_block_win_over_patterns_by_target(make_backbone):
    model = make_backbone(depth=3).model
    config = LoRAConfig(
        targets=("v", "fc1"),
        rank=4,
        alpha=8,
        rank_pattern={"v": 2, "1.v": 5, "2.fc1": 1},
        alpha_pattern={"1.v": 10, "v": 3, "fc1": 2},
    )
    attach_lora(model, config, generator=seeded())
    found = {name: (low.a.shape[0], low.scale) for name, low in extract_lora(model).items()}
    assert found == {
        "blocks.0.attn.qkv": (2, 3 / 2),
        "blocks.1.attn.qkv": (5, 10 / 5),
        "blocks.2.attn.qkv": (2, 3 / 2),
        "blocks.0.mlp.fc1": (4, 2 / 4),
        "blocks.1.mlp.fc1": (4, 2 / 4),
        "blocks.2.mlp.fc1": (1, 2 / 1),
    }


def test_the_same_seed_gives_the_same_start(make_backbone):
    starts = []
    for seed in (5, 5, 6):
        model = make_backbone().model
        starts.append([lora.lora_a for lora in attach_lora(model, LoRAConfig(), generator=seeded(seed))])
    assert all(torch.equal(one, two) for one, two in zip(starts[0], starts[1], strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(starts[0], starts[2], strict=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 25}, r"lora rank 25 of 0\.q: must be 1 to 24$"),
        ({"rank_pattern": {"1.v": 0}}, r"lora rank 0 of 1\.v: must be 1 to 24$"),
        ({"rank_pattern": {"v": -1}}, r"lora rank -1 of 0\.v"),
        ({"targets": ("fc2",), "rank": 25}, r"lora rank 25 of 0\.fc2: must be 1 to 24$"),
        ({"targets": ("fc1",), "rank": 25}, r"lora rank 25 of 0\.fc1: must be 1 to 24$"),
        ({"targets": ()}, r"lora\.targets is empty"),
    ],
)
def test_an_impossible_rank_is_a_config_error_and_leaves_the_model_alone(make_backbone, config, message):
    model = make_backbone().model
    with pytest.raises(ConfigError, match=message):
        attach_lora(model, LoRAConfig(**config), generator=seeded())
    assert lora_modules(model) == {}


def test_the_largest_rank_is_the_size_of_the_target(make_backbone):
    attach_lora(make_backbone().model, LoRAConfig(targets=("q", "fc1", "fc2"), rank=24), generator=seeded())


def test_merged_equals_attached(make_backbone, images):
    backbone = make_backbone(depth=3)
    config = LoRAConfig(targets=("q", "v", "proj", "fc1", "fc2"), rank=3, rank_pattern={"1.v": 2}, alpha_pattern={"q": 9})
    randomise(attach_lora(backbone.model, config, generator=seeded()))
    attached = encode(backbone.model, images).features.detach()
    deltas = {f"{name}.weight": low.delta() for name, low in extract_lora(backbone.model).items()}
    detach_lora(backbone.model)
    plain = backbone.model(images)
    with merged(backbone.model, deltas):
        features = encode(backbone.model, images).features
    torch.testing.assert_close(features, attached, rtol=0, atol=1e-5)
    assert (features - plain).abs().max() > 1e-2
    assert torch.equal(backbone.model(images), plain)


@pytest.mark.parametrize("fails", [False, True])
def test_merged_puts_the_same_weights_back(make_backbone, fails):
    backbone = make_backbone()
    before = dict(backbone.model.named_parameters())
    copies = {name: value.clone() for name, value in before.items()}
    deltas = random_adapter(backbone).updates()
    try:
        with merged(backbone.model, deltas):
            weight = backbone.model.blocks[0].attn.qkv.weight
            assert torch.equal(weight, copies["blocks.0.attn.qkv.weight"] + deltas["blocks.0.attn.qkv.weight"])
            assert not weight.requires_grad
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    after = dict(backbone.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert all(torch.equal(after[name], copies[name]) for name in before)


def test_merged_restores_when_one_update_does_not_fit(make_backbone):
    backbone = make_backbone()
    before = dict(backbone.model.named_parameters())
    wrong = {"blocks.0.attn.qkv.weight": torch.ones(72, 24), "blocks.1.attn.qkv.weight": torch.ones(5, 7)}
    with pytest.raises(RuntimeError), merged(backbone.model, wrong):
        pass
    assert all(value is before[name] for name, value in backbone.model.named_parameters())


@pytest.mark.parametrize("alpha", [1.0, 4.0, 10.0])
def test_load_delta_is_exact_where_the_rank_suffices(make_backbone, alpha):
    (lora,) = attach_lora(
        make_backbone(depth=1).model,
        LoRAConfig(targets=("q", "v"), rank=3, alpha=alpha, rank_pattern={"v": 2}),
        generator=seeded(),
    )
    delta = torch.zeros(72, 24)
    delta[ROWS["q"]] = torch.randn(24, 3, generator=seeded(1)) @ torch.randn(3, 24, generator=seeded(2))
    delta[ROWS["v"]] = torch.randn(24, 2, generator=seeded(3)) @ torch.randn(2, 24, generator=seeded(4))
    lora.load_delta(delta)
    torch.testing.assert_close(lora.low_rank().delta(), delta, rtol=0, atol=1e-5)


def test_load_delta_is_otherwise_the_truncated_svd_of_each_targets_rows(make_backbone):
    ranks = {"q": 3, "v": 7}
    (lora,) = attach_lora(
        make_backbone(depth=1).model, LoRAConfig(targets=("q", "v"), alpha=2, rank_pattern=ranks), generator=seeded()
    )
    delta = torch.randn(72, 24, generator=seeded(1))
    lora.load_delta(delta)
    found = lora.low_rank().delta()
    assert not found[ROWS["k"]].any()
    for target, rank in ranks.items():
        u, s, vh = torch.linalg.svd(delta[ROWS[target]])
        best = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
        torch.testing.assert_close(found[ROWS[target]], best, rtol=0, atol=1e-5)
        error = (found - delta)[ROWS[target]].square().sum()
        torch.testing.assert_close(error, s[rank:].square().sum(), rtol=1e-4, atol=0)  # Eckart–Young


def test_ranks_that_load_delta_does_not_fill_can_learn(make_backbone):
    """As where the meta-LoRA is on k and no adapter was, or where there are fewer adapters than it has ranks."""
    (lora,) = attach_lora(make_backbone(depth=1).model, LoRAConfig(targets=("q", "k"), rank=6, alpha=6), generator=seeded())
    delta = torch.zeros(72, 24)
    delta[ROWS["q"]] = torch.randn(24, 2, generator=seeded(1)) @ torch.randn(2, 24, generator=seeded(2))
    lora.load_delta(delta)
    torch.testing.assert_close(lora.low_rank().delta(), delta, rtol=0, atol=1e-5)

    inputs = torch.randn(5, 24, generator=seeded(3))
    (lora(inputs) * torch.randn(5, 72, generator=seeded(4))).sum().backward()
    assert lora.lora_b.grad is not None
    of_rank = (lora.lora_b.grad * lora.mask).norm(dim=0)
    assert of_rank.min() > 0.1 * of_rank.max()


def test_the_average_is_of_products_and_not_of_factors(make_backbone):
    backbone = make_backbone()
    adapters = [random_adapter(backbone, rank=rank, scale=scale, seed=rank) for rank, scale in ((1, 2.0), (3, 0.5), (5, 1.0))]
    average = average_updates(iter(adapters))
    assert average.keys() == {f"{name}.weight" for name in adapters[0].modules}
    for name, value in average.items():
        lows = [adapter.modules[name.removesuffix(".weight")] for adapter in adapters]
        products = [low.scale * low.b @ low.a for low in lows]
        torch.testing.assert_close(value, torch.stack(products).mean(dim=0), rtol=0, atol=1e-5)


def test_an_adapter_without_a_module_counts_as_a_zero_update_in_the_average(make_backbone):
    backbone = make_backbone()
    both, one = random_adapter(backbone, seed=1), random_adapter(backbone, seed=2, modules=("attn.qkv",))
    average = average_updates([one, both])
    torch.testing.assert_close(average["blocks.0.mlp.fc2.weight"], both.modules["blocks.0.mlp.fc2"].delta() / 2)


def test_products_and_full_updates_of_a_convolution_have_one_average(make_backbone):
    backbone = make_backbone()
    one, other = random_adapter(backbone, seed=1), random_adapter(backbone, seed=2)
    kernel = backbone.model.patch_embed.proj.weight
    low = LowRank(a=torch.randn(2, kernel[0].numel(), generator=seeded()), b=torch.ones(len(kernel), 2), scale=1.0)
    one = replace(one, modules={**one.modules, "patch_embed.proj": low})
    other = replace(other, shifts={"patch_embed.proj.weight": torch.ones_like(kernel), "norm.bias": torch.ones(24)})
    average = average_updates([one, other])
    torch.testing.assert_close(average["patch_embed.proj.weight"], (low.delta() + 1) / 2)
    torch.testing.assert_close(average["norm.bias"], torch.full((24,), 0.5))
    with merged(backbone.model, average):
        torch.testing.assert_close(
            backbone.model.patch_embed.proj.weight, kernel + average["patch_embed.proj.weight"].reshape(kernel.shape)
        )
    assert backbone.model.patch_embed.proj.weight is kernel


def test_averaging_leaves_the_adapters_alone(make_backbone):
    backbone = make_backbone()
    adapters = [random_adapter(backbone, seed=seed) for seed in (1, 2)]
    copies = [{name: value.clone() for name, value in adapter.tensors().items()} for adapter in adapters]
    average_updates(adapters)
    for adapter, copy in zip(adapters, copies, strict=True):
        assert all(torch.equal(value, copy[name]) for name, value in adapter.tensors().items())


def test_no_adapters_have_no_average():
    with pytest.raises(AdapterError, match="no adapters to average"):
        average_updates([])


def test_a_sound_adapter_passes(make_backbone):
    backbone = make_backbone()
    adapter = random_adapter(backbone)
    check_adapter(adapter, backbone)
    check_adapter(replace(adapter, head_weight=None, head_bias=None), backbone)
    check_adapter(replace(adapter, spec=replace(adapter.spec, backbone_digest="")), backbone)


def with_module(adapter, name, **changes):
    return replace(adapter, modules=adapter.modules | {name: replace(adapter.modules["blocks.0.attn.qkv"], **changes)})


DAMAGES = {
    "other backbone": (
        lambda adapter: replace(adapter, spec=replace(adapter.spec, backbone_digest="f" * 64)),
        r"was tuned on 'tiny' \(digest f{12}\), not on 'tiny'",
    ),
    "nan": (
        lambda adapter: with_module(adapter, "blocks.0.attn.qkv", b=torch.full((72, 3), torch.nan)),
        r"NaN or infinite weights in blocks\.0\.attn\.qkv\.b",
    ),
    "infinite head": (
        lambda adapter: replace(adapter, head_bias=torch.tensor([0.0, torch.inf, 0.0, 0.0])),
        r"NaN or infinite weights in head\.bias",
    ),
    "infinite scale": (lambda adapter: with_module(adapter, "blocks.0.attn.qkv", scale=torch.inf), r"NaN or infinite"),
    "unknown module": (lambda adapter: with_module(adapter, "blocks.9.attn.qkv"), r"blocks\.9\.attn\.qkv, which 'tiny' lacks"),
    "not linear": (lambda adapter: with_module(adapter, "blocks.0.norm1"), r"blocks\.0\.norm1, which 'tiny' lacks"),
    "wrong input": (
        lambda adapter: with_module(adapter, "blocks.0.attn.qkv", a=torch.zeros(3, 25)),
        r"blocks\.0\.attn\.qkv is 72×25, but \(72, 24\) in 'tiny'",
    ),
    "wrong output": (
        lambda adapter: with_module(adapter, "blocks.0.attn.qkv", b=torch.zeros(24, 3)),
        r"blocks\.0\.attn\.qkv is 24×24, but \(72, 24\) in 'tiny'",
    ),
    "wrong head": (
        lambda adapter: replace(adapter, head_weight=torch.zeros(4, 23)),
        r"its head reads 23 features, but 'tiny' gives 24",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unusable_adapter_is_named_in_one_line(make_backbone, damage):
    backbone = make_backbone()
    spoil, message = DAMAGES[damage]
    with pytest.raises(AdapterError, match=message) as caught:
        check_adapter(spoil(random_adapter(backbone)), backbone)
    assert "birds-7" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", ["vv", "99.q", "k"])
def test_a_pattern_that_names_no_target_is_an_error(make_backbone, pattern):
    with pytest.raises(ConfigError, match="names no target; allowed: q, v, or one of them after a block"):
        attach_lora(make_backbone().model, LoRAConfig(rank_pattern={pattern: 2}), generator=torch.Generator())
