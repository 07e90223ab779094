"""Foreign names of modules and weights: looked up, and converted so that the model computes the same."""

from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lr_ray.errors import BackboneError
from lr_ray.vit.naming import Site, find_site, find_underscored, foreign_names, from_timm, to_timm
from tests.drawn import randomised

FAMILIES = ["vit", "deit", "clip", "dinov2"]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TIMM_SIZES = {"embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 0}
NORM = partial(nn.LayerNorm, eps=1e-5)

SAMPLES = [
    ("vit.encoder.layer.0.attention.attention.query", "vit", Site(module="blocks.0.attn.qkv", part=0)),
    ("base_model.model.vit.encoder.layer.11.attention.attention.key", "vit", Site(module="blocks.11.attn.qkv", part=1)),
    ("encoder.layer.3.attention.attention.value", "vit", Site(module="blocks.3.attn.qkv", part=2)),
    ("vit.encoder.layer.0.attention.output.dense", "vit", Site(module="blocks.0.attn.proj")),
    ("vit.encoder.layer.0.output.dense", "vit", Site(module="blocks.0.mlp.fc2")),
    ("vit.encoder.layer.0.intermediate.dense", "vit", Site(module="blocks.0.mlp.fc1")),
    ("vit.encoder.layer.7.layernorm_before", "vit", Site(module="blocks.7.norm1")),
    ("vit.encoder.layer.7.layernorm_after", "vit", Site(module="blocks.7.norm2")),
    ("vit.layernorm", "vit", Site(module="norm")),
    ("vit.embeddings.patch_embeddings.projection", "vit", Site(module="patch_embed.proj")),
    ("base_model.model.classifier", "vit", Site(module="head")),
    ("vit.layers.2.attention.q_proj", "vit", Site(module="blocks.2.attn.qkv", part=0)),
    ("layers.2.attention.o_proj", "vit", Site(module="blocks.2.attn.proj")),
    ("backbone.layers.10.mlp.fc2", "vit", Site(module="blocks.10.mlp.fc2")),
    ("deit.encoder.layer.1.attention.attention.value", "deit", Site(module="blocks.1.attn.qkv", part=2)),
    ("deit.layers.1.attention.k_proj", "deit", Site(module="blocks.1.attn.qkv", part=1)),
    ("cls_classifier", "deit", Site(module="head")),
    ("distillation_classifier", "deit", Site(module="head_dist")),
    ("vision_model.encoder.layers.3.self_attn.q_proj", "clip", Site(module="blocks.3.attn.qkv", part=0)),
    ("model.vision_model.encoder.layers.3.self_attn.out_proj", "clip", Site(module="blocks.3.attn.proj")),
    ("encoder.layers.3.mlp.fc1", "clip", Site(module="blocks.3.mlp.fc1")),
    ("clip.vision_model.pre_layrnorm", "clip", Site(module="norm_pre")),
    ("vision_model.post_layernorm", "clip", Site(module="norm")),
    ("vision_model.embeddings.patch_embedding", "clip", Site(module="patch_embed.proj")),
    ("dinov2.encoder.layer.5.attention.attention.query", "dinov2", Site(module="blocks.5.attn.qkv", part=0)),
    ("encoder.layer.5.attention.v_proj", "dinov2", Site(module="blocks.5.attn.qkv", part=2)),
    ("dinov2.encoder.layer.5.mlp.fc1", "dinov2", Site(module="blocks.5.mlp.fc1")),
    ("dinov2.encoder.layer.5.layer_scale2", "dinov2", Site(module="blocks.5.ls2")),
    ("dinov2.layernorm", "dinov2", Site(module="norm")),
    ("blocks.0.attn.qkv", "timm", Site(module="blocks.0.attn.qkv")),
    ("visual.trunk.blocks.0.mlp.fc1", "timm", Site(module="blocks.0.mlp.fc1")),
    ("vit.patch_embed.proj", "timm", Site(module="patch_embed.proj")),
    ("head", "timm", Site(module="head")),
]
UNDERSCORED = [
    ("lora_vit_encoder_layer_0_attention_attention_query", "vit", Site(module="blocks.0.attn.qkv", part=0)),
    ("lora_vit_encoder_layer_0_attention_output_dense", "vit", Site(module="blocks.0.attn.proj")),
    ("lora_vit_encoder_layer_0_output_dense", "vit", Site(module="blocks.0.mlp.fc2")),
    ("lora_vit_layers_11_attention_v_proj", "vit", Site(module="blocks.11.attn.qkv", part=2)),
    ("lora_vision_model_encoder_layers_3_self_attn_q_proj", "clip", Site(module="blocks.3.attn.qkv", part=0)),
    ("lora_blocks_0_attn_qkv", "timm", Site(module="blocks.0.attn.qkv")),
    ("lycoris_dinov2_encoder_layer_1_mlp_fc2", "dinov2", Site(module="blocks.1.mlp.fc2")),
    ("deit_encoder_layer_1_layernorm_after", "deit", Site(module="blocks.1.norm2")),
]
STRANGERS = [
    "",
    ".",
    "text_model.encoder.layers.0.self_attn.q_proj",
    "base_model.model.text_model.encoder.layers.0.mlp.fc1",
    "bert.encoder.layer.0.attention.output.dense",
    "bert.encoder.layer.0.intermediate.dense",
    "lm_head",
    "model.lm_head",
    "blocks.x.attn.qkv",
    "blocks.00.attn.qkv",
    "blocks.-1.attn.qkv",
    "blocks.12345.attn.qkv",
    "blocks.{i}.attn.qkv",
    "blocks.0.attn.qkv.lora_A",
    "blocks.0.0.attn.qkv",
    "blocks..attn.qkv",
    "blocks0.attn.qkv",
    "vit.encoder.layer.0.attention.attention",
    "vit.encoder.layer.0",
    "vit.pooler.dense",
    "visual_projection",
    "vision_model.embeddings.position_embedding",
    "encoder.layer.0.mlp.weights_in",
]


def image_sizes(family):
    return {"image_size": 28, "patch_size": 14} if family == "dinov2" else {"image_size": 32, "patch_size": 16}


def make_foreign(family, **options):
    """A random model of a family, without pooler, head or text tower."""
    sizes = SIZES | image_sizes(family) | {"layer_norm_eps": 1e-5} | options
    if family == "dinov2":
        return randomised(transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=2, **sizes)))
    sizes["intermediate_size"] = 128
    if family == "clip":
        return randomised(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes)))
    config, model = {
        "vit": (transformers.ViTConfig, transformers.ViTModel),
        "deit": (transformers.DeiTConfig, transformers.DeiTModel),
    }[family]
    return randomised(model(config(**sizes), add_pooling_layer=False))


def make_timm(family, **options):
    sizes = image_sizes(family)
    sizes = {"img_size": sizes["image_size"], "patch_size": sizes["patch_size"], "norm_layer": NORM} | TIMM_SIZES | options
    if family == "clip":
        sizes |= {"pre_norm": True, "act_layer": "quick_gelu"}
    if family == "dinov2":
        sizes |= {"init_values": 1e-5}
    return (VisionTransformerDistilled if family == "deit" else VisionTransformer)(**sizes).eval()


def normalised_tokens(family, model, images):
    """(B, prefix + P, D) what timm's `forward_features` gives; CLIP normalises outside of its last hidden state."""
    hidden = model(images).last_hidden_state
    return model.post_layernorm(hidden) if family == "clip" else hidden


def kept(state):
    return {name: value for name, value in state.items() if not name.endswith(("mask_token", "position_ids"))}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("name", "family", "site"), SAMPLES)
def test_site(name, family, site):
    assert find_site(name) == (family, site)


@pytest.mark.parametrize(("name", "family", "site"), UNDERSCORED)
def test_underscored_site(name, family, site):
    assert find_underscored(name) == (family, site)


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers(name):
    assert find_site(name) is None
    assert find_underscored(name.replace(".", "_")) is None
    assert find_underscored("lora_" + name.replace(".", "_")) is None


def test_underscored_text_encoder_of_diffusers():
    assert find_underscored("lora_te_text_model_encoder_layers_0_self_attn_q_proj") is None


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("family", ["timm", *FAMILIES])
@pytest.mark.parametrize("prefix", ["", "base_model.model.", "backbone.", "model.vision_model.", "module.encoder."])
def test_every_module_behind_every_prefix(family, version, prefix):
    names = foreign_names(family, num_blocks=12, version=version, prefix=prefix)
    assert len(names) == {"timm": 99, "vit": 98, "deit": 98, "clip": 99, "dinov2": 122}[family]
    assert len(set(names.values())) == len(names)
    for name, site in names.items():
        for found in (find_site(name), find_underscored("lora_" + name.replace(".", "_"))):
            assert found is not None
            assert found[1] == site, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrapper_tells_the_family(family):
    for version in (4, 5):
        names = foreign_names(family, num_blocks=2, version=version, prefix=f"base_model.model.{family}.")
        assert {find_site(name)[0] for name in names} == {family}


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_those_of_transformers(family):
    """All its modules with parameters of their own, but embeddings, which are parameters in timm."""
    model = make_foreign(family)
    modules = {name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None}
    assert set(foreign_names(family, num_blocks=2, version=5)) == modules - {"embeddings", "embeddings.position_embedding"}


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_those_of_timm(family):
    modules = dict(make_timm(family).named_modules())
    assert {site.module for site in foreign_names(family, num_blocks=2).values()} <= modules.keys()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_converted_model_computes_the_same(family):
    model, ours = make_foreign(family), make_timm(family)
    ours.load_state_dict(to_timm(model.state_dict()))
    images = torch.randn(3, 3, *[image_sizes(family)["image_size"]] * 2, generator=torch.Generator().manual_seed(1))
    expected = normalised_tokens(family, model, images)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.forward_features(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family):
    state = make_foreign(family).state_dict()
    assert_same(from_timm(to_timm(state), family, version=5), kept(state))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_version_4_are_those_that_transformers_saves(family, tmp_path):
    model = make_foreign(family)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    weights = to_timm(model.state_dict())
    assert_same(to_timm(saved), weights)
    assert_same(from_timm(weights, family), kept(saved))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_is_written(family, tmp_path):
    model = make_foreign(family)
    weights = to_timm(model.state_dict())
    model.config.save_pretrained(tmp_path)
    save_file(from_timm(weights, family), tmp_path / "model.safetensors", metadata={"format": "pt"})
    options = {} if family in ("clip", "dinov2") else {"add_pooling_layer": False}
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True, **options)
    assert set(info["missing_keys"]) <= {"embeddings.mask_token"}
    assert not info["unexpected_keys"]
    assert_same(to_timm(loaded.state_dict()), weights)


def test_whole_models_are_read_without_heads_and_text():
    vit = SIZES | image_sizes("vit") | {"intermediate_size": 128}
    text = SIZES | {"intermediate_size": 128, "vocab_size": 50, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2}
    clip = transformers.CLIPConfig(vision_config=vit, text_config=text, projection_dim=32)
    dinov2 = transformers.Dinov2Config(mlp_ratio=2, **SIZES, **image_sizes("dinov2"))
    models = {
        "vit": [transformers.ViTForImageClassification(transformers.ViTConfig(**vit))],
        "deit": [transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**vit))],
        "clip": [transformers.CLIPModel(clip), transformers.CLIPForImageClassification(clip)],
        "dinov2": [transformers.Dinov2ForImageClassification(dinov2)],
    }
    models["vit"].append(transformers.ViTModel(transformers.ViTConfig(**vit)))
    for family, group in models.items():
        for model in group:
            for prefix in ("", "module.", "base_model.model."):
                weights = to_timm({prefix + name: value for name, value in model.state_dict().items()})
                make_timm(family).load_state_dict(weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_is_put_before_every_name(family):
    state = make_timm(family).state_dict()
    bare = from_timm(state, family)
    assert list(from_timm(state, family, prefix="vit.")) == [f"vit.{name}" for name in bare]
    assert_same(to_timm(from_timm(state, family, prefix="model.vit.")), state)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("version", [4, 5])
def test_back_and_there_from_timm(family, version):
    state = randomised(make_timm(family, num_classes=3)).state_dict()
    backbone = {name: value for name, value in state.items() if not name.startswith("head")}
    assert_same(to_timm(from_timm(state, family, version=version)), backbone)
    assert_same(to_timm(state), backbone)
    assert_same(from_timm(state, "timm"), backbone)


def test_split_tensors_share_no_memory():
    foreign = from_timm(make_timm("vit").state_dict(), "vit")
    assert len({tensor.untyped_storage().data_ptr() for tensor in foreign.values()}) == len(foreign)


def test_qkv_without_bias():
    state = make_timm("vit", qkv_bias=False).state_dict()
    foreign = from_timm(state, "vit")
    assert "encoder.layer.0.attention.attention.query.bias" not in foreign
    assert_same(to_timm(foreign), state)


def foreign_vit(**changes):
    return from_timm(make_timm("vit").state_dict(), "vit", prefix="vit.") | changes


@pytest.mark.parametrize(
    "missing",
    [
        "vit.embeddings.cls_token",
        "vit.layernorm.bias",
        "vit.encoder.layer.0.output.dense.weight",
        "vit.encoder.layer.1.attention.attention.key.weight",
        "vit.encoder.layer.1.attention.attention.key.bias",
    ],
)
def test_missing_weight(missing):
    state = foreign_vit()
    del state[missing]
    with pytest.raises(BackboneError, match=missing.removeprefix("vit.").replace(".", r"\.")):
        to_timm(state)


def test_missing_block():
    state = {name: value for name, value in foreign_vit().items() if "layer.0" not in name}
    with pytest.raises(BackboneError, match=r"encoder\.layer\.0"):
        to_timm(state)


def test_key_bias_alone_missing_everywhere():
    state = {name: value for name, value in foreign_vit().items() if not name.endswith("key.bias")}
    with pytest.raises(BackboneError, match=r"blocks\.0\.attn\.qkv\.bias needs q, k and v"):
        to_timm(state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit.encoder.layer.0.garbage.weight", "not a name"),
        ("vit.encoder.layer.x.output.dense.weight", "not a name"),
        ("swin.layernorm.weight", "not a name"),
        ("vision_model.pre_layrnorm.weight", "another kind of model"),
        ("vit.layers.0.mlp.fc1.weight", "another kind of model"),
        ("module.vit.layernorm.weight", "another prefix"),
    ],
)
def test_unknown_weight(name, message):
    with pytest.raises(BackboneError, match=message) as error:
        to_timm(foreign_vit(**{name: torch.zeros(64)}))
    assert repr(name) in str(error.value)


def test_no_weights():
    with pytest.raises(BackboneError, match="lack"):
        to_timm({})


def test_query_of_another_shape():
    name = "vit.encoder.layer.1.attention.attention.query.weight"
    with pytest.raises(BackboneError, match=r"one shape.*'q': \(32, 64\)"):
        to_timm(foreign_vit(**{name: torch.zeros(32, 64)}))


def test_rows_that_three_does_not_divide():
    state = make_timm("vit").state_dict() | {"blocks.0.attn.qkv.bias": torch.zeros(64)}
    with pytest.raises(BackboneError, match=r"blocks\.0\.attn\.qkv\.bias: 64 rows"):
        from_timm(state, "vit")


@pytest.mark.parametrize(
    ("have", "family", "name"),
    [
        ("dinov2", "vit", r"blocks\.0\.ls1\.gamma"),
        ("vit", "dinov2", r"blocks\.0\.ls1\.gamma"),
        ("vit", "deit", "dist_token"),
        ("deit", "vit", "dist_token"),
        ("vit", "clip", r"norm_pre\.weight"),
        ("clip", "vit", r"patch_embed\.proj\.bias"),
    ],
)
def test_weights_of_another_family(have, family, name):
    with pytest.raises(BackboneError, match=name):
        from_timm(make_timm(have).state_dict(), family)


def test_clip_takes_no_patch_bias():
    state = make_timm("clip").state_dict() | {"patch_embed.proj.bias": torch.zeros(64)}
    with pytest.raises(BackboneError, match=r"patch_embed\.proj\.bias"):
        from_timm(state, "clip")


def test_registers_are_unknown():
    with pytest.raises(BackboneError, match="reg_token"):
        from_timm(make_timm("vit", reg_tokens=2).state_dict(), "vit")


def test_shapes_of_clips_embeddings():
    foreign = from_timm(make_timm("clip").state_dict(), "clip")
    assert foreign["embeddings.class_embedding"].shape == (64,)
    assert foreign["embeddings.position_embedding.weight"].shape == (5, 64)
