"""`--format peft` and `peft-hf`: PEFT loads the folder onto timm's model or transformers', and the features are the model's."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import timm
import torch
import yaml
from lr_ray.cli.main import app
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import lr_ray
from lr_ray.config import ExperimentConfig
from lr_ray.errors import ExportError, StorageError
from lr_ray.export import hugging_face, write
from lr_ray.export.hugging_face import counterpart_of, installed_version
from lr_ray.export.write import TOLERANCE, export_model
from lr_ray.storage.adapters import read_adapter, write_adapter
from lr_ray.storage.manifest import CONFIG_NAME
from lr_ray.vit.backbone import Backbone, load_backbone
from lr_ray.vit.lora import Adapter, AdapterSpec, LoRAConfig, attach_lora, extract_lora
from lr_ray.vit.naming import from_timm
from lr_ray.vit.tokens import encode_pixels

BACKBONES = {
    "vit": ("vit_tiny_patch16_224", 32),
    "deit": ("deit_tiny_distilled_patch16_224", 32),
    "clip": ("vit_xsmall_patch16_clip_224", 32),
    "dinov2": ("vit_small_patch14_dinov2", 28),
}
TWO = LoRAConfig(targets=("q", "v"), rank_pattern={"v": 3, "1.q": 2}, alpha_pattern={"0.v": 7})
ALL = LoRAConfig(
    targets=("q", "k", "v", "proj", "fc1", "fc2"),
    rank_pattern={"k": 1, "3.v": 6, "fc1": 5, "2.fc2": 2},
    alpha_pattern={"proj": 1, "0.q": 3, "fc2": 2},
)
PIXELS = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))

Make = Callable[[str, LoRAConfig], str]


@pytest.fixture
def make_meta_lora(tiny_experiment: ExperimentConfig, tmp_path: Path) -> Make:
    """A folder as `lr-ray train` leaves it: drawn weights, of the backbone too, so that every layer counts."""

    def make(name: str, lora: LoRAConfig, image_px: int = 32, weights_px: int | None = None) -> str:
        generator = torch.Generator().manual_seed(5)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            random = timm.create_model(name, num_classes=0, img_size=weights_px or image_px)
        for parameter in random.parameters():
            around = 1.0 if parameter.ndim == 1 and float(parameter.detach().abs().min()) > 0 else 0.0
            parameter.data = around + 0.06 * torch.randn(parameter.shape, generator=generator)
        weights = tmp_path / f"{name}.safetensors"
        save_file(random.state_dict(), weights)
        config = tiny_experiment.resolved()
        config["backbone"] = {"name": name, "image_px": image_px, "weights": str(weights), "pretrained": True}
        backbone = load_backbone(tiny_experiment.backbone.model_validate(config["backbone"]))
        for module in attach_lora(backbone.model, lora, generator=generator):
            module.lora_b.data = 0.3 * torch.randn(module.lora_b.shape, generator=generator)
        spec = AdapterSpec(adapter_id="meta_lora", digest="", backbone=name, backbone_digest=backbone.digest, class_names=())
        folder = str(tmp_path / f"meta_{name}")
        facts = {"kind": "meta_lora", "config": config}
        write_adapter(folder, Adapter(spec=spec, modules=extract_lora(backbone.model)), inputs={}, facts=facts)
        return folder

    return make


def images_of(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """uint8, and as the model's user normalises them."""
    pixels = PIXELS[..., : backbone.image_px, : backbone.image_px].contiguous()
    return pixels, (pixels.float() / 255 - backbone.mean[:, None, None]) / backbone.std[:, None, None]


def base_of(folder: str) -> Backbone:
    return lr_ray.model.load_parts(folder).backbone


def foreign_base(family: str, backbone: Backbone) -> Any:
    """The model of transformers with the backbone's weights, made without LR-Ray's export."""
    import transformers

    model = backbone.model
    sizes = {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": 12 if family != "clip" else len(model.blocks),
        "num_attention_heads": model.blocks[0].attn.num_heads,
        "image_size": backbone.image_px,
        "patch_size": 14 if family == "dinov2" else 16,
        "layer_norm_eps": 1e-5 if family == "clip" else 1e-6,
    }
    if family == "dinov2":
        made = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    elif family == "clip":
        sizes |= {"intermediate_size": 4 * model.embed_dim, "hidden_act": "gelu"}
        made = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))
    else:
        sizes |= {"intermediate_size": 4 * model.embed_dim}
        config, kind = {
            "vit": (transformers.ViTConfig, transformers.ViTModel),
            "deit": (transformers.DeiTConfig, transformers.DeiTModel),
        }[family]
        made = kind(config(**sizes), add_pooling_layer=False)
    weights = from_timm(model.state_dict(), family, version=installed_version(counterpart_of(backbone).family))
    missing, unexpected = made.load_state_dict(weights, strict=False)
    assert [name for name in missing if not name.endswith(("mask_token", "position_ids"))] == unexpected == []
    return made.eval()


def cls_of(family: str, output: Any) -> Tensor:
    return output.pooler_output if family == "clip" else output.last_hidden_state[:, 0]


def assert_close(found: Tensor, expected: Tensor, without: Tensor) -> None:
    scale = float(expected.abs().max())
    assert float((without - expected).abs().max()) > 0.1 * scale, "the meta-LoRA makes a difference"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * scale)


def code_of_card(folder: Path) -> str:
    return (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]


def assert_same_updates(found: Adapter, expected: Adapter) -> None:
    ours, theirs = expected.updates(), found.updates()
    assert ours.keys() == theirs.keys()
    for name, update in ours.items():
        torch.testing.assert_close(theirs[name], update, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ parity


@torch.no_grad()
@pytest.mark.parametrize("lora", [TWO, ALL], ids=["qv", "all"])
@pytest.mark.parametrize("family", BACKBONES)
def test_transformers_model_gives_the_features(
    make_meta_lora: Callable[..., str], tmp_path: Path, family: str, lora: LoRAConfig
):
    name, image_px = BACKBONES[family]
    folder, out = make_meta_lora(name, lora, image_px), tmp_path / "out"
    written = export_model(folder, "peft-hf", str(out))
    assert 0 <= written.difference <= TOLERANCE
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert written.num_bytes == sum(path.stat().st_size for path in out.iterdir())

    backbone = base_of(folder)
    pixels, images = images_of(backbone)
    expected = encode_pixels(lr_ray.load(folder).backbone, pixels, precision="fp32")
    model = foreign_base(family, backbone)
    without = cls_of(family, model(pixel_values=images))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(did not match|missing adapter keys|unexpected).*")
        wrapped = peft.PeftModel.from_pretrained(model, str(out)).eval()
    assert_close(cls_of(family, wrapped(pixel_values=images)), expected, without)
    assert_same_updates(read_adapter(str(out)), read_adapter(folder))


@torch.no_grad()
@pytest.mark.parametrize("lora", [TWO, ALL], ids=["qv", "all"])
@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_timm_model_gives_the_features(make_meta_lora: Callable[..., str], tmp_path: Path, family: str, lora: LoRAConfig):
    name, image_px = BACKBONES[family]
    folder, out = make_meta_lora(name, lora, image_px), tmp_path / "out"
    assert export_model(folder, "peft", str(out)).difference <= TOLERANCE
    backbone = base_of(folder)
    pixels, images = images_of(backbone)
    without = backbone.model(images)
    wrapped = peft.PeftModel.from_pretrained(backbone.model, str(out)).eval()
    expected = encode_pixels(lr_ray.load(folder).backbone, pixels, precision="fp32")
    assert_close(wrapped(images), expected, without)
    assert_same_updates(read_adapter(str(out)), read_adapter(folder))


@torch.no_grad()
@pytest.mark.parametrize("family", BACKBONES)
def test_the_code_of_the_card_gives_the_features_from_weights_of_another_size(
    make_meta_lora: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
):
    """transformers would resize the position embedding in another way than timm did."""
    name, image_px = BACKBONES[family]
    folder, out = make_meta_lora(name, ALL, image_px, weights_px := 4 * image_px), tmp_path / "out"
    export_model(folder, "peft-hf", str(out))
    small = base_of(folder)
    large = timm.create_model(name, num_classes=0, img_size=weights_px).eval()
    large.load_state_dict(load_file(tmp_path / f"{name}.safetensors"))
    published = foreign_base(family, replace(small, model=large, image_px=weights_px))
    monkeypatch.setattr(type(published), "from_pretrained", lambda _name, **_options: published)
    pixels, images = images_of(small)
    names: dict[str, Any] = {"images": images}
    code = code_of_card(out)
    exec(code.replace('"PATH"', repr(str(out))), names)
    expected = encode_pixels(lr_ray.load(folder).backbone, pixels, precision="fp32")
    assert_close(names["features"], expected, small.model(images))


@torch.no_grad()
def test_of_a_distilled_model_the_card_takes_the_class_token(make_meta_lora: Callable[..., str], tmp_path: Path):
    folder, out = make_meta_lora("deit_tiny_distilled_patch16_224", ALL), tmp_path / "out"
    export_model(folder, "peft", str(out))
    backbone = base_of(folder)
    pixels, images = images_of(backbone)
    code = code_of_card(out)
    names: dict[str, Any] = {"images": images, "model": peft.PeftModel.from_pretrained(backbone.model, str(out)).eval()}
    exec(code.rstrip().rpartition("\n")[2], names)
    expected = encode_pixels(lr_ray.load(folder).backbone, pixels, precision="fp32")
    torch.testing.assert_close(names["features"], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(ExportError, match="gives the mean of its class and its distillation token"):
        export_model(folder, "timm", str(tmp_path / "merged.safetensors"))


@pytest.mark.parametrize(
    ("family", "name", "version"),
    [
        ("clip", "vision_model.pre_layrnorm.weight", 4),
        ("clip", "pre_layrnorm.weight", 5),
        ("vit", "encoder.layer.0.attention.attention.query.weight", 4),
        ("dinov2", "encoder.layer.0.attention.q_proj.weight", 5),
    ],
)
def test_the_version_of_the_names_is_asked_of_the_model(monkeypatch: pytest.MonkeyPatch, family: Any, name: str, version: int):
    """Within transformers 5 each family changed in a release of its own."""
    model = SimpleNamespace(state_dict=lambda: {name: 0})
    classes = ("ViT", "CLIPVision", "Dinov2")
    made = {f"{kind}{part}": lambda *_, **__: model for kind in classes for part in ("Model", "Config")}
    monkeypatch.setattr(hugging_face, "import_module", lambda _name: SimpleNamespace(**made))
    assert installed_version.__wrapped__(family) == version


def test_names_of_the_other_version_are_caught(
    make_meta_lora: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """PEFT loads what fits and warns of the rest: of DINOv2 in transformers 4's names only the MLP's modules."""
    folder = make_meta_lora("vit_small_patch14_dinov2", ALL, 28)
    real = write.KINDS["peft-hf"]
    monkeypatch.setattr("lr_ray.export.adapter.make_foreign", lambda b, c: hugging_face.make_foreign(b, counterpart_of(b)))

    def make(parts: lr_ray.model.Parts) -> dict[str, bytes]:
        with monkeypatch.context() as patch:
            patch.setattr(hugging_face, "installed_version", lambda family: 9 - installed_version(family))
            return real.make(parts)

    monkeypatch.setitem(write.KINDS, "peft-hf", write.Kind(make=make, read=real.read, usage=real.usage, is_folder=True))
    with pytest.raises(ExportError, match="--format peft-hf: the exported features differ .*; nothing was written"):
        export_model(folder, "peft-hf", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["peft", "peft-hf"])
def test_without_peft_lr_ray_reads_it(meta_lora: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    real = export_model(meta_lora, kind, str(tmp_path / "with"))
    monkeypatch.setattr("lr_ray.export.adapter.find_spec", lambda _name: None)
    written = export_model(meta_lora, kind, str(tmp_path / "without"))
    assert written.num_bytes == real.num_bytes
    assert written.difference <= TOLERANCE


# ---------------------------------------------------------------------------------------------------------- the folder


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.removeprefix("---\n").partition("\n---\n")[0])


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("peft", ["import timm", 'timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, img_size=32)']),
        ("peft-hf", ["from transformers import ViTModel", ".last_hidden_state[:, 0]"]),
    ],
)
def test_the_card_says_how_this_form_is_loaded(meta_lora: str, tmp_path: Path, kind: str, lines: list[str]):
    former = "---\nlibrary_name: x\nbase_model: y\nlicense: mit\n---\n# T\n\n## How to use it\n\nOLD\n\n## Accuracy\n\n90\n"
    (Path(meta_lora) / "README.md").write_text(former)
    export_model(meta_lora, kind, str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(card) == {"license": "mit", "library_name": "peft"}, "the base's random weights are on no hub"
    assert "OLD" not in card
    assert card.endswith("\n## Accuracy\n\n90\n")
    assert [line for line in ["# T", "PeftModel.from_pretrained(model, ", *lines] if line not in card] == []
    assert (Path(meta_lora) / "README.md").read_text() == former


def test_a_folder_without_a_card_gets_one(meta_lora: str, tmp_path: Path):
    export_model(meta_lora, "peft", str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# A meta-LoRA of vit_tiny_patch16_224\n" in card
    assert "PeftModel.from_pretrained" in card


def test_the_config_comes_last(meta_lora: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    committed: list[str] = []

    def commit(uri: str, content: bytes) -> None:
        committed.append(uri)
        if len(committed) == 3:
            raise StorageError("full")

    monkeypatch.setattr(write, "write_bytes", commit)
    with pytest.raises(StorageError):
        export_model(meta_lora, "peft", "out")
    assert committed == ["out/README.md", "out/metric.safetensors", "out/adapter_model.safetensors"]


def test_a_replacement_that_is_cut_off_leaves_no_adapter(meta_lora: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not the new weights under the old config."""
    to = tmp_path / "out"
    export_model(meta_lora, "peft", str(to))
    real = write.write_bytes

    def full_after_the_weights(uri: str, content: bytes) -> None:
        if uri.endswith(CONFIG_NAME):
            raise StorageError("full")
        real(uri, content)

    monkeypatch.setattr(write, "write_bytes", full_after_the_weights)
    with pytest.raises(StorageError):
        export_model(meta_lora, "peft", str(to))
    assert {path.name for path in to.iterdir()} == {"README.md", "metric.safetensors", "adapter_model.safetensors"}


def test_to_object_storage_by_the_command(meta_lora: str, bucket: str):
    to = f"{bucket}/out"
    done = CliRunner().invoke(app, ["export", meta_lora, "--format", "peft-hf", "--to", to, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["uri"] == to
    assert_same_updates(read_adapter(to), read_adapter(meta_lora))


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("written", ["{}/", "file://{}", "{}/../meta_lora", "{}/../another"])
def test_no_model_is_written_over(meta_lora: str, written: str):
    another = Path(meta_lora).parent / "another"
    shutil.copytree(meta_lora, another, dirs_exist_ok=True)
    before = read_adapter(meta_lora).spec.digest
    with pytest.raises(ExportError, match=r"is a meta-LoRA or an adapter of LR-Ray .*; give another name"):
        export_model(meta_lora, "peft", written.format(meta_lora))
    assert read_adapter(meta_lora).spec.digest == read_adapter(str(another)).spec.digest == before


def test_a_file_of_a_model_is_not_written_over_but_one_beside_is_written(meta_lora: str):
    before = read_adapter(meta_lora).spec.digest
    with pytest.raises(ExportError, match=r"is a meta-LoRA or an adapter of LR-Ray .*; give another name"):
        export_model(meta_lora, "timm", f"{meta_lora}/adapter_model.safetensors")
    assert read_adapter(meta_lora).spec.digest == before
    export_model(meta_lora, "timm", f"{meta_lora}/merged.safetensors")
    Path(f"{meta_lora}/merged.safetensors").unlink()


@pytest.mark.parametrize(
    "name",
    ["vit_small_patch14_reg4_dinov2", "deit3_small_patch16_224"],
)
def test_a_backbone_without_counterpart(name: str):
    model = timm.create_model(name, num_classes=0)
    half = torch.full((3,), 0.5)
    backbone = Backbone(name=name, model=model, image_px=32, mean=half, std=half, digest="", source="")
    with pytest.raises(ExportError, match=r"--format peft-hf: .*; give peft, which is for timm's model") as caught:
        counterpart_of(backbone)
    assert "\n" not in str(caught.value)


def test_a_meta_lora_that_changes_nothing(make_meta_lora: Callable[..., str], tmp_path: Path):
    folder = make_meta_lora("vit_tiny_patch16_224", LoRAConfig(targets=("q",)))
    adapter = read_adapter(folder)
    manifest = json.loads((Path(folder) / "lr_ray.json").read_text())
    for low_rank in adapter.modules.values():
        low_rank.b.zero_()
    write_adapter(folder, adapter, inputs={}, facts={"kind": "meta_lora", "config": manifest["config"]})
    with pytest.raises(ExportError, match="the meta-LoRA changes nothing"):
        export_model(folder, "peft-hf", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_base_patch16_224.orig_in21k", "google/vit-base-patch16-224-in21k"),
        ("vit_small_patch14_dinov2.lvd142m", "facebook/dinov2-small"),
        ("deit_tiny_distilled_patch16_224.fb_in1k", "facebook/deit-tiny-distilled-patch16-224"),
        ("vit_base_patch32_clip_quickgelu_224.openai", "openai/clip-vit-base-patch32"),
        ("vit_base_patch16_clip_224.laion2b", None),
        ("vit_none", None),
    ],
)
def test_ids_of_hugging_face(name: str, expected: str | None):
    from lr_ray.library.names import backbone_of, hugging_face_id

    assert hugging_face_id(name) == expected
    assert expected is None or backbone_of(expected) == name
