"""Sparse tokens against loops that drop tokens one image, one head, one token at a time."""

import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from lr_ray.errors import ConfigError
from lr_ray.vit.tokens import attention_map, class_attention, encode, gather_patches, num_kept


def naive_attention(attention, tokens):
    """One sequence (N, D), head by head: output (N, D) and the full attention matrices (heads, N, N)."""
    width = tokens.shape[1]
    size = width // attention.num_heads
    qkv = tokens @ attention.qkv.weight.T + attention.qkv.bias
    outputs, matrices = [], []
    for head in range(attention.num_heads):
        query, key, value = (qkv[:, part * width + head * size : part * width + (head + 1) * size] for part in range(3))
        query, key = attention.q_norm(query), attention.k_norm(key)
        scores = (query @ key.T) / math.sqrt(size)
        matrix = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
        outputs.append(matrix @ value)
        matrices.append(matrix)
    output = torch.cat(outputs, dim=1) @ attention.proj.weight.T + attention.proj.bias
    return output, torch.stack(matrices)


def naive_encode(model, image, positions, keep_ratios):
    """One image (3, H, W): class feature (D,), and all of `positions` by the attention of the last block that saw them."""
    num_prefix = model.num_prefix_tokens
    patches = model.patch_embed(image[None])[0]
    prefix = torch.cat([model.cls_token[0], *([] if model.reg_token is None else [model.reg_token[0]])])
    tokens = torch.cat([prefix, patches])
    if model.no_embed_class:
        tokens = torch.cat([tokens[:num_prefix], tokens[num_prefix:] + model.pos_embed[0]])
    else:
        tokens = tokens + model.pos_embed[0]
    tokens = torch.stack([*tokens[:num_prefix], *(tokens[num_prefix + position] for position in positions)])
    positions, behind = list(positions), []
    for index, block in enumerate(model.blocks):
        output, matrices = naive_attention(block.attn, block.norm1(tokens))
        tokens = tokens + block.ls1(output)
        if index in keep_ratios or index == len(model.blocks) - 1:
            paid = [sum(float(m[0, num_prefix + p]) for m in matrices) for p in range(len(positions))]
            ranked = sorted(range(len(positions)), key=lambda p: -paid[p])
            count = max(1, math.ceil(len(positions) * keep_ratios.get(index, 1.0)))
            behind = [positions[p] for p in ranked[count:]] + behind
            positions = [positions[p] for p in ranked[:count]]
            tokens = torch.stack([*tokens[:num_prefix], *(tokens[num_prefix + p] for p in ranked[:count])])
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return model.norm(tokens)[0], positions + behind


def random_positions(num_images, num_kept_patches, num_patches=16):
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(num_patches, generator=generator)[:num_kept_patches] for _ in range(num_images)])


@pytest.mark.parametrize("num_prefix_tokens", [1, 5])
def test_gather_patches_is_a_loop_over_images_and_indices(num_prefix_tokens):
    tokens = torch.randn(3, num_prefix_tokens + 16, 6)
    keep_indices = random_positions(3, 7)
    gathered = gather_patches(tokens, keep_indices, num_prefix_tokens=num_prefix_tokens)
    assert gathered.shape == (3, num_prefix_tokens + 7, 6)
    for image in range(3):
        for position in range(num_prefix_tokens):
            assert torch.equal(gathered[image, position], tokens[image, position])
        for slot, index in enumerate(keep_indices[image].tolist()):
            assert torch.equal(gathered[image, num_prefix_tokens + slot], tokens[image, num_prefix_tokens + index])


@pytest.mark.parametrize(
    ("num_patches", "keep_ratio", "expected"),
    [(16, 1.0, 16), (16, 0.5, 8), (16, 0.51, 9), (10, 0.3, 3), (49, 0.7, 35), (196, 0.1, 20), (16, 1e-6, 1), (1, 0.5, 1)],
)
def test_num_kept_rounds_up_and_keeps_at_least_one(num_patches, keep_ratio, expected):
    assert num_kept(num_patches, keep_ratio) == expected


@pytest.mark.parametrize("vit_args", [{}, {"qk_norm": True}, {"num_heads": 6}, {"num_heads": 1}, {"reg_tokens": 4}])
def test_class_attention_is_the_first_row_of_the_full_softmax_matrix(make_backbone, vit_args):
    model = make_backbone(**vit_args).model
    attention = model.blocks[0].attn
    tokens = torch.randn(3, model.num_prefix_tokens + 16, 24, requires_grad=True)
    row = class_attention(attention, attention.qkv(tokens), num_prefix_tokens=model.num_prefix_tokens)
    assert row.shape == (3, 16)
    assert not row.requires_grad
    for image in range(3):
        _, matrices = naive_attention(attention, tokens[image])
        expected = matrices.mean(dim=0)[0, model.num_prefix_tokens :]
        assert expected.max() > 1.3 * expected.min(), "attention must not be uniform, or the test shows nothing"
        torch.testing.assert_close(row[image], expected.detach(), rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        same = class_attention(attention, attention.qkv(tokens).float(), num_prefix_tokens=model.num_prefix_tokens)
        assert same.dtype == torch.float32, "patches are ranked by it, and ties of bf16 by their position"


@pytest.mark.parametrize(
    "vit_args",
    [
        {},
        {"depth": 3},
        {"reg_tokens": 4},
        {"reg_tokens": 4, "no_embed_class": True},
        {"init_values": 0.1},
        {"qk_norm": True},
        {"pre_norm": True},
        {"dynamic_img_size": True},
    ],
)
def test_encode_without_sparsity_is_timms_own_forward(make_backbone, images, vit_args):
    model = make_backbone(**vit_args).model
    encoding = encode(model, images)
    torch.testing.assert_close(encoding.features, model(images), rtol=0, atol=1e-5)
    assert encoding.patch_order is None
    ranked = encode(model, images, rank_patches=True)
    torch.testing.assert_close(ranked.features, model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("vit_args", [{"depth": 3}, {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}])
def test_keep_indices_equal_each_image_run_on_its_own_tokens(make_backbone, images, vit_args):
    model = make_backbone(**vit_args).model
    keep_indices = random_positions(3, 5)
    features = encode(model, images, keep_indices=keep_indices).features
    for image in range(3):
        expected, _ = naive_encode(model, images[image], keep_indices[image].tolist(), {})
        torch.testing.assert_close(features[image], expected, rtol=0, atol=1e-5)
    assert (features - encode(model, images).features).abs().max() > 1e-2


def test_all_keep_indices_in_any_order_change_nothing(make_backbone, images):
    model = make_backbone(depth=3).model
    shuffled = encode(model, images, keep_indices=random_positions(3, 16)).features
    torch.testing.assert_close(shuffled, model(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep_ratios", [{0: 0.5}, {1: 0.3}, {2: 0.5}, {0: 0.7, 1: 0.5}, {0: 0.8, 1: 0.6, 2: 0.5}, {0: 0.01}])
@pytest.mark.parametrize("vit_args", [{}, {"reg_tokens": 4}])
def test_keep_ratios_equal_a_loop_that_drops_tokens(make_backbone, images, keep_ratios, vit_args):
    model = make_backbone(depth=3, **vit_args).model
    encoding = encode(model, images, keep_ratios=keep_ratios, rank_patches=True)
    plain = encode(model, images, keep_ratios=keep_ratios)
    for image in range(3):
        feature, order = naive_encode(model, images[image], range(16), keep_ratios)
        torch.testing.assert_close(encoding.features[image], feature, rtol=0, atol=1e-5)
        torch.testing.assert_close(plain.features[image], feature, rtol=0, atol=1e-5)
        assert encoding.patch_order[image].tolist() == order


def test_keep_ratios_on_top_of_keep_indices(make_backbone, images):
    model = make_backbone(depth=3).model
    keep_indices = random_positions(3, 9)
    encoding = encode(model, images, keep_indices=keep_indices, keep_ratios={0: 0.5}, rank_patches=True)
    for image in range(3):
        feature, order = naive_encode(model, images[image], keep_indices[image].tolist(), {0: 0.5})
        torch.testing.assert_close(encoding.features[image], feature, rtol=0, atol=1e-5)
        assert encoding.patch_order[image].tolist() == order


def test_dropped_tokens_are_not_computed(make_backbone, images):
    model: VisionTransformer = make_backbone(depth=3).model
    attended, through_mlp = [], []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _m, args, _o: attended.append(args[0].shape[1]))
        block.mlp.register_forward_hook(lambda _m, args, _o: through_mlp.append(args[0].shape[1]))
    encode(model, images, keep_indices=random_positions(3, 12), keep_ratios={0: 0.5, 1: 0.5})
    assert attended == [13, 7, 4]
    assert through_mlp == [7, 4, 1]


def test_patch_order_is_a_permutation_with_the_kept_patches_first(make_backbone, images):
    model = make_backbone(depth=3).model
    order = encode(model, images, keep_ratios={0: 0.5, 1: 0.5}, rank_patches=True).patch_order
    assert order.shape == (3, 16)
    assert torch.equal(order.sort(dim=1).values, torch.arange(16).expand(3, -1))
    early = encode(model, images, keep_ratios={0: 0.5}, rank_patches=True).patch_order
    for image in range(3):
        assert set(order[image, :8].tolist()) == set(early[image, :8].tolist()), "dropped by block 0: the last eight"
        assert order[image, 8:].tolist() == early[image, 8:].tolist()


def test_patches_that_do_not_enter_get_a_gradient_of_exactly_zero(make_backbone, images):
    model = make_backbone(depth=3).model
    images = images.clone().requires_grad_()
    keep_indices = random_positions(3, 6)
    features = encode(model, images, keep_indices=keep_indices, keep_ratios={0: 0.5}).features
    (features * torch.randn(24, generator=torch.Generator().manual_seed(1))).sum().backward()
    by_patch = images.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax(dim=(1, 4, 5)).flatten(1)  # (B, 16)
    entered = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, keep_indices, True)
    assert (by_patch[~entered] == 0).all()
    assert (by_patch[entered] > 0).all(), "a patch dropped by block 0 was still read by its attention"


def test_patches_dropped_by_the_only_block_that_saw_them_reach_cls_through_its_attention_alone(make_backbone, images):
    """After the last block's attention nothing of a patch is read, so keep_ratios there change no feature."""
    model = make_backbone(depth=2).model
    torch.testing.assert_close(
        encode(model, images, keep_ratios={1: 0.1}).features, encode(model, images).features, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("index", [-1, 2, 99])
def test_an_unknown_block_is_a_config_error(make_backbone, images, index):
    with pytest.raises(ConfigError, match=f"blocks 0 to 1, not {index}"):
        encode(make_backbone(depth=2).model, images, keep_ratios={index: 0.5})


def test_no_hook_is_left_behind(make_backbone, images):
    model = make_backbone(depth=2).model
    encode(model, images, keep_ratios={0: 0.5}, rank_patches=True)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("vit_args", [{}, {"reg_tokens": 4}, {"qk_norm": True, "img_size": (32, 16)}])
def test_the_attention_map_is_the_row_of_the_class_token(make_backbone, vit_args):
    """Against full matrices, head by head; what goes to prefix tokens is shared out among the patches."""
    backbone = make_backbone(**vit_args)
    model, num_prefix = backbone.model, backbone.model.num_prefix_tokens
    rows, columns = model.patch_embed.grid_size
    pixels = torch.rand(2, 3, 8 * rows, 8 * columns, generator=torch.Generator().manual_seed(1))
    maps = attention_map(backbone, pixels, precision="fp32")
    assert maps.shape == (2, rows, columns)
    for image, found in zip(pixels, maps, strict=True):
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(backbone.normalize(image[None]))))[0]
        for block in model.blocks:
            output, matrices = naive_attention(block.attn, block.norm1(tokens))
            tokens = tokens + block.ls1(output)
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        paid = matrices[:, 0, num_prefix:].mean(dim=0)
        torch.testing.assert_close(found.flatten(), paid / paid.sum(), rtol=1e-4, atol=1e-6)
    assert maps.std() > 0.01
