"""The training batches of one worker, drawn beside it by an actor that reads the images as they are needed."""

from collections import deque
from collections.abc import Generator
from functools import cached_property, partial
from itertools import islice

import torch

from lr_ray.fewshot.distill import TrainingBatch
from lr_ray.fewshot.stream import BatchMaker, ClassBuffer, ClassSchedule, episode_numbers, pack, unpack
from lr_ray.runtime.relations import relation_targets
from lr_ray.runtime.session import this_node, user_error
from lr_ray.runtime.training_job import TrainingJob, read_shelves

_STEPS_AHEAD = 8
_MOST_AHEAD_BYTES = 256 << 20


class BatchLoader:
    """Draws and packs the batches of a step: every image of the schedule's window decoded once, augmented at each use."""

    def __init__(self, job: TrainingJob, rank: int, world_size: int) -> None:
        torch.set_num_threads(1)
        self._job, self._rank, self._world_size = job, rank, world_size

    @cached_property
    def _maker(self) -> BatchMaker:
        """Made at the first draw: of what fails there the trainer hears more than that an actor died."""
        job = self._job
        buffer = ClassBuffer(ClassSchedule(job.refs, job.training, seed=job.config.seed), partial(read_shelves, job))
        return BatchMaker(
            job.refs,
            buffer,
            job.training,
            seed=job.config.seed,
            grid_size=job.grid_size,
            relations=relation_targets(job.config, job.files, job.feature_uris, job.grid_size) if job.feature_uris else None,
        )

    def draw(self, step: int) -> bytes:
        """The packed batches of a step."""
        numbers = episode_numbers(step, self._job.training, rank=self._rank, world_size=self._world_size)
        return pack([self._maker.draw(number) for number in numbers])


def stream_batches(job: TrainingJob, *, start: int, rank: int, world_size: int) -> Generator[list[TrainingBatch], None, None]:
    """The batches of each step from `start` on, in order; they are being made from the call on.

    A loader that is lost is started again and draws the same. Not by Ray Data: its executor would run in this process, and
    while enough batches wait it turns idly with the interpreter's lock, which made a step 2.5 times as long.

    Raises:
        StorageError: images that cannot be read.
        EpisodeError: the classes in memory do not do for an episode.
        ClusterError: the loader was lost oftener than `ray.max_failures`.
    """
    import ray

    most = job.config.ray.max_failures
    options = {"num_cpus": 0, "max_restarts": most, "max_task_retries": most}  # the trainers may hold all processors
    loader = ray.remote(BatchLoader).options(**options, scheduling_strategy=this_node()).remote(job, rank, world_size)
    steps = iter(range(start, job.training.num_steps))
    waiting = deque(loader.draw.remote(step) for step in islice(steps, _steps_ahead(job, world_size)))

    def in_order() -> Generator[list[TrainingBatch], None, None]:
        try:
            while waiting:
                packed = ray.get(waiting.popleft())
                waiting.extend(loader.draw.remote(step) for step in islice(steps, 1))
                yield unpack(packed)
        except ray.exceptions.RayError as error:
            raise user_error(error) from error

    return in_order()


def _steps_ahead(job: TrainingJob, world_size: int) -> int:
    """Whose batches may wait."""
    shape = job.training.episode
    images = max(shape.n_way * (shape.n_shot + shape.n_query), job.training.relations.batch_size)
    a_step = -(-job.training.episodes_per_step // world_size) * images * 3 * job.image_px**2 * 4
    return max(1, min(_STEPS_AHEAD, _MOST_AHEAD_BYTES // a_step))
