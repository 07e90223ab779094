"""A meta-LoRA put to use: `lr_ray.load`, then features of images and few-shot classification without fine-tuning."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from lr_ray.config import EvaluationConfig, explain
from lr_ray.data.images import read_pixels
from lr_ray.errors import AdapterError, ConfigError, DataError
from lr_ray.fewshot.metric import Metric
from lr_ray.fewshot.protonet import centres_of_ways, prototype_logits
from lr_ray.section import Section
from lr_ray.storage.adapters import read_adapter
from lr_ray.storage.filesystem import join
from lr_ray.storage.manifest import MANIFEST_NAME, digest_of, read_meta_lora_manifest
from lr_ray.storage.metric import read_metric
from lr_ray.vit.backbone import Backbone, BackboneConfig, Precision, load_backbone
from lr_ray.vit.lora import Adapter, check_adapter, merge
from lr_ray.vit.tokens import attention_map, encode_pixels

Images: TypeAlias = Sequence[Image.Image | str | os.PathLike[str]] | Tensor
"""PIL images or paths of image files; or a uint8 tensor (N, 3, H, W) of the model's size."""
Labels: TypeAlias = Sequence[int] | Sequence[str] | Tensor | np.ndarray
"""All of them integers, or all strings."""
SectionType = TypeVar("SectionType", bound=Section)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A backbone with its meta-LoRA merged; `lr_ray.load` makes it.

    Attributes:
        backbone: W + ΔW in place of W; `image_px` is the side of the images.
        precision: of forward passes, as in the run's evaluation.
        batch_size: images of one forward pass.
        metric: that classes are told apart in; None for features as they are.
    """

    backbone: Backbone
    precision: Precision
    batch_size: int
    metric: Metric | None = None

    def embed(self, images: Images) -> Tensor:
        """(N, D) float32 features on the CPU, in the metric if there is one.

        Args:
            images: N of them. PIL images and files are turned as their EXIF says, their short side is resized (bicubic) to
                the model's `image_px` and the central square taken; a tensor is used as it is.

        Raises:
            DataError: no images, an unreadable one, or a tensor of another shape or dtype.
        """
        self._check_images(images, "images")
        return self._features(images)

    def attend(self, images: Images) -> Tensor:
        """(N, h, w) float32 shares of the last block's [CLS] attention among an image's h·w patches; they sum to 1.

        Arguments and errors are those of `embed`.
        """
        self._check_images(images, "images")
        return self._in_batches(images, attention_map)

    def classify(self, support: Images, labels: Labels, query: Images) -> Tensor:
        """(M, C) logits of M query images: minus the distance to the prototype of each of the C classes.

        Args:
            support: labelled images, one or more of every class, not necessarily as many of each.
            labels: of the support images. The columns of the logits follow `sorted(set(labels))`.
            query: M images.

        Raises:
            DataError: no images, labels that do not fit them, one class only, an unreadable image, or a tensor of
                another shape or dtype.
        """
        self._check_images(support, "support")
        self._check_images(query, "query")
        names = _check_labels(labels, len(support))
        features = self._features(support)
        order = sorted(set(names))
        ways = torch.tensor([order.index(name) for name in names])
        return prototype_logits(self._features(query), centres_of_ways(features, ways))

    def _features(self, images: Images) -> Tensor:
        found = self._in_batches(images, encode_pixels)
        with torch.inference_mode():
            return found if self.metric is None else self.metric(found)

    def _in_batches(self, images: Images, work: Callable[..., Tensor]) -> Tensor:
        parts = [images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size)]
        with torch.inference_mode():
            return torch.cat([work(self.backbone, self._pixels(part), precision=self.precision).cpu() for part in parts])

    def _pixels(self, images: Images) -> Tensor:
        """(N, 3, H, W) uint8."""
        if isinstance(images, Tensor):
            return images

        def open_image(index: int) -> Image.Image:
            image = images[index]
            return image if isinstance(image, Image.Image) else Image.open(image)

        return read_pixels(
            range(len(images)), self.backbone.image_px, open_image=open_image, describe=lambda index: str(images[index])
        )

    def _check_images(self, images: Images, what: str) -> None:
        side = self.backbone.image_px
        kinds = f"a sequence of PIL images or paths, or a uint8 tensor of shape (N, 3, {side}, {side})"
        if isinstance(images, Tensor):
            if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, side, side):
                raise DataError(f"{what}: a {images.dtype} tensor of shape {tuple(images.shape)}; give {kinds}")
        elif isinstance(images, str) or not isinstance(images, Sequence):
            raise DataError(f"{what}: a {type(images).__name__}; give {kinds}")
        elif wrong := [image for image in images if not isinstance(image, Image.Image | str | os.PathLike)]:
            raise DataError(f"{what}: a {type(wrong[0]).__name__} among them; give {kinds}")
        if not len(images):
            raise DataError(f"{what}: no images; give at least one")


def _check_labels(labels: Labels, num_images: int) -> list[Any]:
    """The labels as a list.

    Raises:
        DataError: they do not label that many images, are neither integers nor strings, or are all the same.
    """
    names: list[Any] = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    if len(names) != num_images:
        raise DataError(f"labels: {len(names)} for {num_images} support images; give one label for each image")
    kinds = sorted({type(name).__name__ for name in names})
    if not any(all(isinstance(name, kind) for name in names) for kind in (int | np.integer, str)):
        raise DataError(f"labels: of type {' and '.join(kinds)}; give integers only, or strings only")
    if len(set(names)) < 2:
        raise DataError(f"labels: all are {names[0]!r}; give support images of two or more classes")
    return names


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What `load` makes a model of.

    Attributes:
        backbone: as it was before training.
        adapter: the meta-LoRA, checked against the backbone.
        metric: of its features, if it came with one.
        manifest: `lr_ray.json`.
        evaluation: of the run.
    """

    backbone: Backbone
    adapter: Adapter
    metric: Metric | None
    manifest: dict[str, Any]
    evaluation: EvaluationConfig

    def digest(self, precision: Precision | None = None) -> str:
        """SHA-256 of all that features depend on but the device, so that it is the same wherever the model is loaded.

        Args:
            precision: as it is asked for (`auto` stays `auto`); None for that of the run.
        """
        passes = precision or self.evaluation.precision
        return digest_of([self.backbone.identity, self.adapter.spec.digest, self.manifest.get("metric"), passes])

    def merged(self) -> Model:
        """The model. W + ΔW stands in place of W in the backbone of these parts from then on."""
        merge(self.backbone.model, self.adapter.updates())
        passes = self.evaluation
        return Model(backbone=self.backbone, precision=passes.precision, batch_size=passes.batch_size, metric=self.metric)


def load(path: str | os.PathLike[str], device: str = "cpu") -> Model:
    """The backbone that a meta-LoRA was trained on, with the meta-LoRA merged into it.

    Args:
        path: folder or URI (`s3://…`) of a meta-LoRA that `lr-ray train` wrote, such as `runs/demo/meta_lora`.
        device: as torch names it, such as `cuda`.

    Raises:
        AdapterError: not a meta-LoRA, damaged, or trained on another backbone than the one its config now gives.
        BackboneError: the backbone cannot be had.
        ConfigError: no such device.
        StorageError: not readable.
    """
    return load_parts(path, device).merged()


def load_parts(path: str | os.PathLike[str], device: str = "cpu") -> Parts:
    """Backbone and meta-LoRA apart; arguments and errors are those of `load`."""
    folder = str(path)
    manifest = read_meta_lora_manifest(folder)
    backbone_config = _section(manifest, "backbone", BackboneConfig, folder)
    evaluation = _section(manifest, "evaluation", EvaluationConfig, folder)
    _check_device(device)
    adapter = read_adapter(folder)
    backbone = load_backbone(backbone_config, device=device)
    if adapter.spec.backbone_digest != backbone.digest:
        raise AdapterError(
            f"meta-LoRA {folder} was trained on {adapter.spec.backbone!r} with digest {adapter.spec.backbone_digest[:12]}, but "
            f"its backbone ({backbone.source}) now has {backbone.digest[:12]}; put the former weights back or train again"
        )
    check_adapter(adapter, backbone)
    metric = read_metric(folder, num_features=backbone.num_features)
    return Parts(backbone=backbone, adapter=adapter, metric=metric, manifest=manifest, evaluation=evaluation)


def _section(manifest: dict[str, Any], name: str, section: type[SectionType], folder: str) -> SectionType:
    try:
        return section.model_validate(manifest["config"][name])
    except ValidationError as error:
        raise AdapterError(f"{explain(error, join(folder, MANIFEST_NAME), section)}; train again or correct it") from error
    except (KeyError, TypeError) as error:
        raise AdapterError(f"{join(folder, MANIFEST_NAME)} has no config.{name}; it is damaged: train again") from error


def _check_device(device: str) -> None:
    try:
        (torch.ones(1, device=device) + 1).item()  # by a kernel, which a GPU that torch was not built for lacks
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {device!r} cannot be used ({reason}); give cpu, or cuda where there is a GPU") from error
