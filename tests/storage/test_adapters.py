"""Adapters on disk are PEFT's own: what we write PEFT loads, what PEFT writes we read, to the same logits."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from lr_ray.errors import AdapterError, StorageError
from lr_ray.storage.adapters import list_adapters, read_adapter, read_adapters, with_digest, write_adapter
from lr_ray.storage.manifest import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from lr_ray.vit.lora import Adapter, AdapterSpec, LowRank, merged

NUM_CLASSES = 5
QKV = {"blocks.0.attn.qkv": (4, 8.0), "blocks.1.attn.qkv": (4, 8.0)}
MIXED = {
    "blocks.0.attn.qkv": (4, 8.0),
    "blocks.1.attn.qkv": (2, 8.0),
    "blocks.1.attn.proj": (3, 1.5),
    "blocks.0.mlp.fc1": (4, 3.0),
    "blocks.1.mlp.fc2": (1, 7.0),
}


def tiny_vit(num_classes: int) -> VisionTransformer:
    """The same weights in every call; the head starts at zero."""
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=num_classes)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.requires_grad_(False).named_parameters():
        around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        size = 0.0 if name.startswith("head") else 0.25
        parameter.copy_(around + size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    """(6, 3, 32, 32) normalised images."""
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make_adapter(sizes: dict[str, tuple[int, float]], *, num_classes: int = NUM_CLASSES) -> Adapter:
    """sizes: {module: (rank, alpha)}."""
    generator = torch.Generator().manual_seed(2)
    model = tiny_vit(num_classes)
    modules = {}
    for name, (rank, alpha) in sizes.items():
        d_out, d_in = model.get_submodule(name).weight.shape
        a, b = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        modules[name] = LowRank(a=0.3 * a, b=0.3 * b, scale=alpha / rank)
    spec = AdapterSpec(
        adapter_id="birds-7",
        digest="",
        backbone="tiny",
        backbone_digest="d" * 64,
        class_names=tuple(f"Vogel № {index}" for index in range(num_classes)),
    )
    if not num_classes:
        return with_digest(Adapter(spec=spec, modules=modules))
    head_weight = torch.randn(num_classes, 24, generator=generator)
    head_bias = torch.randn(num_classes, generator=generator)
    return with_digest(Adapter(spec=spec, modules=modules, head_weight=head_weight, head_bias=head_bias))


def write(folder: Path, adapter: Adapter) -> str:
    write_adapter(str(folder), adapter, inputs={"seed": 0}, facts={"accuracy": 0.9})
    return str(folder)


def merged_output(model: VisionTransformer, adapter: Adapter, images: torch.Tensor) -> torch.Tensor:
    """Features of a model without head, times the adapter's head where it has one."""
    with torch.no_grad(), merged(model, adapter.updates()):
        features = model(images)
    if adapter.head_weight is None:
        return features
    return torch.nn.functional.linear(features, adapter.head_weight, adapter.head_bias)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5


# Round trip


@pytest.mark.parametrize("sizes", [QKV, MIXED], ids=["qkv", "mixed"])
@pytest.mark.parametrize("num_classes", [NUM_CLASSES, 0])
def test_what_is_written_is_read_back_to_the_bit(tmp_path, sizes, num_classes):
    adapter = make_adapter(sizes, num_classes=num_classes)
    found = read_adapter(write(tmp_path / "one", adapter))
    assert found.spec == adapter.spec
    assert len(found.spec.digest) == 64
    expected = adapter.tensors()
    assert found.tensors().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.tensors().items())
    assert {name: low.scale for name, low in found.modules.items()} == {n: alpha / rank for n, (rank, alpha) in sizes.items()}


@pytest.mark.parametrize("alpha", [0.1, 1 / 3, 0.7, 4.0, 16.0])
@pytest.mark.parametrize("rank", [1, 3, 7, 12])
def test_the_digest_survives_any_rank_and_alpha(tmp_path, rank, alpha):
    adapter = make_adapter({"blocks.0.attn.qkv": (rank, alpha), "blocks.1.attn.qkv": (5, 0.9)})
    assert read_adapter(write(tmp_path / "one", adapter)).spec.digest == adapter.spec.digest


def test_the_digest_covers_weights_scales_and_class_names():
    adapter = make_adapter(QKV)
    low = adapter.modules["blocks.0.attn.qkv"]
    others = [
        adapter,
        replace(adapter, modules=adapter.modules | {"blocks.0.attn.qkv": replace(low, scale=1.0)}),
        replace(adapter, modules=adapter.modules | {"blocks.0.attn.qkv": replace(low, a=low.a + 1e-6)}),
        replace(adapter, head_bias=adapter.head_bias + 1),
        replace(adapter, spec=replace(adapter.spec, class_names=("a", "b", "c", "d", "e"))),
    ]
    assert len({with_digest(other).spec.digest for other in others}) == len(others)
    renamed = replace(adapter, spec=replace(adapter.spec, adapter_id="other"))
    assert with_digest(renamed).spec.digest == adapter.spec.digest


def test_weights_in_half_precision_on_a_view_are_written_as_floats(tmp_path):
    adapter = make_adapter(QKV)
    low = adapter.modules["blocks.0.attn.qkv"]
    odd = replace(low, a=low.a.T.contiguous().T.bfloat16())
    found = read_adapter(write(tmp_path / "one", replace(adapter, modules={"blocks.0.attn.qkv": odd})))
    assert found.modules["blocks.0.attn.qkv"].a.dtype == torch.float32
    assert torch.equal(found.modules["blocks.0.attn.qkv"].a, odd.a.float())


def test_the_config_is_written_last(tmp_path, monkeypatch):
    """Until it is there, the folder holds no adapter."""
    written = []
    monkeypatch.setattr("lr_ray.storage.adapters.write_bytes", lambda uri, _content: written.append(uri.rsplit("/")[-1]))
    monkeypatch.setattr("lr_ray.storage.adapters.write_manifest", lambda *_: written.append("lr_ray.json"))
    write(tmp_path / "one", make_adapter(QKV))
    assert written == [WEIGHTS_NAME, "lr_ray.json", CONFIG_NAME]


def test_a_card_tells_the_manifest_and_comes_before_the_config(tmp_path, monkeypatch):
    folder = str(tmp_path / "one")

    def fail(*_arguments, **_options):
        raise RuntimeError("killed here")

    monkeypatch.setattr("lr_ray.storage.adapters.peft_config", fail)
    with pytest.raises(RuntimeError, match="killed here"):
        write_adapter(
            folder,
            make_adapter(QKV),
            inputs={"seed": 3},
            facts={"accuracy": 0.9},
            card=lambda manifest: f"seed {manifest['inputs']['seed']}, № {manifest['accuracy']}",
        )
    assert (tmp_path / "one" / CARD_NAME).read_text(encoding="utf-8") == "seed 3, № 0.9"
    assert not (tmp_path / "one" / CONFIG_NAME).exists()


@pytest.mark.parametrize(("stated", "expected"), [("mit", "mit"), (None, "")])
def test_the_licence_of_an_adapter_is_what_its_config_says(tmp_path, stated, expected):
    folder = Path(write(tmp_path / "one", make_adapter(QKV)))
    edit_config(folder, license=stated)
    assert read_adapter(str(folder)).spec.license == expected


def test_a_file_uri_reads_like_its_path(tmp_path):
    adapter = make_adapter(QKV)
    write_adapter((tmp_path / "one").as_uri(), adapter, inputs={}, facts={})
    assert read_adapter((tmp_path / "one").as_uri()).spec == adapter.spec == read_adapter(str(tmp_path / "one")).spec


def test_adapters_are_listed_by_name_at_any_depth(tmp_path):
    for name in ("b", "a/deep", "a/other"):
        write(tmp_path / name, make_adapter(QKV))
    (tmp_path / "no adapter").mkdir()
    assert list_adapters(str(tmp_path)) == [f"{tmp_path}/{name}" for name in ("a/deep", "a/other", "b")]
    assert [adapter.spec.adapter_id for adapter in read_adapters(str(tmp_path))] == ["birds-7"] * 3


def test_no_adapters_is_an_error(tmp_path):
    with pytest.raises(AdapterError, match="run `lr-ray tune` first"):
        list_adapters(str(tmp_path / "absent"))


# Damage and foreign kinds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound adapter on disk."""
    return Path(write(tmp_path / "one", make_adapter(QKV)))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps(config | changes))


def edit_weights(folder: Path, *, add: dict[str, torch.Tensor] | None = None, remove: tuple[str, ...] = ()) -> None:
    tensors = load_file(folder / WEIGHTS_NAME) | (add or {})
    save_file({name: value for name, value in tensors.items() if name not in remove}, folder / WEIGHTS_NAME)


FIRST = "base_model.model.blocks.0.attn.qkv"
ATTENTION = "vit.encoder.layer.0.attention.attention"


def factors(module: str, num_rows: int) -> dict[str, torch.Tensor]:
    """Of rank 4, all ones."""
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": torch.ones(4, 24), f"{name}.lora_B.weight": torch.ones(num_rows, 4)}


DAMAGES = {
    "json cut off": (lambda f: (f / CONFIG_NAME).write_text('{"peft_type": "LO'), "damaged"),
    "json not utf-8": (lambda f: (f / CONFIG_NAME).write_bytes(b'{"peft_type": "\xff\xfe"}'), "damaged"),
    "json not an object": (lambda f: (f / CONFIG_NAME).write_text('["LORA"]'), "damaged"),
    "weights cut off": (lambda f: (f / WEIGHTS_NAME).write_bytes((f / WEIGHTS_NAME).read_bytes()[:-9]), "damaged"),
    "weights empty": (lambda f: (f / WEIGHTS_NAME).write_bytes(b""), "damaged"),
    "weights not safetensors": (lambda f: (f / WEIGHTS_NAME).write_bytes(b"\x80\x02pickle" * 9), "damaged"),
    "DoRA": (lambda f: edit_config(f, use_dora=True), "DoRA, but only plain LoRA is read"),
    "IA3": (lambda f: edit_config(f, peft_type="IA3"), "peft_type IA3, but only plain LoRA is read"),
    "no peft type": (lambda f: edit_config(f, peft_type=None), "only plain LoRA is read"),
    "no lora_B": (
        lambda f: edit_weights(f, remove=(f"{FIRST}.lora_B.weight",)),
        r"blocks\.0\.attn\.qkv lacks a lora_B that fits",
    ),
    "lora_B of another rank": (
        lambda f: edit_weights(f, add={f"{FIRST}.lora_B.weight": torch.zeros(72, 3)}),
        r"blocks\.0\.attn\.qkv lacks a lora_B that fits",
    ),
    "no lora_A": (lambda f: edit_weights(f, remove=(f"{FIRST}.lora_A.weight",)), r"blocks\.0\.attn\.qkv lacks a lora_A"),
    "no LoRA at all": (
        lambda f: save_file({"base_model.model.head.weight": torch.zeros(5, 24)}, f / WEIGHTS_NAME),
        "no lora_A weights",
    ),
    "unknown key": (
        lambda f: edit_weights(f, add={"base_model.model.blocks.0.norm1.weight": torch.ones(24)}),
        r"blocks\.0\.norm1\.weight' is the new value of a parameter of the base model; `lr-ray library add` converts it",
    ),
    "of no Vision Transformer": (
        lambda f: edit_weights(f, add={"base_model.model.layers.0.norm.weight": torch.ones(24)}),
        r"layers\.0\.norm\.weight' are not LoRA",
    ),
    "bias of another length": (
        lambda f: edit_weights(f, add={f"{FIRST}.lora_B.bias": torch.zeros(5)}),
        r"blocks\.0\.attn\.qkv has a lora_B of 72 rows, but a bias of \(5,\)",
    ),
    "one module twice": (
        lambda f: edit_weights(f, add=factors("student.blocks.0.attn.qkv", 72)),
        r"timm.s blocks\.0\.attn\.qkv",
    ),
    "query and value of different sizes": (
        lambda f: edit_weights(
            f,
            add=factors(f"{ATTENTION}.query", 24) | factors(f"{ATTENTION}.value", 23),
            remove=tuple(f"{FIRST}.lora_{x}.weight" for x in "AB"),
        ),
        r"query, key and value of blocks\.0\.attn\.qkv are of sizes",
    ),
    "too many patterns": (
        lambda f: edit_config(f, rank_pattern={f"x{index}": 4 for index in range(1001)}),
        "more than 1,000 rank_pattern",
    ),
    "manifest a list": (lambda f: (f / "lr_ray.json").write_text("[1]"), r"lr_ray\.json: .*; correct or remove that file"),
    "manifest cut off": (
        lambda f: (f / "lr_ray.json").write_text((f / "lr_ray.json").read_text()[:-2]),
        r"lr_ray\.json is damaged \(.*\); correct or remove that file",
    ),
    "manifest nested without end": (
        lambda f: (f / "lr_ray.json").write_text("[" * 100_000),
        r"lr_ray\.json is damaged \(.*\); correct or remove that file",
    ),
    "an id that leads elsewhere": (
        lambda f: (f / "lr_ray.json").write_text('{"adapter_id": "../../evil"}'),
        r"lr_ray\.json\.adapter_id: .*; correct or remove that file",
    ),
    "an id of two parts": (
        lambda f: (f / "lr_ray.json").write_text('{"adapter_id": "owner/name"}'),
        r"lr_ray\.json\.adapter_id: .*; correct or remove that file",
    ),
    "unknown pool": (
        lambda f: (f / "lr_ray.json").write_text('{"pool": "max"}'),
        r"lr_ray\.json\.pool: .*; correct or remove that file",
    ),
    "PiSSA": (lambda f: edit_config(f, init_lora_weights="pissa_niter_4"), "started by pissa_niter_4, which changes the base"),
    "more than LoRA": (lambda f: edit_config(f, layer_replication=[[0, 2]]), "layer_replication in .* more than plain LoRA"),
    "a pattern that hangs": (lambda f: edit_config(f, rank_pattern={"(a+)+b": 2}), "repeats a group"),
    "no rank": (lambda f: edit_config(f, r=None), "no usable r and lora_alpha"),
    "rank a word": (lambda f: edit_config(f, r="four"), "no usable r and lora_alpha"),
    "rank zero": (lambda f: edit_config(f, r=0), r"blocks\.\d\.attn\.qkv has rank 0 in"),
    "rank of another adapter": (lambda f: edit_config(f, r=16), "has rank 16 in adapter_config.json but 4 in its weights"),
    "patterns as a list": (lambda f: edit_config(f, rank_pattern=["qkv"]), "no usable r and lora_alpha"),
    "LoRA on a convolution": (
        lambda f: edit_weights(f, add={"base_model.model.patch_embed.proj.lora_A.weight": torch.zeros(4, 3, 8, 8)}),
        r"patch_embed\.proj lacks a lora_B that fits",
    ),
    "pattern not a regular expression": (lambda f: edit_config(f, rank_pattern={"(": 2}), "no usable r and lora_alpha"),
    "head of other classes": (
        lambda f: edit_weights(f, add={"base_model.model.head.weight": torch.zeros(4, 24)}),
        r"its head has shapes \{.*\}, not \(classes, features\) and \(classes,\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unreadable_adapter_is_named_in_one_line(folder, damage):
    spoil, message = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter(str(folder))
    assert f"adapter {folder}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "head", ""], ids=["A", "B", "the head", "all"])
def test_what_was_saved_in_half_precision_is_read_as_floats(folder, dtype, part):
    weights = load_file(folder / "adapter_model.safetensors")
    halved = {key: value.to(dtype) for key, value in weights.items() if part in key}
    assert halved
    edit_weights(folder, add=halved)
    adapter = read_adapter(str(folder))
    assert {tensor.dtype for tensor in adapter.tensors().values()} == {torch.float32}
    assert adapter.logits(torch.ones(2, 24)).isfinite().all()


def test_weights_of_complex_numbers_are_refused(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    edit_weights(folder, add={key: value.to(torch.complex64) for key, value in weights.items()})
    with pytest.raises(AdapterError, match=r"is of type torch.complex64; no adapter has such weights"):
        read_adapter(str(folder))


def test_an_alpha_of_zero_is_a_scale_of_zero(folder):
    """Of query and value apart, where scales are folded."""
    parts = factors(f"{ATTENTION}.query", 24) | factors(f"{ATTENTION}.value", 24)
    edit_weights(folder, add=parts, remove=tuple(f"{FIRST}.lora_{x}.weight" for x in "AB"))
    edit_config(folder, lora_alpha=0, alpha_pattern={"query": 2})
    delta = read_adapter(str(folder)).updates()["blocks.0.attn.qkv.weight"]
    assert delta[:24].eq(2).all()
    assert not delta[24:].any()


def test_an_absent_config_is_a_storage_error(folder):
    (folder / CONFIG_NAME).unlink()
    with pytest.raises(StorageError, match=CONFIG_NAME):
        read_adapter(str(folder))


def test_a_pickle_is_not_read(folder):
    (folder / WEIGHTS_NAME).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=f"no {WEIGHTS_NAME}; only safetensors are read, never pickles"):
        read_adapter(str(folder))


def test_a_foreign_adapter_needs_no_manifest(folder):
    expected = make_adapter(QKV)
    (folder / "lr_ray.json").unlink()
    edit_config(folder, base_model_name_or_path=None)
    found = read_adapter(f"{folder}/")
    assert found.spec.adapter_id == "one"
    assert found.spec.class_names == ("one/0", "one/1", "one/2", "one/3", "one/4")
    assert (found.spec.backbone, found.spec.backbone_digest) == ("", "")
    assert all(torch.equal(value, expected.tensors()[name]) for name, value in found.tensors().items())


def test_a_head_under_modules_to_save_is_a_head(folder):
    weight, bias = torch.randn(5, 24), torch.randn(5)
    edit_weights(
        folder,
        remove=("base_model.model.head.weight", "base_model.model.head.bias"),
        add={"base_model.model.head.modules_to_save.weight": weight, "base_model.model.head.modules_to_save.bias": bias},
    )
    found = read_adapter(str(folder))
    assert torch.equal(found.head_weight, weight)
    assert torch.equal(found.head_bias, bias)


# Parity with PEFT


@pytest.mark.parametrize("sizes", [QKV, MIXED], ids=["qkv", "mixed"])
def test_peft_loads_an_adapter_of_ours_to_the_same_logits(tmp_path, images, sizes):
    adapter = make_adapter(sizes)
    model = peft.PeftModel.from_pretrained(tiny_vit(NUM_CLASSES), write(tmp_path / "one", adapter)).eval()
    with torch.no_grad():
        logits = model(images)
    assert isinstance(model.base_model.model.head, peft.utils.ModulesToSaveWrapper), "the head is saved again with it"
    plain = replace(adapter, modules={})
    assert (logits - merged_output(tiny_vit(0), plain, images)).abs().max() > 0.1, "the LoRA must matter"
    assert_same(merged_output(tiny_vit(0), adapter, images), logits)


@pytest.mark.parametrize("sizes", [QKV, MIXED], ids=["qkv", "mixed"])
def test_peft_loads_a_meta_lora_of_ours_to_the_same_features(tmp_path, images, sizes):
    adapter = make_adapter(sizes, num_classes=0)
    model = peft.PeftModel.from_pretrained(tiny_vit(0), write(tmp_path / "one", adapter)).eval()
    with torch.no_grad():
        features = model(images)
    assert (features - tiny_vit(0)(images)).abs().max() > 0.1, "the LoRA must matter"
    assert_same(merged_output(tiny_vit(0), adapter, images), features)


@pytest.mark.parametrize("modules", [("attn.qkv",), ("attn.qkv", "mlp.fc1")])
def test_peft_tells_block_1_from_block_11(tmp_path, modules):
    """Module names become patterns in the config: the rank of one block must not reach another."""
    sizes = {f"blocks.{index}.{module}": (1 + index % 5, 2.0 + index) for index in range(12) for module in modules}
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=12, num_heads=2, num_classes=0)
    lows = {}
    for name, (rank, alpha) in sizes.items():
        d_out, d_in = model.get_submodule(name).weight.shape
        lows[name] = LowRank(a=torch.randn(rank, d_in), b=torch.randn(d_out, rank), scale=alpha / rank)
    adapter = replace(make_adapter(QKV, num_classes=0), modules=lows)
    folder = write(tmp_path / "one", adapter)
    found = {name: (low.a.shape[0], low.scale) for name, low in read_adapter(folder).modules.items()}
    assert found == {name: (rank, pytest.approx(alpha / rank)) for name, (rank, alpha) in sizes.items()}
    loaded = peft.PeftModel.from_pretrained(model, folder).base_model.model
    for name, (rank, alpha) in sizes.items():
        layer = loaded.get_submodule(name)
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == pytest.approx(alpha / rank)
        assert_same(layer.get_delta_weight("default"), lows[name].delta())


PEFT_CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "target_modules": ["qkv", "fc1"],
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"blocks.1.attn.qkv": 2, "fc1": 3},
        "alpha_pattern": {r"blocks\.0\.attn\.qkv": 5, "mlp.fc1": 6},
    },
    "rslora with patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "rank_pattern": {r"^blocks\.1\..*qkv": 3},
        "alpha_pattern": {"1.attn.qkv": 2},
    },
    "target by regular expression": {"target_modules": r"blocks\..*\.(qkv|proj|fc2)", "r": 3, "lora_alpha": 3},
}


@pytest.mark.parametrize("has_head", [True, False], ids=["head", "no head"])
@pytest.mark.parametrize("config", PEFT_CONFIGS)
def test_an_adapter_of_pefts_merges_to_the_same_logits(tmp_path, images, config, has_head):
    arguments = {"target_modules": ["qkv"]} | PEFT_CONFIGS[config]
    lora_config = peft.LoraConfig(modules_to_save=["head"] if has_head else None, **arguments)
    model = peft.get_peft_model(tiny_vit(NUM_CLASSES if has_head else 0), lora_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) * (0.3 if "head" in name else 0.15))
    model.eval().save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = model(images)
    adapter = read_adapter(str(tmp_path / "theirs"))
    assert (adapter.head_weight is not None) == has_head
    assert (expected - merged_output(tiny_vit(0), replace(adapter, modules={}), images)).abs().max() > 0.1
    assert_same(merged_output(tiny_vit(0), adapter, images), expected)


def test_an_adapter_that_peft_trained_merges_to_the_same_logits(tmp_path, images):
    config = peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"], r=2, lora_alpha=4)
    model = peft.get_peft_model(tiny_vit(NUM_CLASSES), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    labels = torch.arange(6) % NUM_CLASSES
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = model(images)
    assert_same(merged_output(tiny_vit(0), read_adapter(str(tmp_path / "theirs")), images), expected)


@pytest.mark.parametrize("kind", ["DoRA", "IA3"])
def test_what_peft_saves_of_another_kind_is_refused(tmp_path, kind):
    if kind == "DoRA":
        config = peft.LoraConfig(target_modules=["qkv"], use_dora=True)
    else:
        config = peft.IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"])
    peft.get_peft_model(tiny_vit(0), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match=f"peft_type {kind}, but only plain LoRA is read"):
        read_adapter(str(tmp_path / "theirs"))
