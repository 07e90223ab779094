"""The training batches of one worker: how its loader draws them, and how it gets them in order."""

from collections import deque
from collections.abc import Generator
from functools import partial
from itertools import islice
from typing import Any

from lr_ray.fewshot.distill import TrainingBatch
from lr_ray.fewshot.stream import BatchMaker, ClassBuffer, ClassSchedule, episode_numbers, pack, unpack
from lr_ray.runtime.relations import relation_targets
from lr_ray.runtime.session import user_error
from lr_ray.runtime.training_job import TrainingJob, read_shelves

_STEPS_AHEAD = 8
_MOST_AHEAD_BYTES = 256 << 20


def batch_maker(job: TrainingJob) -> BatchMaker:
    """Draws the job's batches: every image of the schedule's window is decoded once, augmented at each use."""
    buffer = ClassBuffer(ClassSchedule(job.refs, job.training, seed=job.config.seed), partial(read_shelves, job))
    return BatchMaker(
        job.refs,
        buffer,
        job.training,
        seed=job.config.seed,
        grid_size=job.grid_size,
        relations=relation_targets(job.config, job.files, job.feature_uris, job.grid_size) if job.feature_uris else None,
    )


def draw_packed(job: TrainingJob, maker: BatchMaker, step: int, *, rank: int, world_size: int) -> bytes:
    """The batches of a step."""
    return pack([maker.draw(number) for number in episode_numbers(step, job.training, rank=rank, world_size=world_size)])


def stream_batches(job: TrainingJob, loader: Any, *, start: int, world_size: int) -> Generator[list[TrainingBatch], None, None]:
    """The batches of each step from `start` on, in order; they are being made from the call on.

    Not by Ray Data: its executor would run in this process, and while enough batches wait it turns idly with the interpreter's
    lock, which made a step 2.5 times as long.

    Args:
        loader: handle of a `BatchLoader` of this worker.

    Raises:
        StorageError: images that cannot be read.
        EpisodeError: the classes in memory do not do for an episode.
        ClusterError: the loader was lost oftener than `ray.max_failures`.
    """
    import ray

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
