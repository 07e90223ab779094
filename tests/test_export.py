"""`lr-ray export`: every format, loaded by its own library, gives the model's features; else nothing is written."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import onnxruntime
import pytest
import timm
import torch
from lr_ray.cli.main import app
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import lr_ray
from lr_ray.errors import ExportError, StorageError
from lr_ray.export import write
from lr_ray.export.write import TOLERANCE, export_model
from lr_ray.model import Parts
from lr_ray.vit.backbone import BackboneConfig, load_backbone

FORMATS = ["timm", "onnx", "torch"]


def run_timm(file: Path) -> Callable[[Tensor], Tensor]:
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    network = timm.create_model(about["architecture"], **json.loads(about["architecture_args"])).eval()
    network.load_state_dict(load_file(file))
    mean, std = (torch.tensor(json.loads(about[name]))[:, None, None] for name in ("mean", "std"))
    return lambda images: network((images - mean) / std)


def run_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def run_torch(file: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(file).module()


RUN = {"timm": run_timm, "onnx": run_onnx, "torch": run_torch}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_file_gives_the_features_of_the_model(meta_lora: str, tmp_path: Path, kind: str):
    file = tmp_path / "new" / "model"
    done = CliRunner().invoke(app, ["export", meta_lora, "--format", kind, "--to", str(file), "--json"], catch_exceptions=False)
    written = json.loads(done.stdout)
    assert (written["uri"], written["num_bytes"]) == (str(file), file.stat().st_size)
    assert 0 <= written["difference"] <= TOLERANCE
    assert [path.name for path in file.parent.iterdir()] == ["model"]

    model = lr_ray.load(meta_lora)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        expected = model.backbone.model(model.backbone.normalize(images))
        before = load_backbone(BackboneConfig(name="vit_tiny_patch16_224", image_px=32, pretrained=False))
        without = before.model(before.normalize(images))
        found = RUN[kind](file)(images.float() / 255)
        if kind != "timm":
            assert model.metric is not None
            expected, without = model.metric(expected), model.metric(without)
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * scale)
    assert float((found - without).abs().max()) > 0.1 * scale, "the meta-LoRA is in it"


def test_onnx_has_the_opset_that_is_documented(meta_lora: str, tmp_path: Path):
    file = tmp_path / "m.onnx"
    export_model(meta_lora, "onnx", str(file))
    assert [(entry.domain, entry.version) for entry in onnx.load(file).opset_import] == [("", 20)]


def test_what_is_printed(meta_lora: str, tmp_path: Path):
    file = tmp_path / "m.safetensors"
    done = CliRunner().invoke(app, ["export", meta_lora, "--format", "timm", "--to", str(file)], catch_exceptions=False)
    start = f"{file}: {file.stat().st_size} bytes, largest relative difference "
    assert done.stdout.startswith(start)
    assert float(done.stdout.removeprefix(start)) <= TOLERANCE


def test_the_command_writes_json_alone_to_stdout(meta_lora: str, tmp_path: Path):
    """In a process of its own: torch's exporters print what they do."""
    arguments = ["export", meta_lora, "--format", "onnx", "--to", str(tmp_path / "m.onnx"), "--json"]
    code = f"import sys; from lr_ray.cli.main import main; sys.argv = ['lr-ray', *{arguments!r}]; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["num_bytes"] == (tmp_path / "m.onnx").stat().st_size


@pytest.mark.parametrize(("kind", "fault"), [("timm", 2e-3), ("onnx", 2e-3), ("torch", 2e-3), ("timm", float("nan"))])
def test_other_features_are_not_committed(
    meta_lora: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fault: float
):
    """The weights that go into the file are not those of the model."""
    form = write.KINDS[kind]
    largest = float(lr_ray.load(meta_lora).embed(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).abs().max())

    def make_spoilt(parts: Parts) -> dict[str, bytes]:
        spoilt = copy.deepcopy(parts.backbone.model)
        spoilt.norm.bias.data += fault * largest
        return form.make(replace(parts, backbone=replace(parts.backbone, model=spoilt)))

    monkeypatch.setitem(write.KINDS, kind, replace(form, make=make_spoilt))
    file = tmp_path / "model"
    file.write_text("what was there")
    with pytest.raises(ExportError, match=rf"--format {kind}: the exported features differ .*above 1e-04; nothing was written"):
        export_model(meta_lora, kind, str(file))
    assert file.read_text() == "what was there"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("model")] == ["model"]


@pytest.mark.parametrize("package", ["onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_the_remedy(
    meta_lora: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError) as caught:
        export_model(meta_lora, "onnx", str(tmp_path / "m.onnx"))
    assert str(caught.value).startswith(f"--format onnx: {package} cannot be imported")
    assert str(caught.value).endswith("; pip install 'lr-ray[export]'")
    assert not (tmp_path / "m.onnx").exists()


def test_onnx_holds_less_than_two_gib(meta_lora: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lr_ray.export.files._ONNX_BYTES", 1000)
    with pytest.raises(
        ExportError, match="the weights have [0-9]+ bytes, but an ONNX file holds at most 1000; give torch or timm"
    ):
        export_model(meta_lora, "onnx", str(tmp_path / "m.onnx"))


def test_an_unknown_format(meta_lora: str, tmp_path: Path):
    with pytest.raises(
        ExportError, match="--format 'tflite': there is no such format; give one of timm, onnx, torch, peft, peft-hf"
    ):
        export_model(meta_lora, "tflite", str(tmp_path / "m"))


def test_a_folder_cannot_be_written_over(meta_lora: str, tmp_path: Path):
    with pytest.raises(StorageError, match="cannot write"):
        export_model(meta_lora, "timm", str(tmp_path))
