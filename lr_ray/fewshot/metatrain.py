"""Meta-training of one meta-LoRA, a step at a time; knows nothing of what runs it or where its batches come from."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lr_ray.fewshot.distill import Student, TrainConfig, TrainingBatch, batch_loss
from lr_ray.fewshot.episodes import EpisodeShape, draw_test_episodes
from lr_ray.fewshot.evaluate import episode_accuracies
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

    Nothing is drawn at random here: restored at any step and handed the same batches, it goes on bit by bit as if it had
    never stopped.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: TrainConfig,
        *,
        seed: int,
        num_classes: int | None = None,
        start_updates: Mapping[str, Tensor] | None = None,
        validation: Validation | None = None,
        world_size: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        """Attach the meta-LoRA to the backbone.

        Args:
            seed: of its first weights and of the validation episodes.
            num_classes: for `objective: joint`, how many there are in all.
            start_updates: {parameter name: update} that the meta-LoRA starts from, cut to its rank; default zero.
            validation: default none, and the last weights are the best.
            world_size: how many workers share each step.
            wrap: makes the student data-parallel.
        """
        self._backbone, self._config, self._seed = backbone, config, seed
        self._world_size, self._validation = world_size, validation
        attach_lora(backbone.model, config.lora, generator=torch.Generator().manual_seed(seed))
        for name, module in lora_modules(backbone.model).items():
            if start_updates is not None and f"{name}.weight" in start_updates:
                module.load_delta(start_updates[f"{name}.weight"].to(backbone.device))
        classes = num_classes if config.objective == "joint" else None
        self._bare = Student(backbone, config.precision, num_classes=classes, recompute=config.recompute)
        self._parameters = {
            f"{name}.{part}": getattr(module, part)
            for name, module in lora_modules(backbone.model).items()
            for part in ("lora_a", "lora_b")
        }
        if self._bare.classifier is not None:
            self._parameters |= {f"classifier.{part}": value for part, value in self._bare.classifier.named_parameters()}
        _leave_frozen_to_each_worker(self._bare)
        self._student = wrap(self._bare)
        self._optimizer = torch.optim.Adam(self._parameters.values(), lr=config.schedule.lowest)
        self._average = self._snapshot() if config.ema else {}
        self.step = 0
        self.best_step = 0
        self.best_accuracy = -1.0
        self.best = self._snapshot()
        self.history: list[dict[str, float]] = []

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the last `patience` validations found nothing better."""
        config = self._config
        if self.step >= config.num_steps:
            return True
        return config.patience is not None and self.step - self.best_step >= config.patience * config.validate_every

    def run_step(self, batches: Sequence[TrainingBatch]) -> dict[str, float]:
        """One optimiser step on this worker's share of the batches; the metrics are this worker's."""
        config = self._config
        for group in self._optimizer.param_groups:
            group["lr"] = config.schedule.at(self.step, config.num_steps)
        self._optimizer.zero_grad()
        total_loss, total_accuracy = 0.0, 0.0
        for position, batch in enumerate(batches):
            with self._gradients_meet(last=position == len(batches) - 1):
                loss, accuracy = batch_loss(self._student, batch, config)
                (loss * (self._world_size / config.episodes_per_step)).backward()  # workers' gradients are averaged
            total_loss += loss.item() / len(batches)
            total_accuracy += accuracy.item() / len(batches)
        self._optimizer.step()
        self._follow()
        self.step += 1
        metrics = {"step": self.step, "loss": total_loss, "accuracy": total_accuracy}
        self.history.append(metrics)
        return metrics

    def _gradients_meet(self, *, last: bool) -> AbstractContextManager[None]:
        """Workers exchange gradients once a step, after their last batch."""
        data_parallel = isinstance(self._student, DistributedDataParallel)
        return nullcontext() if last or not data_parallel else self._student.no_sync()  # type: ignore[operator]

    @torch.no_grad()
    def _follow(self) -> None:
        """The average of the weights takes a step after them."""
        for name, value in self._average.items():
            value.lerp_(self._parameters[name].cpu(), 1 - self._config.ema)

    def validate(self) -> float | None:
        """Accuracy on the validation episodes, and the weights kept if it is the best; None if there are none."""
        if self._validation is None:
            self.best, self.best_step = self._result(), self.step
            return None
        images, shape = self._validation.images, self._validation.shape
        features = self._embed(images, self._result())
        episodes = draw_test_episodes(
            self._validation.labels, shape, num_episodes=self._config.validation_episodes, seed=self._seed
        )
        accuracy = float(episode_accuracies(features, episodes, shape).mean())
        if accuracy > self.best_accuracy:
            self.best, self.best_step, self.best_accuracy = self._result(), self.step, accuracy
        if self.history:
            self.history[-1]["validation_accuracy"] = accuracy
        return accuracy

    def embed_by_best(self, images: Tensor) -> Tensor:
        """(M, D) features of (M, 3, H, W) uint8 images with the best weights so far, on the CPU."""
        return self._embed(images, self.best)

    @torch.no_grad()
    def _embed(self, images: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """With these in the place of the trained weights."""
        kept = self._snapshot()
        self._load(weights)
        try:
            return torch.cat([self._bare.features(part.float() / 255, None).float().cpu() for part in images.split(_BATCH)])
        finally:
            self._load(kept)

    def _result(self) -> dict[str, Tensor]:
        """What training has come to: the average of the weights if there is one, else the weights."""
        return {name: value.clone() for name, value in self._average.items()} or self._snapshot()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything needed to go on: tensors, and facts that fit into JSON."""
        tensors = {f"weights/{name}": value for name, value in self._snapshot().items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        tensors |= {f"last/{name}": value for name, value in self._result().items()}
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
        self._average = {name: tensors[f"last/{name}"].clone() for name in self._average}
        for name, parameter in self._parameters.items():
            prefix = f"optimizer/{name}/"
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self._optimizer.state[parameter] = _moved(state, parameter.device)
        self.step, self.best_step, self.best_accuracy = facts["step"], facts["best_step"], facts["best_accuracy"]
        self.history = list(facts["history"])

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: parameter.detach().cpu().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def _load(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])


def _moved(state: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A copy of Adam's state of a parameter on its device; the count of steps stays on the CPU."""
    return {key: value.to("cpu" if key == "step" else device, copy=True) for key, value in state.items()}


def _leave_frozen_to_each_worker(student: nn.Module) -> None:
    """Data-parallel training is to exchange what is trained, not the backbone, which every worker has loaded."""
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in student.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(student, frozen + buffers)


def kept_modules(
    backbone: Backbone, config: LoRAConfig, tensors: Mapping[str, Tensor], *, which: Literal["best", "last"]
) -> dict[str, LowRank]:
    """{timm module: update} of the best or the last weights in a `MetaTrainer.state()`."""
    attach_lora(backbone.model, config, generator=torch.Generator())
    try:
        for name, module in lora_modules(backbone.model).items():
            for part in ("lora_a", "lora_b"):
                getattr(module, part).data.copy_(tensors[f"{which}/{name}.{part}"])
        return extract_lora(backbone.model)
    finally:
        detach_lora(backbone.model)
