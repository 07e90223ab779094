"""The stream of training batches: which classes are in memory when, and what is drawn from them.

All of it is a function of seed and episode number, so that any worker can begin anywhere: a resumed training, one of
other many workers, and one that never stopped see the same batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lr_ray.errors import EpisodeError
from lr_ray.fewshot.distill import TrainConfig, TrainingBatch, view_episode
from lr_ray.fewshot.episodes import ClassImages, ClassRef, EpisodeSampler
from lr_ray.fewshot.relations import RelationTargets
from lr_ray.vit.augment import augment

Shelf = tuple[ClassRef, ...]
"""Classes of one file, which come into memory and leave it together."""


class ClassSchedule:
    """Which classes are in memory for which episode.

    Every pass over the set puts the classes of each file in a new order, cuts them into shelves, and puts the shelves in
    a new order. Memory holds a window of that endless row of shelves, which moves on as episodes are drawn.
    """

    def __init__(self, refs: Sequence[ClassRef], config: TrainConfig, *, seed: int) -> None:
        self._files = [tuple(found) for _, found in groupby(refs, key=lambda ref: ref.file)]
        self._seed = seed
        self.holds_all = len(refs) <= config.stream.buffer_classes
        self._shelf_size = config.episode.n_way if config.adapter_share else 1
        self._pass = lru_cache(maxsize=3)(self._draw_pass)
        sizes = [len(shelf) for shelf in self._pass(0)]
        self._width = max(1, config.stream.buffer_classes // max(sizes))
        self._shelves_per_episode = config.episode.n_way / config.stream.uses_per_class * len(sizes) / len(refs)

    def window_at(self, index: int) -> range:
        """The numbers of the shelves that are in memory for episode number `index`."""
        start = int(index * self._shelves_per_episode)
        return range(start, start + self._width)

    def shelf(self, number: int) -> Shelf:
        """The classes of a shelf of the endless row."""
        per_pass = len(self._pass(0))
        return self._pass(number // per_pass)[number % per_pass]

    def all_classes(self) -> list[Shelf]:
        """Each file's classes, in the order of the set."""
        return self._files

    def _draw_pass(self, number: int) -> list[Shelf]:
        """All classes once."""
        shelves: list[Shelf] = []
        for position, classes in enumerate(self._files):
            order = np.random.default_rng((self._seed, 2, number, position)).permutation(len(classes))
            parts = np.array_split(order, max(1, len(classes) // self._shelf_size))
            shelves += [tuple(classes[i] for i in part) for part in parts]
        return [shelves[i] for i in np.random.default_rng((self._seed, 3, number)).permutation(len(shelves))]


class ClassBuffer:
    """The classes of the schedule's window, read as they come into it."""

    def __init__(self, schedule: ClassSchedule, read: Callable[[Sequence[Shelf]], list[list[ClassImages]]]) -> None:
        self._schedule, self._read = schedule, read
        self._window = range(0)
        self._shelves: dict[int, list[ClassImages]] = {}
        self._classes: list[ClassImages] = []

    def at(self, index: int) -> list[ClassImages]:
        """The classes in memory for episode number `index`; the same list for as long as they stay the same."""
        if self._schedule.holds_all:
            if not self._classes:
                self._classes = [found for shelf in self._read(self._schedule.all_classes()) for found in shelf]
            return self._classes
        window = self._schedule.window_at(index)
        if window != self._window:
            kept = {number: shelf for number, shelf in self._shelves.items() if number in window}
            missing = [number for number in window if number not in kept]
            read = self._read([self._schedule.shelf(number) for number in missing])
            self._shelves = kept | dict(zip(missing, read, strict=True))
            self._window = window
            self._classes = self._distinct()
        return self._classes

    def _distinct(self) -> list[ClassImages]:
        """Where two passes meet, a class may be on two shelves."""
        found: dict[tuple[str, int], ClassImages] = {}
        for number in self._window:
            for ref, images in zip(self._schedule.shelf(number), self._shelves[number], strict=True):
                found.setdefault((ref.file, ref.row_group), images)
        return list(found.values())


class BatchMaker:
    """Draws training batch number `index`."""

    def __init__(
        self,
        refs: Sequence[ClassRef],
        buffer: ClassBuffer,
        config: TrainConfig,
        *,
        seed: int,
        grid_size: tuple[int, int],
        relations: RelationTargets | None = None,
    ) -> None:
        """Args: refs, all classes of the set; relations, what takes the place of `config.relations.share` of the episodes."""
        if relations is not None and (count := len(relations.images)) < config.relations.batch_size:
            raise EpisodeError(
                f"training.relations.batch_size {config.relations.batch_size}: there are {count} views; lower it, or raise "
                "training.relations.views_per_image"
            )
        self._buffer, self._config, self._seed, self._grid_size = buffer, config, seed, grid_size
        self._relations = relations
        self._label_of = {name: label for label, name in enumerate(distinct_names(refs))}
        self._sampled: list[ClassImages] | None = None
        self._sampler: EpisodeSampler

    def draw(self, index: int) -> TrainingBatch:
        """The views of an episode, or of the images that take its place.

        Raises:
            EpisodeError: the classes in memory do not do for an episode.
        """
        config, relations = self._config, self._relations
        rng = np.random.default_rng((self._seed, index, 1))
        if relations is not None and rng.random() < config.relations.share:
            chosen = torch.from_numpy(rng.choice(len(relations.images), config.relations.batch_size, replace=False))
            kept = None if relations.keep_indices is None else relations.keep_indices[chosen]
            pixels = relations.images[chosen].float().div_(255)
            return TrainingBatch(pixels=pixels, keep_indices=kept, relation_target=relations.features[chosen])
        sampler = self._sampler_at(index)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        if config.objective == "episodes":
            return view_episode(sampler.draw(index), config, grid_size=self._grid_size, generator=generator)
        count = config.episode.n_way * (config.episode.n_shot + config.episode.n_query)
        picks = _any_images(self._buffer.at(index), count, rng)
        images = torch.cat([found.images[pick] for found, pick in picks])
        pixels, kept, _ = augment(
            images, sampler.keep_indices(picks), config.augmentation, grid_size=self._grid_size, generator=generator
        )
        labels = torch.tensor([self._label_of[found.name] for found, _ in picks])
        return TrainingBatch(pixels=pixels, keep_indices=kept, labels=labels)

    def _sampler_at(self, index: int) -> EpisodeSampler:
        classes, config = self._buffer.at(index), self._config
        if classes is not self._sampled:
            self._sampler = EpisodeSampler(
                classes,
                config.episode,
                seed=self._seed,
                adapter_share=config.adapter_share,
                keep_ratio=config.keep_ratio,
                smallest=config.smallest_episode,
            )
            self._sampled = classes
        return self._sampler


def _any_images(classes: Sequence[ClassImages], count: int, rng: np.random.Generator) -> list[tuple[ClassImages, Tensor]]:
    """As many images, of any class, each as its class and (1,) its position there."""
    ends = np.cumsum([found.num_images for found in classes])
    picks = []
    for position in rng.choice(ends[-1], count):
        owner = int(np.searchsorted(ends, position, side="right"))
        picks.append((classes[owner], torch.tensor([position - ends[owner] + classes[owner].num_images])))
    return picks


def distinct_names(refs: Sequence[ClassRef]) -> list[str]:
    """The names of the classes, those of one name counted as one."""
    return list(dict.fromkeys(ref.name for ref in refs))


def episode_numbers(step: int, config: TrainConfig, *, rank: int, world_size: int) -> range:
    """The numbers of the episodes that one of `world_size` workers takes in optimiser step `step`; dealt out in turn."""
    return range(step * config.episodes_per_step + rank, (step + 1) * config.episodes_per_step, world_size)


def pack(batches: Sequence[TrainingBatch]) -> bytes:
    """Batches on their way between processes."""
    tensors: dict[str, Tensor] = {}
    for position, batch in enumerate(batches):
        for field in fields(batch):
            value = getattr(batch, field.name)
            if value is not None:
                tensors[f"{position}.{field.name}"] = torch.as_tensor(value).contiguous()
    packed: bytes = save_safetensors(tensors)
    return packed


def unpack(content: bytes) -> list[TrainingBatch]:
    """What `pack` was given."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in load_safetensors(content).items():
        position, name = key.split(".")
        found.setdefault(int(position), {})[name] = value
    return [_batch(found[position]) for position in sorted(found)]


def _batch(values: dict[str, Tensor]) -> TrainingBatch:
    n_way = int(values.pop("n_way"))
    return TrainingBatch(n_way=n_way, **values)
