"""Several meta-LoRAs, and none, on one backbone in memory."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from lr_ray.errors import ConfigError
from lr_ray.model import Model, load_parts
from lr_ray.serving.models import BACKBONE, Catalogue, ServedModel
from lr_ray.storage.manifest import digest_of
from lr_ray.vit.backbone import Precision
from lr_ray.vit.lora import Adapter, merged


@dataclass(kw_only=True)
class Multiplex:
    """Models that share a backbone, used one at a time.

    Of each meta-LoRA its low-rank factors are in memory. W + ΔW of the one in use stands in place of W until another is
    asked for, when the very same W is put back; so memory grows by the factors alone, and by one merged copy of the
    weights that a meta-LoRA changes. Merged, and not W·x + B·(A·x) by request in a common pass, because these are the
    very numbers of `lr_ray.load`, at any precision and whatever an adapter changes besides (biases, norms), and because a
    pass costs nothing more. The price: images of different models do not share a pass, and a change of model is paid by
    multiplying out B·A, about as much as the pass of an image.

    A pass of many images is cut into one for each thread, which compute by themselves: threads that share every operation
    wait for each other at its end, long where another process takes a processor for a moment. Features then are those of
    `lr_ray.load` up to rounding.

    Attributes:
        catalogue: their names and digests.
        models: by name; all have the same backbone.
        adapters: by name; the plain backbone has none.
        threads: of a pass; 1 on a GPU.
    """

    catalogue: Catalogue
    models: dict[str, Model]
    adapters: dict[str, Adapter]
    threads: int = 1
    _in_use: str = BACKBONE
    _merged: ExitStack = field(default_factory=ExitStack)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _alone: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._alone = ThreadPoolExecutor(self.threads, initializer=_compute_alone)

    @property
    def image_px(self) -> int:
        """Side of the images."""
        return self.models[BACKBONE].backbone.image_px

    def embed(self, name: str, pixels: Tensor) -> Tensor:
        """(N, D) features of (N, 3, image_px, image_px) uint8 images by the model of that name."""
        return self._use(name, lambda model: self._embed(model, pixels))

    def attend(self, name: str, pixels: Tensor) -> Tensor:
        """(N, h, w) attention maps, as of `Model.attend`, by the model of that name."""
        return self._use(name, lambda model: model.attend(pixels))

    def embed_groups(self, groups: Sequence[np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
        """Features of several requests' images in one pass a model: of each (n, 3, H, W) uint8, (n, D).

        Args:
            groups: of the images.
            names: of the model of each group.
        """
        found: dict[int, np.ndarray] = {}
        for name in sorted(set(names), key=lambda name: (name != self._in_use, name)):  # what is merged already first
            members = [index for index, other in enumerate(names) if other == name]
            features = self.embed(name, torch.from_numpy(np.concatenate([groups[index] for index in members]))).numpy()
            parts = np.split(features, np.cumsum([len(groups[index]) for index in members])[:-1])
            found |= dict(zip(members, parts, strict=True))
        return [found[index] for index in range(len(groups))]

    def _embed(self, model: Model, pixels: Tensor) -> Tensor:
        if self.threads == 1 or len(pixels) < 2 * self.threads:
            return model.embed(pixels)
        return torch.cat(list(self._alone.map(model.embed, pixels.tensor_split(self.threads))))

    def _use(self, name: str, work: Callable[[Model], Tensor]) -> Tensor:
        with self._lock:
            if self.threads > 1:
                torch.set_num_threads(self.threads)  # of this thread, which may have started after those that compute alone
            if name != self._in_use:
                self._merged.close()
                self._in_use = BACKBONE
                if name in self.adapters:
                    self._merged.enter_context(merged(self.models[name].backbone.model, self.adapters[name].updates()))
                self._in_use = name
            return work(self.models[name])


def _compute_alone() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # what torch first asks of a thread sets it to the number of all


def load_multiplex(
    meta_loras: Mapping[str, str], device: str = "cpu", *, precision: Precision | None = None, threads: int = 1
) -> Multiplex:
    """The meta-LoRAs, and their backbone as `backbone`.

    Digests are those of `Parts.digest`.

    Args:
        meta_loras: folders or URIs by name; the first is the default.
        device: as torch names it.
        precision: of the passes; None for that of each meta-LoRA's run.
        threads: of a pass.

    Raises:
        ConfigError: meta-LoRAs of different backbones or image sizes. Besides as `lr_ray.load`.
    """
    models: dict[str, Model] = {}
    adapters: dict[str, Adapter] = {}
    served: list[ServedModel] = []
    for name, path in meta_loras.items():
        parts = load_parts(path, device)
        first = next(iter(models.values())).backbone if models else parts.backbone
        if parts.backbone.identity != first.identity:
            raise ConfigError(
                f"meta-LoRA {name} ({path}) is of {parts.backbone.name!r} ({parts.backbone.digest[:12]}) at "
                f"{parts.backbone.image_px} px, but {next(iter(models))} of {first.name!r} ({first.digest[:12]}) at "
                f"{first.image_px} px; one service has one backbone and image size: start another service for it"
            )
        evaluation = parts.evaluation
        passes = precision or evaluation.precision
        models[name] = Model(
            backbone=first,
            precision=passes,
            batch_size=evaluation.batch_size,
            metric=parts.metric,
        )
        adapters[name] = parts.adapter.to(first.device)  # whose products are made at every change of models
        served.append(ServedModel(name=name, digest=parts.digest(precision)))
    default = next(iter(models.values()))
    backbone = ServedModel(name=BACKBONE, digest=digest_of([default.backbone.identity, default.precision]))
    catalogue = Catalogue(models=(*served, backbone), num_features=default.backbone.num_features)
    models[BACKBONE] = replace(default, metric=None)
    return Multiplex(catalogue=catalogue, models=models, adapters=adapters, threads=threads)
