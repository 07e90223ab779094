"""The training batches of one worker, drawn beside it by an actor of Ray Data that reads the images as they are needed."""

from collections.abc import Generator
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from lr_ray.fewshot.distill import TrainingBatch
from lr_ray.fewshot.stream import BatchMaker, ClassBuffer, ClassSchedule, episode_numbers, pack, unpack
from lr_ray.runtime.relations import relation_targets
from lr_ray.runtime.session import this_node, user_error
from lr_ray.runtime.training_job import TrainingJob, read_shelves

_STEPS_AT_A_TIME = 1000
"""Of one Ray Dataset, which holds a reference for each."""
_STEPS_AHEAD = 8
_LEAST_AHEAD_BYTES = 64 << 20


class BatchLoader:
    """Draws and packs the batches of a step: every image of the schedule's window decoded once, augmented at each use."""

    def __init__(self, job: TrainingJob, rank: int, world_size: int) -> None:
        torch.set_num_threads(1)
        self._job, self._rank, self._world_size = job, rank, world_size
        buffer = ClassBuffer(ClassSchedule(job.refs, job.training, seed=job.config.seed), partial(read_shelves, job))
        self._maker = BatchMaker(
            job.refs,
            buffer,
            job.training,
            seed=job.config.seed,
            grid_size=job.grid_size,
            relations=relation_targets(job.config, job.files, job.feature_uris, job.grid_size) if job.feature_uris else None,
        )

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Column `step` → column `batches`, packed."""
        packed = []
        for step in rows["step"].to_pylist():
            numbers = episode_numbers(step, self._job.training, rank=self._rank, world_size=self._world_size)
            packed.append(pack([self._maker.draw(number) for number in numbers]))
        return pa.table({"batches": pa.array(packed, pa.large_binary())})


def stream_batches(job: TrainingJob, *, start: int, rank: int, world_size: int) -> Generator[list[TrainingBatch], None, None]:
    """The batches of each step from `start` on, in order; the next ones are made while a step is under way.

    Raises:
        StorageError: images that cannot be read.
        EpisodeError: the classes in memory do not do for an episode.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=_bytes_ahead(job, world_size))
    for first in range(start, job.training.num_steps, _STEPS_AT_A_TIME):
        steps = [{"step": step} for step in range(first, min(first + _STEPS_AT_A_TIME, job.training.num_steps))]
        batches: Any = ray.data.from_items(steps, override_num_blocks=len(steps)).map_batches(
            BatchLoader,
            fn_constructor_args=(job, rank, world_size),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=0,  # the trainers may hold all that there are
            compute=ActorPoolStrategy(size=1),
            scheduling_strategy=this_node(),
        )
        try:
            for table in batches.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
                yield unpack(table["batches"][0].as_py())
        except ray.exceptions.RayError as error:
            raise user_error(error) from error


def _bytes_ahead(job: TrainingJob, world_size: int) -> int:
    """Of batches that may wait for their step."""
    shape = job.training.episode
    images = max(shape.n_way * (shape.n_shot + shape.n_query), job.training.relations.batch_size)
    a_step = -(-job.training.episodes_per_step // world_size) * images * 3 * job.image_px**2 * 4
    return max(_LEAST_AHEAD_BYTES, _STEPS_AHEAD * a_step)
