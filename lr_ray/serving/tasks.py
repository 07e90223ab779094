"""Few-shot tasks as sums: what prototypes and the threshold need of the support images, and nothing else of them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lr_ray.errors import RequestError, StorageError
from lr_ray.fewshot.protonet import prototype_logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a query is taken for.

    Attributes:
        ranked: class names, most probable first.
        probabilities: of those.
        distances: to the prototypes of those.
        rejected: whether it is none of these; None where there is no threshold.
    """

    ranked: tuple[str, ...]
    probabilities: tuple[float, ...]
    distances: tuple[float, ...]
    rejected: bool | None


@dataclass(frozen=True, kw_only=True)
class Support:
    """Classes by the sums of their support features, in float64: what is added can be taken away, in any order.

    Attributes:
        class_names: C of them, sorted, as the columns of `lr_ray.load(…).classify`.
        sums: (C, D) sum of the features of each class.
        squares: (C,) sum of their squared lengths.
        counts: (C,) how many they are.
    """

    class_names: tuple[str, ...]
    sums: Tensor
    squares: Tensor
    counts: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Sequence[str]) -> "Support":
        """Of (S, D) features and their S class names, in any order."""
        names = sorted(set(labels))
        ways = torch.tensor([names.index(label) for label in labels])
        exact = features.to("cpu", torch.float64)
        return cls(
            class_names=tuple(names),
            sums=exact.new_zeros(len(names), exact.shape[1]).index_add_(0, ways, exact),
            squares=exact.new_zeros(len(names)).index_add_(0, ways, exact.square().sum(dim=1)),
            counts=ways.bincount(minlength=len(names)),
        )

    @property
    def prototypes(self) -> Tensor:
        """(C, D) float32 means."""
        return (self.sums / self.counts[:, None]).float()

    def add(self, other: "Support") -> "Support":
        """The images and classes of both."""
        names = sorted({*self.class_names, *other.class_names})

        def spread(values: Tensor, owner: Support) -> Tensor:
            rows = torch.tensor([names.index(name) for name in owner.class_names])
            return values.new_zeros(len(names), *values.shape[1:]).index_add_(0, rows, values)

        return Support(
            class_names=tuple(names),
            sums=spread(self.sums, self) + spread(other.sums, other),
            squares=spread(self.squares, self) + spread(other.squares, other),
            counts=spread(self.counts, self) + spread(other.counts, other),
        )

    def remove_class(self, name: str) -> "Support":
        """The other classes.

        Raises:
            RequestError: 404 no such class; 422 fewer than two would be left.
        """
        if name not in self.class_names:
            raise RequestError("the task has no class of that name", 404)
        if len(self.class_names) <= 2:
            raise RequestError("a task keeps two classes at least; delete the task instead", 422)
        kept = [index for index, other in enumerate(self.class_names) if other != name]
        return Support(
            class_names=tuple(self.class_names[index] for index in kept),
            sums=self.sums[kept],
            squares=self.squares[kept],
            counts=self.counts[kept],
        )

    @cached_property
    def threshold(self) -> float | None:
        """The distance beyond which a query is none of these; None if no class has two images that differ.

        Two distances are measured on the support set, each the root of a mean square, and the threshold is their
        geometric mean, as many times the one as the other is of it.
        *Inside*: of each image to the prototype of its class made without it, over the classes of two images or more.
        *Outside*: of each image to the nearest prototype of another class (that which is nearest to the class on the
        whole), as if its own class were none of these; each class counts once.

        Both follow from sums. Of n images f with mean μ, the mean of the others is (nμ − f)/(n − 1), from which f is
        n/(n − 1)·|f − μ| away, and Σ|f − μ|² = Σ|f|² − n|μ|². To another prototype p, Σ|f − p|² = Σ|f − μ|² + n|μ − p|².
        """
        counts = self.counts.double()
        means = self.sums / counts[:, None]
        scatter = (self.squares - counts * means.square().sum(dim=1)).clamp(min=0)
        several = self.counts >= 2
        if len(counts) < 2 or not several.any():
            return None
        left_out = scatter[several] * (counts[several] / (counts[several] - 1)).square()
        inside = (left_out.sum() / counts[several].sum()).sqrt()
        apart = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
        outside = (scatter / counts + apart.min(dim=1).values.square()).mean().sqrt()
        return float((inside * outside).sqrt()) or None

    def classify(self, queries: Tensor, *, temperature: float = 1.0) -> list[Prediction]:
        """What each of (M, D) query features is taken for.

        The probability is the softmax of minus the distance times `temperature`; 1 is that of meta-training.
        """
        distances = -prototype_logits(queries.float(), self.prototypes)
        probabilities = (-temperature * distances).softmax(dim=1)
        threshold = self.threshold
        order = distances.argsort(dim=1, stable=True)
        columns = zip(order.tolist(), distances.gather(1, order).tolist(), probabilities.gather(1, order).tolist(), strict=True)
        return [
            Prediction(
                ranked=tuple(self.class_names[index] for index in indices),
                probabilities=tuple(chances),
                distances=tuple(away),
                rejected=None if threshold is None else away[0] > threshold,
            )
            for indices, away, chances in columns
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A few-shot task that is kept; a change makes another one, of the next version.

    Attributes:
        task_id: as `lr_ray.serving.store` draws it.
        owner: whose it is.
        version: 1, 2, …
        model: digest of the model that made the features; no other can use them.
        support: the classes.
    """

    task_id: str
    owner: str
    version: int
    model: str
    support: Support

    def with_support(self, support: Support) -> "Task":
        """The next version."""
        return replace(self, version=self.version + 1, support=support)

    def to_bytes(self, *, nonce: str) -> bytes:
        """A safetensors file: the sums, and in its metadata the rest as JSON.

        Args:
            nonce: makes this write differ from any other.
        """
        facts = {name: getattr(self, name) for name in ("task_id", "owner", "version", "model")}
        about = json.dumps(facts | {"class_names": self.support.class_names, "nonce": nonce}, ensure_ascii=True)
        tensors = {name: getattr(self.support, name).contiguous() for name in ("sums", "squares", "counts")}
        return bytes(save_tensors(tensors, metadata={"task": about}))

    @classmethod
    def from_bytes(cls, content: bytes) -> "Task":
        """Of what `to_bytes` made.

        Raises:
            StorageError: damaged.
        """
        try:
            header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            about = json.loads(header["__metadata__"]["task"])
            support = Support(class_names=tuple(about["class_names"]), **load_tensors(content))
            return cls(**{name: about[name] for name in ("task_id", "owner", "version", "model")}, support=support)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise StorageError(f"a stored task is damaged ({type(error).__name__}: {error}); delete it") from error
