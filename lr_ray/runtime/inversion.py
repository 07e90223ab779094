"""`lr-ray invert`: a pool of Ray actors, each inverting one adapter, or some of its classes, at a time into its own file."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from lr_ray.config import ExperimentConfig
from lr_ray.errors import InversionError, LrRayError, StorageError, gpu_is_full
from lr_ray.inversion.invert import invert
from lr_ray.inversion.priors import BatchNormPrior, load_prior
from lr_ray.report.progress import Reporter
from lr_ray.runtime.board import StepWriter, read_board, start_board
from lr_ray.runtime.inversion_plan import (
    PARTIAL,
    InspectedLibrary,
    InversionItem,
    InversionPlan,
    committed,
    inspect_library,
    plan_inversion,
)
from lr_ray.runtime.session import actor_pool, check_shared, fields_of, ray_session, user_error, worker_device
from lr_ray.storage.adapters import read_adapter
from lr_ray.storage.filesystem import delete, exists, read_if_there, write_bytes
from lr_ray.storage.synthetic import read_rows, write_synthetic
from lr_ray.vit.backbone import Backbone, load_backbone
from lr_ray.vit.lora import check_adapter

if TYPE_CHECKING:
    from ray.data import Dataset


_CALLED = ("", "metric_inversion: ")
"""Before the errors of each part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InversionReport:
    """What came of it.

    Attributes:
        uris: of all images, in the adapters' order.
        failures: a line for every adapter, or part of one, that has no images.
    """

    uris: tuple[str, ...]
    failures: tuple[str, ...]


class InversionActor:
    """Holds the backbone and the priors; inverts one item at a time and commits its images.

    Args:
        parts: the config of each part that items may belong to.
    """

    def __init__(self, parts: Sequence[ExperimentConfig], board: Any) -> None:
        from ray.util.metrics import Counter, Gauge

        device = worker_device(parts[0].ray)
        self._parts, self._board = parts, board
        self._backbone: Backbone = load_backbone(parts[0].backbone, device=device)
        self._priors = [load_prior_of(config, device) for config in parts]
        self._images = Counter("lr_ray_images", description="Synthetic images committed.")
        self._failures = Counter("lr_ray_failures", description="Pieces of work that failed.")
        self._cross_entropy = Gauge("lr_ray_cross_entropy", description="Of an inversion's last step.", tag_keys=("item",))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One row of `InversionItem` fields → adapter_id, uri, num_images, loss_ce, error; one row."""
        item = InversionItem(**fields_of(batch))
        try:
            rows = self.commit(item)
            num_images, loss_ce, error = rows.num_rows, pa.compute.mean(rows["loss_ce"]).as_py(), ""
        except LrRayError as failure:
            num_images, loss_ce, error = 0, 0.0, f"{_CALLED[item.part]}{failure}"
            self._failures.inc()
        found = {"adapter_id": item.adapter_id, "uri": item.uri, "num_images": num_images, "loss_ce": loss_ce, "error": error}
        return {name: [value] for name, value in found.items()}

    def commit(self, item: InversionItem) -> pa.Table:
        """The rows of the item's file, which is made if it is not there.

        Raises:
            LrRayError: it cannot be made.
        """
        if not exists(item.uri):
            name = item.uri.rsplit("/", 1)[-1].removesuffix(".parquet")
            checkpoint = PartialFile(item.uri + PARTIAL, every_s=self._parts[0].ray.checkpoint_every_s)
            self._begin(name, checkpoint)
            writer = StepWriter(self._board, name, self._cross_entropy)
            try:
                self._invert(item, checkpoint, writer)
            except RuntimeError as error:
                if not gpu_is_full(error):
                    raise
                reason = str(error).partition("\n")[0]
                remedy = "lower inversion.batch_size, or raise ray.num_gpus_per_actor where several actors share a GPU"
                raise InversionError(f"adapter {item.adapter_id}: out of memory ({reason}); {remedy}") from error
            checkpoint.delete()
            writer.finish()
            self._images.inc(len(item.classes) * self._parts[item.part].inversion.images_per_class)
        return read_rows(item.uri)

    def _begin(self, name: str, checkpoint: "PartialFile") -> None:
        """Raise an `InversionError` if that cost too many workers: Ray Data would try it again for ever."""
        import ray

        attempt, most = ray.get(self._board.begin.remote(name, checkpoint.mark)), self._parts[0].ray.max_failures + 1
        if attempt > most:
            raise InversionError(
                f"{name}: its worker was lost {most} times at the same point; if memory ran out, lower inversion.batch_size; "
                "if nodes are taken away sooner, lower ray.checkpoint_every_s or raise ray.max_failures"
            )

    def _invert(self, item: InversionItem, checkpoint: "PartialFile", on_step: StepWriter) -> None:
        adapter = read_adapter(item.adapter_folder)
        check_adapter(adapter, self._backbone)
        synthetic = invert(
            adapter.to(self._backbone.device),
            self._backbone,
            self._parts[item.part].inversion,
            classes=item.classes,
            prior=self._priors[item.part],
            generator=torch.Generator().manual_seed(item.seed),
            checkpoint=checkpoint,
            on_step=on_step,
        )
        write_synthetic(item.uri, synthetic, adapter.spec, seed=item.seed, identity=self._backbone.identity)


class ImageActor:
    """An `InversionActor` that gives the images themselves."""

    def __init__(self, config: ExperimentConfig, board: Any) -> None:
        self._actor = InversionActor((config,), board)

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        """One row of `InversionItem` fields → the rows of its file."""
        return self._actor.commit(InversionItem(**fields_of(batch)))


class PartialFile:
    """The state of an inversion under way, in a file beside its images-to-be."""

    def __init__(self, uri: str, *, every_s: float) -> None:
        self._uri, self._every_s = uri, every_s
        self._saved_at = time.monotonic()
        self._content = read_if_there(uri)

    @property
    def mark(self) -> str:
        """Differs from that of another state."""
        return hashlib.sha256(self._content or b"").hexdigest()

    def load(self) -> dict[str, Tensor] | None:
        """Raises: StorageError, if it is damaged."""
        if self._content is None:
            return None
        try:
            state: dict[str, Tensor] = load_safetensors(self._content)
        except SafetensorError as error:
            raise StorageError(f"{self._uri}: damaged ({error}); delete it and run again") from error
        return state

    def due(self) -> bool:
        return time.monotonic() - self._saved_at >= self._every_s

    def save(self, state: dict[str, Tensor]) -> None:
        self._content = save_safetensors(state)
        write_bytes(self._uri, self._content)
        self._saved_at = time.monotonic()

    def delete(self) -> None:
        """Once the images are committed."""
        if self._content is not None:
            delete(self._uri)


def invert_library(config: ExperimentConfig, reporter: Reporter, *, strict: bool = False) -> InversionReport:
    """Invert the adapters whose images are not there yet, then those for the metric, if they are others.

    Args:
        strict: stop at the first adapter that fails, before any work starts if that is seen by then; else the others
            are inverted, and it is in the report.

    Raises:
        AdapterError: no adapters, or with `strict` one that cannot be inverted.
        InversionError: with `strict`, an inversion failed.
        StorageError: the folder holds images made with another config or from other adapters, or is not shared by all nodes.
    """
    parts = (config,) if config.metric_inversion is None else (config, config.for_metric)
    library = inspect_library(config, strict=strict)
    for why in library.rejected.values():
        reporter.say(f"skipped: {why}")
    plans = [_plan(part, library, index, reporter) for index, part in enumerate(parts)]
    failures, made = list(library.rejected.values()), list[str]()
    if todo := [item for plan in plans for item in plan.todo]:
        with ray_session(config.ray) as dashboard:
            if dashboard:
                reporter.say(f"dashboard: http://{dashboard}")
            made, failed = _invert_all(todo, parts, reporter, strict=strict)
            failures += failed
    there = {uri for part in parts for uri in committed(part)}
    check_shared(made, there, output=config.output_root)
    uris = tuple(item.uri for plan in plans for item in plan.items if item.uri in there)
    return InversionReport(uris=uris, failures=tuple(failures))


def _plan(config: ExperimentConfig, library: InspectedLibrary, part: int, reporter: Reporter) -> InversionPlan:
    """What there is to do, said."""
    try:
        load_prior_of(config, "cpu")
        plan = plan_inversion(config, library, part=part)
    except LrRayError as error:
        raise type(error)(f"{_CALLED[part]}{error}") from error
    if plan.left_out:
        without = "without a head" if config.inversion.classes is None else "without a head, or without the classes asked for"
        reporter.say(f"left out: {plan.left_out} adapters {without}")
    done = len(plan.items) - len(plan.todo)
    reporter.say(f"invert: {_counted(plan.items)} into {config.synthetic_root}, {done} done already")
    return plan


def _counted(items: Sequence[InversionItem]) -> str:
    num_adapters = len({item.adapter_id for item in items})
    return f"{num_adapters} adapters" + (f" in {len(items)} parts" if len(items) > num_adapters else "")


def _invert_all(
    todo: Sequence[InversionItem], parts: Sequence[ExperimentConfig], reporter: Reporter, *, strict: bool
) -> tuple[list[str], list[str]]:
    """Show the rows as they come; returns the URIs of what was committed, and what failed."""
    import ray

    board, start, num_images = start_board(), time.monotonic(), 0
    made: list[str] = []
    failures: list[str] = []
    with reporter.track("invert", len(todo), partial(read_board, board)) as advance:
        try:
            for row in actor_pool(todo, parts[0].ray, InversionActor, parts, board).iter_rows():
                if row["error"]:
                    if strict:
                        raise InversionError(f"{row['error']}; what was finished is kept")
                    failures.append(row["error"])
                    advance(f"failed: {row['error']}")
                    continue
                made.append(row["uri"])
                num_images += row["num_images"]
                per_s = num_images / (time.monotonic() - start)
                advance(
                    f"{row['adapter_id']}: {row['num_images']} images, cross-entropy {row['loss_ce']:.3f}; {per_s:.1f} images/s"
                )
        except ray.exceptions.RayError as error:
            raise user_error(error) from error
    return made, failures


def invert_dataset(config: ExperimentConfig) -> "Dataset":
    """Every row of the synthetic set, as a Ray Dataset that gives rows while the inversion goes on.

    Those for the metric, if they are others, are the set of `config.for_metric`.

    Adapters whose images are there already come first. Each file is committed before its rows are given, so that what a
    consumer saw is kept. Needs a Ray that runs (`ray_session`) for as long as the dataset is read.

    Raises:
        AdapterError: an adapter that cannot be inverted.
        StorageError: the folder holds images made with another config or from other adapters.
        ray.exceptions.RayTaskError: an inversion failed, by the InversionError that it holds; when its rows are read.
    """
    plan = plan_inversion(config)
    todo = set(plan.todo)
    there = [item for item in plan.items if item not in todo]
    return actor_pool([*there, *plan.todo], config.ray, ImageActor, config, start_board())


def load_prior_of(config: ExperimentConfig, device: str) -> BatchNormPrior | None:
    """What the config's inversion looks at its images with, if it does."""
    name = config.inversion.prior_in_use
    return None if name is None else load_prior(name, device=device)
