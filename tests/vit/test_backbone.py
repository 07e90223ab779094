"""Backbones by their timm names, with random weights or weights from a file; no network."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lr_ray.errors import BackboneError
from lr_ray.vit.backbone import Backbone, BackboneConfig, _cpu_is_fast_in_bf16, autocast, load_backbone

TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return load_backbone(BackboneConfig(name=TINY, pretrained=False))


@pytest.fixture(scope="module")
def weights(tiny: Backbone, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A safetensors file with values that no random start has."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file({name: value + 0.01 for name, value in tiny.model.state_dict().items()}, path)
    return str(path)


def load(**config):
    return load_backbone(BackboneConfig(**config))


def error_of(**config) -> str:
    with pytest.raises(BackboneError) as caught:
        load(**config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_loaded_backbone_is_frozen_headless_and_described(tiny):
    assert (tiny.name, tiny.image_px, tiny.patch_px, tiny.num_patches, tiny.num_features) == (TINY, 224, 16, 196, 192)
    assert not tiny.model.training
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())
    assert tiny.model.num_classes == 0
    assert tiny.source == "random weights, seed 0"
    assert tiny.model(torch.zeros(1, 3, 224, 224)).shape == (1, 192)


def test_models_that_share_weights_but_not_the_function_are_told_apart():
    plain, other = (load(name=name, pretrained=False) for name in ("vit_small_patch16_224", "deit_small_patch16_224"))
    assert plain.digest == other.digest
    assert plain.identity | {"mean": "0.485 0.456 0.406", "std": "0.229 0.224 0.225"} == other.identity
    assert plain.identity["activation"] == "GELU"


def test_timms_copy_of_the_weights_is_not_kept():
    assert not any(isinstance(value, dict) for value in load(image_px=28).model.pretrained_cfg.values())


def test_the_embedded_backbone_is_known_by_its_weights_as_older_results_have_it():
    assert set(load(image_px=28).identity) == {"digest", "image_px"}


def test_random_weights_are_the_same_in_every_load(tiny):
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    again = load(name=TINY, pretrained=False)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers go on as they were"
    expected = tiny.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
    assert again.digest == tiny.digest


def test_image_px_sets_the_grid():
    backbone = load(name="deit_tiny_patch16_224", pretrained=False, image_px=48)
    assert (backbone.image_px, backbone.num_patches) == (48, 9)
    assert backbone.model.patch_embed.grid_size == (3, 3)
    assert backbone.model(torch.zeros(1, 3, 48, 48)).shape == (1, 192)


@pytest.mark.parametrize("image_px", [112, 384])
def test_the_position_embedding_is_interpolated(weights, image_px):
    plain, other = load(name=TINY, weights=weights), load(name=TINY, weights=weights, image_px=image_px)
    side = image_px // 16
    old, new = plain.model.pos_embed, other.model.pos_embed
    assert new.shape == (1, 1 + side * side, 192)
    assert torch.equal(new[:, :1], old[:, :1]), "the class token has no place in the grid"
    grid = old[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(new[:, 1:], expected, rtol=0, atol=1e-6)
    assert other.model(torch.zeros(1, 3, image_px, image_px)).shape == (1, 192)


def test_the_digest_is_of_the_weights_and_not_of_the_image_size(weights, tiny):
    digests = {load(name=TINY, weights=weights, image_px=image_px).digest for image_px in (None, 32, 96)}
    assert len(digests) == 1
    assert tiny.digest not in digests


def test_the_digest_changes_with_one_weight(weights, tiny, tmp_path):
    changed = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    changed["blocks.7.mlp.fc1.bias"][5] += 1e-3
    save_file(changed, tmp_path / "changed.safetensors")
    assert load(name=TINY, weights=str(tmp_path / "changed.safetensors")).digest != tiny.digest


def test_weights_from_a_file_are_the_weights(weights, tiny):
    loaded = load(name=TINY, weights=weights)
    assert loaded.source == weights
    assert load(name=TINY, weights=f"file://{weights}").digest == loaded.digest
    expected = tiny.model.state_dict()
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, expected[name] + 0.01), name


def test_a_head_in_the_file_is_left_out(tiny, tmp_path):
    head = {"head.weight": torch.ones(1000, 192), "head.bias": torch.ones(1000)}
    save_file(tiny.model.state_dict() | head, tmp_path / "with_head.safetensors")
    assert load(name=TINY, weights=str(tmp_path / "with_head.safetensors")).digest == tiny.digest


def test_weights_of_another_shape_do_not_fit(tiny, tmp_path):
    path = tmp_path / "wide.safetensors"
    save_file(tiny.model.state_dict() | {"blocks.0.attn.qkv.weight": torch.zeros(3, 3)}, path)
    message = error_of(name=TINY, weights=str(path))
    assert f"backbone weights {path} do not fit {TINY}" in message
    assert "blocks.0.attn.qkv.weight" in message


def test_weights_that_lack_tensors_do_not_fit(tiny, tmp_path):
    """timm alone would leave what is missing at random values without a word."""
    path = tmp_path / "part.safetensors"
    save_file({n: v for n, v in tiny.model.state_dict().items() if not n.startswith("blocks.3.")}, path)
    assert "they lack blocks.3.norm1.weight" in error_of(name=TINY, weights=str(path))


def test_weights_under_nobodys_names_do_not_fit(tiny, tmp_path):
    path = tmp_path / "renamed.safetensors"
    save_file({f"mine.{name}": value for name, value in tiny.model.state_dict().items()}, path)
    assert "mine." in error_of(name=TINY, weights=str(path))


def test_a_missing_damaged_or_pickled_file_is_named(tmp_path):
    absent, damaged = tmp_path / "absent.safetensors", tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not safetensors")
    pickled = tmp_path / "model.pth"
    torch.save({}, pickled)
    assert str(absent) in error_of(name=TINY, weights=str(absent))
    assert str(damaged) in error_of(name=TINY, weights=str(damaged))
    assert "only .safetensors files are read, never pickles" in error_of(name=TINY, weights=str(pickled))


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("vit_bse_patch16_clip_224.openai", "vit_base_patch16_clip_224.openai"), ("embeded", "embedded")],
)
def test_an_unknown_name_comes_with_suggestions(name, suggestion):
    message = error_of(name=name, pretrained=False)
    assert f"backbone {name!r}: timm has no such model; did you mean" in message
    assert suggestion in message


def test_a_name_like_no_other_comes_without_suggestions():
    message = error_of(name="#", pretrained=False)
    assert "did you mean" not in message
    assert "timm.list_models" in message


def test_an_unknown_tag_is_an_unknown_name():
    message = error_of(name=f"{TINY}.nosuchtag", pretrained=False)
    assert f"did you mean {TINY}." in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "is a ResNet"),
        ("vit_base_patch16_siglip_224", "does not classify by a class token"),
        ("vit_small_patch16_18x2_224", "blocks other than timm's `Block`"),
        ("swin_tiny_patch4_window7_224", "is a SwinTransformer"),
    ],
)
def test_only_a_plain_vit_with_a_class_token_serves(name, reason):
    message = error_of(name=name, pretrained=False)
    assert f"backbone {name!r}" in message
    assert reason in message
    assert "vit_base_patch16_clip_quickgelu_224.openai" in message


@pytest.mark.parametrize(("image_px", "nearest"), [(225, "224 and 240"), (7, "16 and 32"), (100, "96 and 112")])
def test_image_px_must_be_a_multiple_of_the_patch(image_px, nearest):
    message = error_of(name=TINY, pretrained=False, image_px=image_px)
    assert f"image_px {image_px}: not a multiple of the 16 px patches" in message
    assert f"nearest are {nearest}" in message


@pytest.mark.parametrize(
    ("name", "image_px", "num_patches", "mean"),
    [
        ("vit_base_patch16_clip_224.openai", 224, 196, 0.48145466),
        ("vit_small_patch14_dinov2.lvd142m", 518, 1369, 0.485),
    ],
)
def test_the_papers_backbones_are_accepted_with_their_own_normalisation(name, image_px, num_patches, mean):
    backbone = load(name=name, pretrained=False)
    assert (backbone.image_px, backbone.num_patches) == (image_px, num_patches)
    assert backbone.mean[0].item() == pytest.approx(mean)


def test_weights_that_cannot_be_downloaded_name_the_remedy(monkeypatch):
    create_model = timm.create_model

    def offline(*args, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("We couldn't connect to\n'https://huggingface.co'")
        return create_model(*args, **kwargs)

    monkeypatch.setattr("timm.create_model", offline)
    message = error_of(name=TINY)
    assert "couldn't connect" in message
    assert "set backbone.weights to a safetensors file, or backbone.name to 'embedded'" in message


def test_normalize_and_denormalize_are_inverse(make_backbone):
    backbone = make_backbone()
    pixels = torch.rand(2, 3, 8, 8)
    normalised = backbone.normalize(pixels)
    torch.testing.assert_close(normalised[:, 2], (pixels[:, 2] - 0.6) / 0.5)
    torch.testing.assert_close(backbone.denormalize(normalised), pixels)
    stored = (pixels * 255).round().to(torch.uint8)
    torch.testing.assert_close(backbone.normalize(stored), backbone.normalize(stored / 255))
    assert torch.equal((backbone.denormalize(backbone.normalize(stored)) * 255).round().to(torch.uint8), stored)


def test_normalize_does_not_touch_its_input(make_backbone):
    pixels = torch.rand(2, 3, 8, 8)
    before = pixels.clone()
    make_backbone().normalize(pixels)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_holds_inside_its_block(precision, dtype):
    a = torch.ones(2, 2)
    with autocast(torch.device("cpu"), precision):
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "vendor", "dtype"),
    [
        (False, True, "AuthenticAMD", torch.bfloat16),
        (False, True, "GenuineIntel", torch.float32),
        (True, True, "GenuineIntel", torch.bfloat16),
        (False, False, "AuthenticAMD", torch.float32),
    ],
)
def test_auto_is_bf16_where_that_is_faster(monkeypatch, amx, avx512_bf16, vendor, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(Path, "read_text", lambda _path: f"processor : 0\nvendor_id : {vendor}\n")
    _cpu_is_fast_in_bf16.cache_clear()
    a = torch.ones(2, 2)
    with autocast(torch.device("cpu"), "auto"):
        assert (a @ a).dtype == dtype
    _cpu_is_fast_in_bf16.cache_clear()
