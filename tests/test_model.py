"""`lr_ray.load`: what evaluation measures, as a person calls it; and a line for everything that does not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lr_ray
from lr_ray.config import ExperimentConfig
from lr_ray.data.images import DataConfig, LabelledImages
from lr_ray.data.load import load_data
from lr_ray.errors import AdapterError, BackboneError, ConfigError, DataError, LrRayError
from lr_ray.fewshot.episodes import EpisodeShape, draw_test_episodes
from lr_ray.fewshot.evaluate import episode_accuracies
from lr_ray.fewshot.methods import MethodInputs
from lr_ray.fewshot.methods.features import embedder
from lr_ray.model import Model
from lr_ray.storage.adapters import read_adapter, write_adapter
from lr_ray.storage.filesystem import list_files, read_bytes, write_bytes
from lr_ray.storage.metric import read_metric
from lr_ray.vit.backbone import load_backbone
from lr_ray.vit.lora import Adapter


@pytest.fixture
def model(meta_lora: str) -> Model:
    return lr_ray.load(meta_lora)


@pytest.fixture(scope="module")
def digits() -> LabelledImages:
    return load_data(DataConfig(source="digits", classes=("6:10",)))


def evaluated(config: ExperimentConfig, features: str, images: torch.Tensor) -> torch.Tensor:
    """The features that `lr-ray eval` gives the images."""
    inputs = MethodInputs(
        backbone=load_backbone(config.backbone),
        precision=config.evaluation.precision,
        adapters=list,
        meta_lora=lambda: read_adapter(config.meta_lora_root),
        joint=lambda: read_adapter(config.joint_root),
        oracle=lambda: read_adapter(config.oracle_root),
    )
    with embedder(inputs, features) as embed, torch.inference_mode():
        return embed(images)


def line_of(kind: type[LrRayError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------ results


def test_features_are_those_of_recycle_in_evaluation(model: Model, tiny_experiment: ExperimentConfig, digits: LabelledImages):
    images = digits.pixels(range(40), 32)
    features = model.embed(images)
    assert features.shape == (40, 192)
    metric = read_metric(tiny_experiment.meta_lora_root, num_features=192)
    assert metric is not None
    assert torch.equal(features, metric(evaluated(tiny_experiment, "recycle", images)))
    assert not torch.allclose(features, metric(evaluated(tiny_experiment, "backbone", images)), rtol=0.1, atol=0.1)
    change_manifest(tiny_experiment.meta_lora_root, lambda manifest: manifest.pop("metric"))
    plain = lr_ray.load(tiny_experiment.meta_lora_root).embed(images)
    assert torch.equal(plain, evaluated(tiny_experiment, "recycle", images))


def test_classifying_gives_the_accuracy_of_evaluation(model: Model, digits: LabelledImages):
    shape = EpisodeShape(n_way=3, n_shot=2, n_query=4)
    episodes = draw_test_episodes(digits.labels, shape, num_episodes=5, seed=0)
    features = model.embed(digits.pixels(np.arange(len(digits)), 32))
    shuffled = np.array([3, 0, 5, 1, 4, 2])
    accuracies = []
    for episode in episodes:
        support, query = episode[:, :2].ravel()[shuffled], episode[:, 2:].ravel()
        logits = model.classify(digits.pixels(support, 32), np.repeat([0, 1, 2], 2)[shuffled], digits.pixels(query, 32))
        assert logits.shape == (12, 3)
        accuracies.append((logits.argmax(dim=1) == torch.arange(3).repeat_interleave(4)).float().mean().item())
    assert accuracies == pytest.approx(episode_accuracies(features, episodes, shape))


def test_files_and_pil_images_are_resized_and_cropped_as_data_are(model: Model, tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 50, 70, 3), dtype=np.uint8)
    pictures = [Image.fromarray(array) for array in pixels]
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    data = LabelledImages(
        name="", class_names=("a",), labels=np.zeros(2), describe=str, open_image=lambda i: pictures[i], digest=str
    )
    expected = model.embed(data.pixels(range(2), 32))
    assert torch.equal(model.embed(pictures), expected)
    assert torch.equal(model.embed(paths), expected)
    assert torch.equal(model.embed([str(paths[0]), pictures[1]]), expected)


def test_columns_follow_the_sorted_labels_and_classes_may_differ_in_size(model: Model, digits: LabelledImages):
    support = digits.pixels(range(5), 32)
    logits = model.classify(support, ["pear", "apple", "pear", "fig", "pear"], support)
    features = model.embed(support)
    apple, fig, pear = features[1], features[3], features[[0, 2, 4]].mean(dim=0)
    expected = -torch.stack([(features - centre).norm(dim=1) for centre in (apple, fig, pear)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-2)
    by_number = model.classify(support, torch.tensor([10, 2, 10, 9, 10]), support)
    assert torch.equal(by_number, logits)


def test_more_images_than_a_batch(model: Model, digits: LabelledImages):
    images = digits.pixels(range(2 * model.batch_size + 1), 32)
    features = model.embed(images)
    assert len(features) == len(images)
    torch.testing.assert_close(features[-1:], model.embed(images[-1:]), rtol=0.02, atol=0.02)


def test_from_object_storage(meta_lora: str, model: Model, bucket: str, digits: LabelledImages):
    for name in list_files(meta_lora, suffix=""):
        write_bytes(f"{bucket}/meta_lora/{name}", read_bytes(f"{meta_lora}/{name}"))
    images = digits.pixels(range(3), 32)
    assert torch.equal(lr_ray.load(f"{bucket}/meta_lora").embed(images), model.embed(images))


# ------------------------------------------------------------------------------------------------- what does not load


def change_manifest(folder: str, change: Callable[[dict[str, Any]], object]) -> None:
    path = Path(folder) / "lr_ray.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_another_backbone_is_refused(meta_lora: str):
    change_manifest(meta_lora, lambda manifest: manifest["config"]["backbone"].update(name="vit_small_patch16_224"))
    digest = read_adapter(meta_lora).spec.backbone_digest[:12]
    message = line_of(AdapterError, lambda: lr_ray.load(meta_lora))
    assert f"'vit_tiny_patch16_224' with digest {digest}, but its backbone (random weights, seed 0) now has" in message


def test_a_folder_that_is_no_adapter(tmp_path: Path):
    message = line_of(AdapterError, lambda: lr_ray.load(tmp_path))
    assert f"{tmp_path} is no adapter: it has no adapter_config.json; give the folder of a meta-LoRA that `lr-ray" in message


def test_a_peft_folder_without_manifest(meta_lora: str):
    (Path(meta_lora) / "lr_ray.json").unlink()
    assert "without lr_ray.json, so its backbone is not known; give" in line_of(AdapterError, lambda: lr_ray.load(meta_lora))


def test_an_adapter_that_is_no_meta_lora(make_adapter: Callable[..., Adapter], tmp_path: Path):
    write_adapter(str(tmp_path), make_adapter(), inputs={}, facts={})
    assert "is an adapter of its own classes, not a meta-LoRA; give" in line_of(AdapterError, lambda: lr_ray.load(tmp_path))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda manifest: manifest.pop("config"), AdapterError, "has no config.backbone; it is damaged: train again"),
        (
            lambda manifest: manifest["config"]["backbone"].update(color=1),
            AdapterError,
            "unknown key 'color'; allowed there: name",
        ),
        (lambda manifest: manifest["config"]["backbone"].update(name="vit_none"), BackboneError, "timm has no such model"),
    ],
)
def test_a_manifest_without_a_usable_backbone(meta_lora: str, change: Any, kind: type[LrRayError], message: str):
    change_manifest(meta_lora, change)
    assert message in line_of(kind, lambda: lr_ray.load(meta_lora))


def test_a_device_that_is_not_there(meta_lora: str):
    assert "device 'nonsense' cannot be used" in line_of(ConfigError, lambda: lr_ray.load(meta_lora, device="nonsense"))


# -------------------------------------------------------------------------------------------- what does not classify

ONE = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images: no images; give at least one"),
        (ONE[:0], "images: no images; give at least one"),
        (
            ONE.float(),
            "images: a torch.float32 tensor of shape (1, 3, 32, 32); give a sequence of PIL images or paths, or a uint8",
        ),
        (ONE[..., :31], "tensor of shape (1, 3, 32, 31); give"),
        (ONE[0], "tensor of shape (3, 32, 32); give"),
        ("picture.png", "images: a str; give a sequence"),
        ([np.zeros((32, 32, 3))], "images: a ndarray among them; give"),
        (["missing.png"], "image missing.png does not decode (FileNotFoundError"),
        ([__file__], "test_model.py does not decode (UnidentifiedImageError"),
        ([Image.new("RGB", (0, 3))], "has 0×3 pixels"),
    ],
)
def test_images_that_cannot_be_used(model: Model, images: Any, message: str):
    assert message in line_of(DataError, lambda: model.embed(images))


@pytest.mark.parametrize(
    ("num_support", "labels", "message"),
    [
        (0, [], "support: no images; give at least one"),
        (3, [1, 2], "labels: 2 for 3 support images; give one label for each image"),
        (2, ["a", "a"], "labels: all are 'a'; give support images of two or more classes"),
        (2, [1, "a"], "labels: of type int and str; give integers only, or strings only"),
        (2, [0.5, 1.5], "labels: of type float; give"),
    ],
)
def test_supports_that_cannot_be_used(model: Model, num_support: int, labels: Any, message: str):
    support = ONE.repeat(num_support, 1, 1, 1)
    assert message in line_of(DataError, lambda: model.classify(support, labels, ONE))


def test_a_query_that_cannot_be_used(model: Model):
    assert "query: no images" in line_of(DataError, lambda: model.classify(ONE.repeat(2, 1, 1, 1), [0, 1], []))
