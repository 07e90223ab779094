"""Adapters as peft saves them, on models of timm and Hugging Face: read from the files, they give peft's own logits."""

import contextlib
import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lr_ray.errors import AdapterError
from lr_ray.library import formats
from lr_ray.library.formats import convert
from lr_ray.library.sources import RawAdapter
from lr_ray.storage.adapters import read_adapter, write_adapter
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import as_tuned, check_adapter, merged
from lr_ray.vit.naming import to_timm
from lr_ray.vit.tokens import encode
from tests.drawn import randomised

NUM_CLASSES = 5
TOLERANCE = 1e-4
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "layer_norm_eps": 1e-5}
SIZES |= {"image_size": 32, "patch_size": 16}
TEXT = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 50}
TEXT |= {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2, "max_position_embeddings": 8}
TIMM_SIZES = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
TIMM_SIZES |= {"num_classes": 0, "norm_layer": partial(nn.LayerNorm, eps=1e-5)}
QUICK_GELU = {"pre_norm": True, "act_layer": "quick_gelu"}

TO_VERSION_4 = [
    (r"^(base_model\.model\.)(encoder\.layers\.|post_layernorm)", r"\1vision_model.\2"),
    (r"(vit|deit)\.layers\.(\d+)\.mlp\.fc1\b", r"\1.encoder.layer.\2.intermediate.dense"),
    (r"(vit|deit)\.layers\.(\d+)\.mlp\.fc2\b", r"\1.encoder.layer.\2.output.dense"),
    (r"(vit|deit)\.layers\.(\d+)\.", r"\1.encoder.layer.\2."),
    (r"(encoder\.layer\.\d+\.attention)\.q_proj\b", r"\1.attention.query"),
    (r"(encoder\.layer\.\d+\.attention)\.k_proj\b", r"\1.attention.key"),
    (r"(encoder\.layer\.\d+\.attention)\.v_proj\b", r"\1.attention.value"),
    (r"(encoder\.layer\.\d+\.attention)\.o_proj\b", r"\1.output.dense"),
]
"""From the names of transformers 5 to those of 4, which nearly all shared adapters have."""


@dataclass(frozen=True)
class Base:
    """A model that adapters are put on, the same as timm's backbone, and what is compared."""

    model: nn.Module
    backbone: Backbone
    outputs: Callable


def make_model(kind):
    options = {"num_labels": NUM_CLASSES}
    plain = SIZES | {"intermediate_size": 128}
    if kind == "timm":
        return VisionTransformer(**TIMM_SIZES | {"num_classes": NUM_CLASSES})
    if kind == "vit":
        return transformers.ViTForImageClassification(transformers.ViTConfig(**plain, **options))
    if kind == "vit_bare":
        return transformers.ViTModel(transformers.ViTConfig(**plain))
    if kind == "deit":
        return transformers.DeiTForImageClassification(transformers.DeiTConfig(**plain, **options))
    if kind == "dinov2":
        return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SIZES, mlp_ratio=2, **options))
    if kind == "clip_vision":
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**plain))
    config = transformers.CLIPConfig(vision_config=plain, text_config=TEXT, projection_dim=32, **options)
    return (transformers.CLIPModel if kind == "clip_both" else transformers.CLIPForImageClassification)(config)


def outputs_of(kind):
    """What a model of that kind says of images: logits, or the normalised class token where it has no head."""
    if kind == "timm":
        return lambda model, images: model(images)
    if kind == "vit_bare":
        return lambda model, images: model(pixel_values=images).last_hidden_state[:, 0]
    if kind == "clip_vision":
        return lambda model, images: model(pixel_values=images).pooler_output
    if kind == "clip_both":
        return lambda model, images: model.base_model.model.vision_model(pixel_values=images).pooler_output
    return lambda model, images: model(pixel_values=images).logits


def backbone_of(model, kind):
    options = {"clip": QUICK_GELU, "dinov2": {"init_values": 1e-5}}.get(kind.partition("_")[0], {})
    ours = (VisionTransformerDistilled if kind == "deit" else VisionTransformer)(**TIMM_SIZES | options)
    ours.load_state_dict(to_timm({name: value.clone() for name, value in model.state_dict().items()}))
    half = torch.full((3,), 0.5)
    return Backbone(
        name="tiny",
        model=ours.eval().requires_grad_(False),
        image_px=32,
        mean=half,
        std=half,
        digest="tiny",
        source="random",
    )


@cache
def base_of(kind):
    model = randomised(make_model(kind))
    return Base(model=model, backbone=backbone_of(model, kind), outputs=outputs_of(kind))


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def save_tuned(kind, config, folder, *, noise=0.1, dtype=None):
    """Put an adapter on the base model, draw whatever it trains, save it; what peft's model says of the images."""
    base = base_of(kind)
    torch.manual_seed(3)  # peft draws from the global generator
    model = peft.get_peft_model(copy.deepcopy(base.model), config).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
            if dtype is not None:
                parameter.copy_(parameter.to(dtype))
    expected = base.outputs(model, IMAGES)
    model.save_pretrained(folder)
    if dtype is not None:
        change_tensors(folder, lambda tensors: {name: value.to(dtype) for name, value in tensors.items()})
    untuned = base.outputs(peft.get_peft_model(copy.deepcopy(base.model), peft.LoraConfig(target_modules=["fc1"])), IMAGES)
    assert (expected - untuned).abs().max() > 100 * TOLERANCE
    return expected


def weights_file(folder):
    return folder / "adapter_model.safetensors"


def change_tensors(folder, change, metadata=None):
    tensors = {name: value.contiguous().clone() for name, value in change(load_file(weights_file(folder))).items()}
    weights_file(folder).write_bytes(save(tensors, metadata=metadata))


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def to_version_4(name):
    for pattern, replacement in TO_VERSION_4:
        name = re.sub(pattern, replacement, name)
    return name


def rename_to_version_4(folder):
    before = set(load_file(weights_file(folder)))
    change_tensors(folder, lambda tensors: {to_version_4(name): value for name, value in tensors.items()})
    after = load_file(weights_file(folder))
    assert before != set(after)
    assert not any("_proj." in name for name in after if "self_attn" not in name)


def raw_of(folder, **options):
    path = folder / "adapter_config.json"
    with safe_open(weights_file(folder), "pt") as file:
        metadata = file.metadata() or {}
    raw = {
        "source": str(folder),
        "config": json.loads(path.read_text()) if path.exists() else {},
        "weights": weights_file(folder).read_bytes(),
        "preprocessor": {},
        "manifest": {},
        "metadata": metadata,
        "card": {},
        "class_names": (),
    }
    return RawAdapter(**raw | options)


@torch.no_grad()
def outputs(adapter, backbone, images=IMAGES):
    check_adapter(adapter, backbone)
    with merged(backbone.model, adapter.updates()):
        features = encode(backbone.model, images, pool=adapter.pool).features
    return features if adapter.head_weight is None else adapter.logits(features)


def assert_same(kind, folder, expected, *, tolerance=TOLERANCE, **options):
    """Read from the files, it gives the same; and again after it was written in our own format."""
    backbone = base_of(kind).backbone
    converted = convert(raw_of(folder, **options), backbone)
    torch.testing.assert_close(outputs(converted.adapter, backbone), expected, atol=tolerance, rtol=0)
    assert_round_trip(converted.adapter, backbone, folder / "ours")
    return converted


def assert_round_trip(adapter, backbone, folder):
    write_adapter(str(folder), adapter, inputs={}, facts={})
    again = read_adapter(str(folder))
    assert again.spec.digest == adapter.spec.digest
    assert (again.pool, again.mean, again.std) == (adapter.pool, adapter.mean, adapter.std)
    torch.testing.assert_close(outputs(again, backbone), outputs(adapter, backbone), atol=1e-6, rtol=1e-6)


HEADS = {"timm": ["head"], "vit": ["classifier"], "deit": ["classifier"], "clip": ["classifier"], "dinov2": ["classifier"]}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj"]
EVERYTHING = [*ATTENTION, "fc1", "fc2"]


def lora(kind="timm", **options):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["qkv"], "modules_to_save": HEADS.get(kind)}
    return peft.LoraConfig(**settings | options)


@pytest.mark.parametrize(
    "targets",
    [["qkv"], ["qkv", "attn.proj", "fc1", "fc2"], ["patch_embed.proj"], r".*blocks\.1\.(attn\.qkv|mlp\.fc2)"],
    ids=["qkv", "all", "patch_embed", "regex"],
)
def test_lora_on_timm(targets, tmp_path):
    expected = save_tuned("timm", lora(target_modules=targets), tmp_path)
    converted = assert_same("timm", tmp_path, expected)
    assert (converted.format, converted.notes) == ("lora", ())
    assert not converted.adapter.shifts


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], EVERYTHING], ids=["query_value", "all"])
@pytest.mark.parametrize("kind", ["vit", "vit_bare", "deit", "clip", "clip_vision", "clip_both", "dinov2"])
def test_lora_on_hugging_face(kind, targets, version, tmp_path):
    expected = save_tuned(kind, lora(kind, target_modules=targets), tmp_path)
    if version == 4 and kind == "vit_bare":
        change_tensors(
            tmp_path, lambda tensors: {name.replace("model.layers", "model.vit.layers"): v for name, v in tensors.items()}
        )
    if version == 4 and kind not in ("clip", "clip_both"):
        rename_to_version_4(tmp_path)
    converted = assert_same(kind, tmp_path, expected)
    adapter = converted.adapter
    assert adapter.pool == {"clip": "patches", "dinov2": "cls+patches"}.get(kind, "cls")
    assert len(adapter.spec.class_names) == (NUM_CLASSES if kind in HEADS else 0)
    assert ("text tower" in "".join(converted.notes)) == (kind == "clip_both")
    assert ("mean of the patch tokens" in "".join(converted.notes)) == (kind == "clip")


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
@pytest.mark.parametrize("target", ["fc2", "projection", "patch_embedding"])
def test_what_the_head_reads_is_told_by_any_module(kind, target, tmp_path):
    if target == {"clip": "projection", "dinov2": "patch_embedding"}[kind]:
        return
    assert_same(kind, tmp_path, save_tuned(kind, lora(kind, target_modules=[target]), tmp_path))


OPTIONS = {
    "rslora": {"use_rslora": True},
    "patterns": {
        "target_modules": ["qkv", "fc1", "fc2"],
        "rank_pattern": {"fc1": 2, r"blocks\.1\.attn\.qkv": 8},
        "alpha_pattern": {"blocks.0.attn.qkv": 1.5, "^blocks.1.mlp.fc2": 16},
    },
    "rslora_patterns": {"use_rslora": True, "rank_pattern": {"blocks.1.attn.qkv": 8}, "alpha_pattern": {"0.attn.qkv": 3}},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "blocks"},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "target_modules": ["qkv", "fc2"]},
    "lora_bias_and_bias": {"lora_bias": True, "bias": "lora_only", "use_rslora": True},
    "norm": {"modules_to_save": ["head", "norm"]},
    "modules": {"modules_to_save": ["head", "mlp.fc1", "norm1", "patch_embed.proj"]},
    "norms_as_targets": {"modules_to_save": ["head", "blocks.0.norm2"]},
}
HF_OPTIONS = {
    "patterns": {
        "target_modules": EVERYTHING,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.attention\.v_proj": 3, "fc2": 5},
        "alpha_pattern": {"k_proj": 1.5},
    },
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 9}},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True, "rank_pattern": {"q_proj": 2}},
    "layernorm": {"modules_to_save": ["classifier", "layernorm"]},
    "layernorms": {"modules_to_save": ["classifier", "layernorm_before", "k_proj"]},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_lora_on_timm(option, tmp_path):
    assert_same("timm", tmp_path, save_tuned("timm", lora(**OPTIONS[option]), tmp_path))


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("option", HF_OPTIONS)
def test_options_of_lora_on_hugging_face(option, version, tmp_path):
    options = {"target_modules": ["q_proj", "v_proj"]} | HF_OPTIONS[option]
    expected = save_tuned("vit", lora("vit", **options), tmp_path)
    if version == 4:
        rename_to_version_4(tmp_path)
        for key in ("rank_pattern", "alpha_pattern"):
            names = {
                "q_proj": "query",
                "k_proj": "key",
                r"layers\.1\.attention\.v_proj": r"layer\.1\.attention\.attention\.value",
            }
            names["fc2"] = r"layer\.\d+\.output\.dense"
            change_config(tmp_path, **{key: {names[name]: value for name, value in options.get(key, {}).items()}})
    assert_same("vit", tmp_path, expected)


@pytest.mark.parametrize("kind", ["deit", "clip", "clip_vision", "clip_both", "dinov2"])
def test_every_bias_on_hugging_face(kind, tmp_path):
    assert_same(kind, tmp_path, save_tuned(kind, lora(kind, target_modules=["q_proj", "v_proj"], bias="all"), tmp_path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    expected = save_tuned("timm", lora(), tmp_path, dtype=dtype)
    assert_same("timm", tmp_path, expected)


def save_lora_on_head(folder):
    expected = save_tuned("timm", lora(target_modules=["qkv", "head"], modules_to_save=None), folder)
    assert not any("base_layer" in name for name in load_file(weights_file(folder)))
    return expected


def test_lora_on_the_head_with_its_weights(tmp_path):
    expected = save_lora_on_head(tmp_path)
    head = base_of("timm").model.head
    own = {f"base_model.model.head.base_layer.{kind}": value for kind, value in head.state_dict().items()}
    change_tensors(tmp_path, lambda tensors: tensors | own)
    assert assert_same("timm", tmp_path, expected).notes == ()


def test_lora_on_the_head_without_its_weights(tmp_path):
    save_lora_on_head(tmp_path)
    converted = convert(raw_of(tmp_path, class_names=("a", "b", "c", "d", "e")), base_of("timm").backbone)
    assert converted.adapter.head_weight is None
    assert converted.adapter.spec.class_names == ()
    assert "head" in converted.notes[0]


def test_head_without_bias(tmp_path):
    expected = save_tuned("timm", lora(), tmp_path)
    bias = load_file(weights_file(tmp_path))["base_model.model.head.bias"].clone()
    change_tensors(tmp_path, lambda tensors: {name: value for name, value in tensors.items() if name[-9:] != "head.bias"})
    assert_same("timm", tmp_path, expected - bias)


def other(kind, name):
    """(config, noise) of an adapter that is not plain LoRA."""
    targets = {"timm": ["qkv", "attn.proj", "fc1", "fc2"], "vit": EVERYTHING}[kind]
    given = {"target_modules": targets, "modules_to_save": HEADS[kind]}
    return {
        "dora": (partial(peft.LoraConfig, use_dora=True, r=4, lora_alpha=6), 0.1),
        "dora_patterns": (
            partial(peft.LoraConfig, use_dora=True, use_rslora=True, r=4, lora_alpha=6, rank_pattern={"fc1": 2}, bias="all"),
            0.1,
        ),
        "ia3": (partial(peft.IA3Config, feedforward_modules=["fc1", "fc2"]), 0.1),
        "adalora": (partial(peft.AdaLoraConfig, init_r=6, target_r=3, lora_alpha=16, total_step=10), 0.3),
        "vera": (partial(peft.VeraConfig, r=8, projection_prng_key=7), 0.3),
        "vera_unsaved": (partial(peft.VeraConfig, r=8, projection_prng_key=7, save_projection=False), 0.3),
        "loha": (partial(peft.LoHaConfig, r=3, alpha=5, rank_pattern={"fc1": 2}, alpha_pattern={"fc2": 2}), 0.3),
        "lokr": (partial(peft.LoKrConfig, r=3, alpha=5), 0.1),
        "lokr_decomposed": (partial(peft.LoKrConfig, r=2, alpha=5, decompose_both=True, decompose_factor=4), 0.1),
        "oft": (partial(peft.OFTConfig, oft_block_size=16, r=0), 0.1),
        "oft_blocks": (partial(peft.OFTConfig, oft_block_size=0, r=4, use_cayley_neumann=False), 0.1),
        "oft_shared": (partial(peft.OFTConfig, oft_block_size=32, r=0, block_share=True), 0.1),
    }[name][0](**given), {"adalora": 0.3, "vera": 0.3, "vera_unsaved": 0.3, "loha": 0.3}.get(name, 0.1)


OTHERS = ["dora", "dora_patterns", "ia3", "adalora", "vera", "vera_unsaved", "loha", "lokr", "lokr_decomposed"]
OTHERS += ["oft", "oft_blocks", "oft_shared"]


@pytest.mark.parametrize(("kind", "version"), [("timm", 5), ("vit", 5), ("vit", 4)])
@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds(name, kind, version, tmp_path):
    config, noise = other(kind, name)
    expected = save_tuned(kind, config, tmp_path, noise=noise)
    if version == 4:
        rename_to_version_4(tmp_path)
        if name in ("dora_patterns", "loha"):
            change_config(tmp_path, rank_pattern={r"intermediate\.dense": 2})
        if name == "loha":
            change_config(tmp_path, alpha_pattern={r"layer\.\d+\.output\.dense": 2})
    assert assert_same(kind, tmp_path, expected).format == name.partition("_")[0]


def test_adalora_after_its_ranks_were_cut(tmp_path):
    """Of every module's six singular values two to six are left, as after training; peft's own loader says what it means."""
    kept = iter([[True] * 2 + [False] * 4, [False, True] * 3, [True] * 6, [False] * 4 + [True] * 2] * 2)
    config, noise = other("timm", "adalora")
    config.rank_pattern = {
        f"blocks.{block}.{name}.lora_E": next(kept)
        for block in range(2)
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    save_tuned("timm", config, tmp_path, noise=noise)
    ranks = config.rank_pattern | {"text_model.encoder.layers.0.self_attn.q_proj.lora_E": [True] * 6}  # of another tower
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(base_of("timm").model), tmp_path).eval()
    assert reloaded.base_model.model.blocks[0].attn.qkv.lora_E["default"].shape == (2, 1)
    change_config(tmp_path, rank_pattern=ranks)
    with torch.no_grad():
        assert_same("timm", tmp_path, reloaded(IMAGES))


@pytest.mark.parametrize("kind", [partial(peft.LoraConfig, use_dora=True), peft.LoHaConfig, peft.LoKrConfig])
def test_other_kinds_on_the_convolution(kind, tmp_path):
    config = kind(target_modules=["patch_embed.proj", "fc2"], modules_to_save=["head"])
    assert_same("timm", tmp_path, save_tuned("timm", config, tmp_path, noise=0.2))


@pytest.mark.parametrize("feedforward", ["patch_embed.proj", "attn.proj"])
def test_ia3_tells_what_goes_in_from_what_comes_out(feedforward, tmp_path):
    targets = ["patch_embed.proj", "attn.proj", "fc1"]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=[feedforward], modules_to_save=["head"])
    assert_same("timm", tmp_path, save_tuned("timm", config, tmp_path))


@pytest.mark.parametrize("kind", ["deit", "clip", "dinov2", "clip_both"])
def test_dora_on_hugging_face(kind, tmp_path):
    config = peft.LoraConfig(use_dora=True, target_modules=EVERYTHING, modules_to_save=HEADS.get(kind), bias="lora_only")
    converted = assert_same(kind, tmp_path, save_tuned(kind, config, tmp_path))
    assert ("text tower" in "".join(converted.notes)) == (kind == "clip_both")


def test_updates_of_full_rank_are_shifts(tmp_path):
    config = peft.LoKrConfig(target_modules=["qkv"], r=64, modules_to_save=["classifier"], decompose_factor=2)
    config.target_modules = EVERYTHING
    converted = assert_same("dinov2", tmp_path, save_tuned("dinov2", config, tmp_path, noise=0.02))
    assert "blocks.0.attn.qkv.weight" in converted.adapter.shifts
    assert converted.adapter.pool == "cls+patches"


@pytest.mark.parametrize("kind", [peft.LoraConfig, partial(peft.LoraConfig, use_dora=True), peft.LoHaConfig])
def test_pooler_is_left_out(kind, tmp_path):
    expected = save_tuned("vit_bare", kind(target_modules=["q_proj", "dense"]), tmp_path, noise=0.2)
    assert any("pooler.dense" in name for name in load_file(weights_file(tmp_path)))
    assert "pooler" in assert_same("vit_bare", tmp_path, expected).notes[0]


def test_bias_of_a_head_that_is_not_there(tmp_path):
    save_tuned("timm", lora(bias="all", modules_to_save=None), tmp_path)
    converted = convert(raw_of(tmp_path), base_of("timm").backbone)
    assert converted.adapter.head_weight is None
    assert "bias of the head" in converted.notes[0]


@pytest.mark.parametrize("kind", [partial(peft.LoraConfig, use_dora=True), peft.LoHaConfig])
def test_head_that_another_kind_tunes(kind, tmp_path):
    config = kind(target_modules=["qkv", "head"])
    save_tuned("timm", config, tmp_path, noise=0.2)
    own = {"base_model.model.head.base_layer.weight": base_of("timm").model.head.weight}
    change_tensors(tmp_path, lambda tensors: tensors | own)
    converted = convert(raw_of(tmp_path), base_of("timm").backbone)
    assert converted.adapter.head_weight is None
    assert [note for note in converted.notes if "head" in note] == list(converted.notes)
    assert len(converted.notes) == 1


def kohya_of(folder, kind, *, dotted, alpha):
    """The file of an adapter on query and value as kohya's or diffusers' scripts would have saved it, without a config."""
    backbone_only = [name for name in load_file(weights_file(folder)) if "lora_" in name]
    up, down = (".lora.up.weight", ".lora.down.weight") if dotted else (".lora_up.weight", ".lora_down.weight")

    def change(tensors):
        renamed = {}
        for name in backbone_only:
            module = to_version_4(name).removeprefix("base_model.model.").partition(".lora_")[0]
            module = module if dotted else "lora_" + module.replace(".", "_")
            renamed[module + (down if "lora_A" in name else up)] = tensors[name]
            if alpha is not None:
                renamed[f"{module}.alpha"] = torch.tensor(float(alpha))
        return renamed

    change_tensors(folder, change, {"ss_network_module": "networks.lora"})
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("alpha", [6, None])
@pytest.mark.parametrize("kind", ["vit_bare", "clip_vision", "clip_both"])
def test_kohya_and_old_diffusers(kind, alpha, dotted, tmp_path):
    config = lora(kind, target_modules=["q_proj", "v_proj", "fc1", "fc2"], lora_alpha=alpha or 4, rank_pattern={"fc1": 4})
    expected = save_tuned(kind, config, tmp_path)
    if kind == "vit_bare":
        change_tensors(
            tmp_path, lambda tensors: {name.replace("model.layers", "model.vit.layers"): v for name, v in tensors.items()}
        )
    kohya_of(tmp_path, kind, dotted=dotted, alpha=alpha)
    names = list(load_file(weights_file(tmp_path)))
    if kind == "vit_bare" and not dotted:
        assert "lora_vit_encoder_layer_0_attention_attention_query.lora_down.weight" in names
    converted = assert_same(kind, tmp_path, expected)
    assert converted.format == "kohya"
    assert converted.adapter.head_weight is None


def test_kohya_with_a_head(tmp_path):
    expected = save_tuned("vit", lora("vit", target_modules=["q_proj", "v_proj"]), tmp_path)
    head = {name: value.clone() for name, value in load_file(weights_file(tmp_path)).items() if "classifier" in name}
    kohya_of(tmp_path, "vit", dotted=False, alpha=6)
    change_tensors(tmp_path, lambda tensors: tensors | {name.removeprefix("base_model.model."): v for name, v in head.items()})
    assert_same("vit", tmp_path, expected)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_names_of_peft_without_a_config(prefix, tmp_path):
    expected = save_tuned(
        "timm", lora(r=4, lora_alpha=3, rank_pattern={"blocks.1.attn.qkv": 3}, alpha_pattern={"0.attn.qkv": 4}), tmp_path
    )
    (tmp_path / "adapter_config.json").unlink()
    change_tensors(
        tmp_path, lambda tensors: {prefix + name.removeprefix("base_model.model."): v for name, v in tensors.items()}
    )
    converted = assert_same("timm", tmp_path, expected)
    assert "lora_alpha is taken to be the rank" in converted.notes[0]


def test_config_in_the_header_of_the_weights(tmp_path):
    expected = save_tuned("timm", lora(lora_alpha=7, use_rslora=True), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").unlink()
    change_tensors(tmp_path, lambda tensors: tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    assert assert_same("timm", tmp_path, expected).notes == ()


PROCESSORS = {
    "vit": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    "crop": ("CLIPImageProcessor", {"size": {"shortest_edge": 32}, "do_center_crop": False}),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": 32, "do_resize": False}),
    "plain": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
    "bytes": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "do_rescale": False, "image_std": [90.0, 99.0, 80.0]}),
    "signed": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5}),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_raw_pixels(case, tmp_path):
    """From bytes to logits as with the image processor that lies beside the adapter."""
    name, options = PROCESSORS[case]
    processor = getattr(transformers, name)(**{"image_mean": [0.4, 0.45, 0.6], "image_std": [0.2, 0.22, 0.25]} | options)
    processor.save_pretrained(tmp_path)
    save_tuned("vit", lora("vit", target_modules=["q_proj", "v_proj"]), tmp_path)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    seen = processor(pixels, return_tensors="pt")["pixel_values"]
    base = base_of("vit")
    with torch.no_grad():
        expected = base.outputs(peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path).eval(), seen)
    preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    adapter = convert(raw_of(tmp_path, preprocessor=preprocessor), base.backbone).adapter
    assert adapter.spec.image_px == 32
    tuned = as_tuned(adapter, base.backbone)
    torch.testing.assert_close(outputs(adapter, tuned, tuned.normalize(pixels)), expected, atol=TOLERANCE, rtol=0)
    assert (outputs(adapter, tuned, base.backbone.normalize(pixels)) - expected).abs().max() > 100 * TOLERANCE
    assert_round_trip(adapter, base.backbone, tmp_path / "ours")


def test_the_backbones_own_normalisation_is_not_noted(tmp_path):
    save_tuned("timm", lora(), tmp_path)
    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": 32}
    adapter = convert(raw_of(tmp_path, preprocessor=half), base_of("timm").backbone).adapter
    assert (adapter.mean, adapter.std, adapter.spec.image_px) == (None, None, 32)


@pytest.mark.parametrize(
    "preprocessor",
    [
        {"image_std": [0.0, 1.0, 1.0]},
        {"image_std": [float("nan"), 1.0, 1.0]},
        {"image_mean": ["0.5", 0.5, 0.5]},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": 0.5},
        {"rescale_factor": 0},
        {"rescale_factor": "1/255"},
    ],
    ids=str,
)
def test_impossible_normalisation(preprocessor, tmp_path):
    save_tuned("timm", lora(), tmp_path)
    with pytest.raises(AdapterError, match=f"preprocessor_config.json: {next(iter(preprocessor))}"):
        convert(raw_of(tmp_path, preprocessor=preprocessor), base_of("timm").backbone)


def refused(folder, match, **options):
    backbone = base_of("timm").backbone
    with pytest.raises(AdapterError, match=match) as error:
        check_adapter(convert(raw_of(folder, **options), backbone).adapter, backbone)
    assert "\n" not in str(error.value)


def raw_with(config, tensors):
    return {"config": config, "weights": save(tensors)}


@pytest.fixture
def saved(tmp_path):
    """A folder with plain LoRA on timm's model."""
    save_tuned("timm", lora(), tmp_path)
    return tmp_path


def test_prompt_tuning_is_refused(saved):
    prompts = raw_with({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}, {"prompt_embeddings": torch.zeros(8, 64)})
    refused(saved, r"peft_type 'PROMPT_TUNING' is not read; there are LORA, IA3, .*", **prompts)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_changed_base_weights_are_refused(saved, start):
    change_config(saved, init_lora_weights=start)
    refused(saved, f"started by {start}.*path_initial_model_for_weight_conversion")


def test_pissa_that_peft_saved_is_refused(tmp_path):
    save_tuned("timm", lora(init_lora_weights="pissa"), tmp_path)
    refused(tmp_path, "started by pissa")


def test_pissa_that_peft_made_plain_is_read(tmp_path):
    base = base_of("vit_bare")
    config = lora("vit_bare", target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(copy.deepcopy(base.model), config).eval()
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.3)
        expected = base.outputs(model, IMAGES)
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert_same("vit_bare", tmp_path, expected)


def test_shapes_of_another_model_are_refused(saved):
    wide = {
        f"base_model.model.encoder.layer.0.attention.attention.query.lora_{factor}.weight": torch.ones(shape)
        for factor, shape in (("A", (4, 96)), ("B", (96, 4)))
    }
    refused(saved, r"blocks\.0\.attn\.qkv is 288×96, but .*made for another backbone", weights=save(wide))


@pytest.mark.parametrize("kind", ["LORA", "LOHA"])
def test_bert_is_refused(saved, kind):
    name = "base_model.model.bert.encoder.layer.0.attention.self.query"
    factors = {"LORA": ("lora_A.weight", "lora_B.weight"), "LOHA": ("hada_w1_a", "hada_w1_b")}[kind]
    bert = {f"{name}.{factors[0]}": torch.ones(4, 64), f"{name}.{factors[1]}": torch.ones(64, 4)}
    refused(saved, "Vision Transformer", **raw_with({"peft_type": kind, "r": 4, "lora_alpha": 4, "alpha": 4}, bert))


HUGE = {
    "LOHA": {"r": 10**9},
    "LOKR": {"rank_pattern": {"qkv": 10**9}},
    "ADALORA": {"init_r": 10**9},
    "VERA": {"r": 10**9},
    "OFT": {"oft_block_size": 10**9},
}


@pytest.mark.parametrize("kind", HUGE)
def test_sizes_that_are_only_claimed_allocate_nothing(saved, kind):
    names = {"LOHA": "hada_w1_a", "LOKR": "lokr_w1", "ADALORA": "lora_A", "VERA": "vera_lambda_b", "OFT": "oft_R.weight"}
    tensors = {f"base_model.model.blocks.0.attn.qkv.{names[kind]}": torch.ones(4, 64)}
    refused(saved, "no tensor of its file is larger than 64", **raw_with({"peft_type": kind} | HUGE[kind], tensors))


@pytest.mark.parametrize("kept", [[10**9], [1.5] * 6, "x", [[10**9]], {"a": 10**9}, None])
def test_adalora_with_impossible_ranks_is_refused(tmp_path, kept):
    config, noise = other("timm", "adalora")
    save_tuned("timm", config, tmp_path, noise=noise)
    change_config(tmp_path, rank_pattern={"blocks.0.attn.qkv.lora_E": kept})
    refused(tmp_path, "peft cannot merge it as ADALORA")


@pytest.mark.parametrize("name", ["dora", "ia3", "adalora", "vera", "loha", "lokr", "oft"])
def test_other_kinds_with_a_tensor_missing_or_misshapen(name, tmp_path):
    config, noise = other("timm", name)
    save_tuned("timm", config, tmp_path, noise=noise)
    tensors = {key: value.clone() for key, value in load_file(weights_file(tmp_path)).items()}
    own = sorted(key for key in tensors if "blocks.0.attn.qkv." in key and "base_layer" not in key)
    for key in own:
        misshapen = raw_with(raw_of(tmp_path).config, tensors | {key: torch.ones(7, 5)})
        refused(tmp_path, "damaged|another", **misshapen)
        refused(tmp_path, "damaged|another", **raw_with(raw_of(tmp_path).config, tensors | {key: tensors[key] * torch.nan}))
        if len(own) > 1:
            absent = {name: value for name, value in tensors.items() if name != key}
            refused(tmp_path, "damaged|another", **raw_with(raw_of(tmp_path).config, absent))


def test_complex_weights_are_refused(saved):
    change_tensors(saved, lambda tensors: {name: value.to(torch.complex64) for name, value in tensors.items()})
    refused(saved, "is of type torch.complex64; no adapter has such weights")


def test_damaged_weights_are_refused(saved):
    refused(saved, "damaged", weights=weights_file(saved).read_bytes()[:-1])


@pytest.mark.parametrize(
    "manifest",
    [
        {"class_names": 5},
        {"class_names": [1, 2]},
        {"image_px": "large"},
        {"image_px": 10**9},
        {"mean": [0.5]},
        {"std": [0.0, 1.0, 1.0]},
        {"pool": "max"},
        {"backbone_digest": {}},
    ],
    ids=str,
)
def test_lr_ray_json_of_wrong_types_is_refused(saved, manifest):
    refused(saved, f"lr_ray.json.{next(iter(manifest))}.*correct or remove that file", manifest=manifest)


def test_lora_that_is_more_than_lora_is_refused(saved):
    change_config(saved, target_parameters=["blocks.0.attn.qkv.weight"])
    refused(saved, "target_parameters in adapter_config.json makes it more than plain LoRA")


def test_without_a_config_only_lora_is_read(tmp_path):
    config, noise = other("timm", "loha")
    save_tuned("timm", config, tmp_path, noise=noise)
    refused(tmp_path, "without an adapter_config.json only LoRA is read", config={})


@pytest.mark.parametrize("peft_type", [["LORA"], {"LORA": 1}, 7, True, None])
def test_kind_of_a_wrong_type_is_refused(saved, peft_type):
    change_config(saved, peft_type=peft_type)
    refused(saved, "is not read; there are LORA")


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize("pattern", ["(", "(a+)+x", ".*.*.*.*x"])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_impossible_patterns_are_refused(key, pattern, kind, tmp_path):
    config, noise = (lora(), 0.1) if kind == "lora" else other("timm", kind)
    save_tuned("timm", config, tmp_path, noise=noise)
    change_config(tmp_path, **{key: {pattern: 3}})
    refused(tmp_path, "repeats a group|unterminated")


@pytest.mark.parametrize("kind", ["dora", "adalora", "vera", "lokr", "oft"])
@pytest.mark.parametrize("value", ["x", {"a": "b"}, 10**400], ids=["text", "object", "huge"])
def test_options_of_wrong_types_are_refused_or_ignored(kind, value, tmp_path):
    """In place of each number of its config."""
    config, noise = other("timm", kind)
    save_tuned("timm", config, tmp_path, noise=noise)
    raw = raw_of(tmp_path)
    for key in ("r", "alpha", "lora_alpha", "init_r", "total_step", "projection_prng_key", "oft_block_size", "eps"):
        changed = raw_of(tmp_path, config=raw.config | {key: value})
        with contextlib.suppress(AdapterError):
            convert(changed, base_of("timm").backbone)


def test_factors_of_rank_zero_are_refused(saved):
    name = "base_model.model.blocks.0.attn.qkv"
    empty = {f"{name}.lora_A.weight": torch.zeros(0, 64), f"{name}.lora_B.weight": torch.zeros(192, 0)}
    refused(saved, "damaged", **raw_with({"peft_type": "LORA", "r": 0, "lora_alpha": 1}, empty))


def test_head_and_its_update_of_different_shapes_are_refused(tmp_path):
    save_lora_on_head(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors | {"base_model.model.head.base_layer.weight": torch.ones(3, 64)})
    refused(tmp_path, r"LoRA on the head is of shape \(5, 64\), but the head of shape \(3, 64\)")


def test_a_strangers_text_does_not_steer_the_terminal():
    raw = RawAdapter(
        source="a",
        config={"license": "\x1b]0;owned\x07MIT", "base_model_name_or_path": "\x1b[31mvit"},
        weights=b"",
        preprocessor={},
        manifest={},
        metadata={},
        card={},
        class_names=(),
    )
    assert (formats._license_of(raw), formats.base_model_of(raw)) == ("?]0;owned?MIT", "?[31mvit")
