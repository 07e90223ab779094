"""Meta-training of one meta-LoRA on episodes, a step at a time; knows nothing of what runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lr_ray.errors import EpisodeError
from lr_ray.fewshot.distill import Student, TrainConfig, episode_loss, joint_loss
from lr_ray.fewshot.episodes import EpisodeSampler, EpisodeShape, ImagePool, draw_test_episodes
from lr_ray.fewshot.evaluate import episode_accuracies
from lr_ray.fewshot.relations import RelationTargets, relation_loss
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import LoRAConfig, LowRank, attach_lora, detach_lora, extract_lora, lora_modules

_BATCH = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Images that tell the best step: (M, 3, H, W) uint8 images of (M,) classes, and the shape of the episodes."""

    images: Tensor
    labels: Any
    shape: EpisodeShape


class MetaTrainer:
    """The state of one meta-training: student, optimiser, step, best weights so far, history.

    Every random draw depends on (seed, step) alone, so that a trainer restored at any step goes on bit by bit as if it
    had never stopped.
    """

    def __init__(
        self,
        backbone: Backbone,
        pool: ImagePool,
        config: TrainConfig,
        *,
        seed: int,
        start_deltas: Mapping[str, Tensor] | None = None,
        relations: RelationTargets | None = None,
        validation: Validation | None = None,
        rank: int = 0,
        world_size: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        """Attach the meta-LoRA to the backbone.

        Args:
            start_deltas: {module: (D_out, D_in)} that the meta-LoRA starts from, cut to its rank; default zero.
            relations: what takes the place of `config.relations.share` of the episodes; default nothing does.
            validation: default none, and the last weights are the best.
            rank, world_size: which of how many workers this is; episodes are dealt out in turn.
            wrap: makes the student data-parallel.
        """
        self._backbone, self._config, self._seed = backbone, config, seed
        self._rank, self._world_size, self._validation = rank, world_size, validation
        self._relations = relations
        if relations is not None and (count := len(relations.images)) < config.relations.batch_size:
            raise EpisodeError(
                f"training.relations.batch_size {config.relations.batch_size}: there are {count} views; lower it, or raise "
                "training.relations.views_per_image"
            )
        self._sampler = EpisodeSampler(
            pool, config.episode, seed=seed, adapter_share=config.adapter_share, keep_ratio=config.keep_ratio
        )
        attach_lora(backbone.model, config.lora, generator=torch.Generator().manual_seed(seed))
        for name, module in lora_modules(backbone.model).items():
            if start_deltas is not None and name in start_deltas:
                module.load_delta(start_deltas[name].to(backbone.device))
        self._pool, self._labels = pool, torch.from_numpy(_distinct_classes(pool))
        num_classes = int(self._labels.max()) + 1 if config.objective == "joint" else None
        self._bare = Student(backbone, config.precision, num_classes=num_classes)
        self._student = wrap(self._bare)
        self._parameters = {
            f"{name}.{part}": getattr(module, part)
            for name, module in lora_modules(backbone.model).items()
            for part in ("lora_a", "lora_b")
        }
        if self._bare.classifier is not None:
            self._parameters |= {f"classifier.{part}": value for part, value in self._bare.classifier.named_parameters()}
        self._optimizer = torch.optim.Adam(self._parameters.values(), lr=config.schedule.lowest)
        self.step = 0
        self.best_step = 0
        self.best_accuracy = -1.0
        self.best = self._snapshot()
        self.history: list[dict[str, float]] = []

    def run_step(self) -> dict[str, float]:
        """One optimiser step on this worker's share of its episodes; the metrics are this worker's."""
        config = self._config
        for group in self._optimizer.param_groups:
            group["lr"] = config.schedule.at(self.step)
        self._optimizer.zero_grad()
        mine = range(self._rank, config.episodes_per_step, self._world_size)
        total_loss, total_accuracy = 0.0, 0.0
        for position in mine:
            loss, accuracy = self._loss(self.step * config.episodes_per_step + position)
            (loss / len(mine)).backward()
            total_loss += loss.item() / len(mine)
            total_accuracy += accuracy.item() / len(mine)
        self._optimizer.step()
        self.step += 1
        metrics = {"step": self.step, "loss": total_loss, "accuracy": total_accuracy}
        self.history.append(metrics)
        return metrics

    def _loss(self, index: int) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of episode number `index`, or of the batch that takes its place."""
        config, relations = self._config, self._relations
        rng = np.random.default_rng((self._seed, index, 1))
        if relations is not None and rng.random() < config.relations.share:
            chosen = torch.from_numpy(rng.choice(len(relations.images), config.relations.batch_size, replace=False))
            kept = None if relations.keep_indices is None else relations.keep_indices[chosen]
            features: Tensor = self._student(relations.images[chosen].float().div_(255), kept)
            return relation_loss(features, relations.features[chosen].to(features.device), config.relations.temperature)
        grid_size = self._backbone.model.patch_embed.grid_size
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        if config.objective == "joint":
            count = config.episode.n_way * (config.episode.n_shot + config.episode.n_query)
            chosen = torch.from_numpy(rng.choice(len(self._labels), count))
            return joint_loss(
                self._student,
                self._pool.images[chosen],
                self._sampler.keep_indices(chosen),
                self._labels[chosen],
                config,
                grid_size=grid_size,
                generator=generator,
            )
        return episode_loss(self._student, self._sampler.draw(index), config, grid_size=grid_size, generator=generator)

    def validate(self) -> float | None:
        """Accuracy on the validation episodes, and the weights kept if it is the best; None if there are none."""
        if self._validation is None:
            self.best, self.best_step = self._snapshot(), self.step
            return None
        images, shape = self._validation.images, self._validation.shape
        with torch.no_grad():
            features = torch.cat([self._bare.features(part.float() / 255, None).cpu() for part in images.split(_BATCH)])
        episodes = draw_test_episodes(
            self._validation.labels, shape, num_episodes=self._config.validation_episodes, seed=self._seed
        )
        accuracy = float(episode_accuracies(features, episodes, shape).mean())
        if accuracy > self.best_accuracy:
            self.best, self.best_step, self.best_accuracy = self._snapshot(), self.step, accuracy
        if self.history:
            self.history[-1]["validation_accuracy"] = accuracy
        return accuracy

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything needed to go on: tensors, and facts that fit into JSON."""
        tensors = {f"weights/{name}": value for name, value in self._snapshot().items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer/{name}/{key}"] = value.detach().clone()
        facts = {
            "step": self.step,
            "best_step": self.best_step,
            "best_accuracy": self.best_accuracy,
            "history": [dict(metrics) for metrics in self.history],
        }
        return tensors, facts

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self._load({name: tensors[f"weights/{name}"] for name in self._parameters})
        self.best = {name: tensors[f"best/{name}"].clone() for name in self._parameters}
        for name, parameter in self._parameters.items():
            prefix = f"optimizer/{name}/"
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self._optimizer.state[parameter] = {key: value.clone() for key, value in state.items()}
        self.step, self.best_step, self.best_accuracy = facts["step"], facts["best_step"], facts["best_accuracy"]
        self.history = list(facts["history"])

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def _load(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


def _distinct_classes(pool: ImagePool) -> np.ndarray:
    """(M,) class of each image, those of one name counted as one."""
    names = list(dict.fromkeys(pool.class_names))
    renumbered: np.ndarray = np.array([names.index(name) for name in pool.class_names])[pool.class_of]
    return renumbered


def best_modules(backbone: Backbone, config: LoRAConfig, tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """{timm module: update} of the best weights in a `MetaTrainer.state()`."""
    attach_lora(backbone.model, config, generator=torch.Generator())
    try:
        for name, module in lora_modules(backbone.model).items():
            for part in ("lora_a", "lora_b"):
                getattr(module, part).data.copy_(tensors[f"best/{name}.{part}"])
        return extract_lora(backbone.model)
    finally:
        detach_lora(backbone.model)
