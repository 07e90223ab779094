"""`lr-ray invert`: one Ray actor per adapter in flight, each committing its own Parquet file."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lr_ray.config import ExperimentConfig
from lr_ray.errors import AdapterError, InversionError, LrRayError
from lr_ray.inversion.invert import invert
from lr_ray.inversion.priors import BatchNormPrior, load_prior
from lr_ray.report.progress import Reporter
from lr_ray.runtime.session import ray_session, user_error, worker_device
from lr_ray.storage.adapters import list_adapters, read_adapter
from lr_ray.storage.filesystem import exists, join
from lr_ray.storage.manifest import claim_folder, digest_of
from lr_ray.storage.synthetic import synthetic_name, write_synthetic
from lr_ray.vit.backbone import Backbone, load_backbone
from lr_ray.vit.lora import check_adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class InversionItem:
    """One adapter to invert and where its images go."""

    adapter_folder: str
    adapter_id: str
    uri: str
    seed: int


class InversionActor:
    """Holds the backbone and the prior; inverts one adapter at a time and commits its images."""

    def __init__(self, config: ExperimentConfig) -> None:
        device = worker_device(config.ray)
        self._config = config
        self._backbone: Backbone = load_backbone(config.backbone, device=device)
        self._prior = _load_prior(config, device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One row of `InversionItem` fields → adapter_id, uri, num_images, loss_ce, error; one row."""
        item = InversionItem(**{name: values.tolist()[0] for name, values in batch.items()})
        try:
            num_images, loss_ce = self._invert(item)
            row: dict[str, Any] = {"num_images": [num_images], "loss_ce": [loss_ce], "error": [""]}
        except LrRayError as error:
            row = {"num_images": [0], "loss_ce": [0.0], "error": [str(error)]}
        return {"adapter_id": [item.adapter_id], "uri": [item.uri], **row}

    def _invert(self, item: InversionItem) -> tuple[int, float]:
        adapter = read_adapter(item.adapter_folder)
        check_adapter(adapter, self._backbone)
        generator = torch.Generator().manual_seed(item.seed)
        synthetic = invert(
            adapter.to(self._backbone.device),
            self._backbone,
            self._config.inversion,
            prior=self._prior,
            generator=generator,
        )
        write_synthetic(item.uri, synthetic, adapter.spec, seed=item.seed)
        return len(synthetic.labels), float(synthetic.loss_ce.mean())


def invert_library(config: ExperimentConfig, reporter: Reporter) -> list[str]:
    """Invert the adapters whose images are not there yet; returns the URIs of all images, in the adapters' order.

    Raises:
        AdapterError: no adapters.
        InversionError: some adapters failed; the images of the others are kept.
        StorageError: the folder holds images made with another config or from other adapters.
    """
    _load_prior(config, "cpu")
    items = plan_inversion(config)
    todo = [item for item in items if not exists(item.uri)]
    reporter.say(f"invert: {len(items)} adapters into {config.synthetic_root}, {len(items) - len(todo)} done already")
    failures = []
    if todo:
        with ray_session(config.ray), reporter.track("invert", len(todo)) as advance:
            for row in _run(todo, config):
                if row["error"]:
                    failures.append(row["error"])
                advance(row["error"] or f"{row['adapter_id']}: {row['num_images']} images, cross-entropy {row['loss_ce']:.3f}")
    if failures:
        raise InversionError(f"{len(failures)} of {len(items)} adapters failed, the others are kept: {failures[0]}")
    return [item.uri for item in items]


def _load_prior(config: ExperimentConfig, device: str) -> BatchNormPrior | None:
    if config.inversion.prior is None or not config.inversion.prior_weight:
        return None
    return load_prior(config.inversion.prior, device=device)


def plan_inversion(config: ExperimentConfig) -> list[InversionItem]:
    """The work items; an item's name derives from adapter, backbone, config and seed.

    Raises:
        StorageError: the folder holds images made with another config, backbone or seed.
    """
    backbone = load_backbone(config.backbone)
    shared = {
        "step": "invert",
        "seed": config.seed,
        "backbone": backbone.identity,
        "inversion": config.inversion.model_dump(mode="json"),
    }
    folders = list_adapters(config.adapters_root)
    claim_folder(config.synthetic_root, shared, config=config.resolved())
    items, seen = [], dict[str, str]()
    for folder in folders:
        spec = read_adapter(folder).spec
        if spec.adapter_id in seen:
            raise AdapterError(
                f"adapters {folder} and {seen[spec.adapter_id]} have the same id {spec.adapter_id!r}; rename or remove one"
            )
        seen[spec.adapter_id] = folder
        digest = digest_of({**shared, "adapter": spec.digest})
        items.append(
            InversionItem(
                adapter_folder=folder,
                adapter_id=spec.adapter_id,
                uri=join(config.synthetic_root, synthetic_name(spec.adapter_id, digest)),
                seed=int(digest[:12], 16),
            )
        )
    return items


def _run(todo: list[InversionItem], config: ExperimentConfig) -> Iterator[dict[str, Any]]:
    """Rows as they come, from a pool of actors; Ray Data runs an item again whose actor or node was lost."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    DataContext.get_current().enable_progress_bars = False
    cluster = ray.cluster_resources()
    fits = int(cluster.get("CPU", 1) // config.ray.cpus_per_actor)
    if config.ray.num_gpus_per_actor:
        fits = min(fits, int(cluster.get("GPU", 0) / config.ray.num_gpus_per_actor))
    largest = max(1, min(len(todo), config.ray.max_actors or fits))
    rows = ray.data.from_items([asdict(item) for item in todo], override_num_blocks=len(todo)).map_batches(
        InversionActor,
        fn_constructor_args=(config,),
        batch_size=1,
        num_cpus=config.ray.cpus_per_actor,
        num_gpus=config.ray.num_gpus_per_actor,
        compute=ActorPoolStrategy(min_size=1, max_size=largest, initial_size=min(largest, max(fits, 1))),
    )
    try:
        yield from rows.iter_rows()
    except ray.exceptions.RayError as error:
        raise user_error(error) from error
