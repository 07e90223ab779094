"""Where a worker of Ray Train begins. Torch is imported in the functions: the loader does it while the worker does."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

from lr_ray.errors import ClusterError, LrRayError, gpu_is_full
from lr_ray.runtime.session import this_node

if TYPE_CHECKING:
    from lr_ray.fewshot.stream import BatchMaker
    from lr_ray.runtime.training_job import TrainingJob


def train_loop_per_worker(arguments: dict[str, Any]) -> None:
    """Ray Train's entry; an error that trying again cannot mend goes to the driver, which ends the run.

    Args:
        arguments: `job`, a reference to the TrainingJob, which Ray's controller would import torch to unpickle; `steps`, the
            queue of what is told; `max_failures`, of the loader.
    """
    import ray
    import ray.train

    context, job, most = ray.train.get_context(), arguments["job"], arguments["max_failures"]
    rank, world_size = context.get_world_rank(), context.get_world_size()
    options = {"num_cpus": 0, "max_restarts": most, "max_task_retries": most}  # the trainers may hold all processors
    loader = ray.remote(BatchLoader).options(**options, scheduling_strategy=this_node()).remote(job, rank, world_size)
    from lr_ray.runtime.train_loop import train

    try:
        train(ray.get(job), loader, arguments["steps"], rank=rank, world_size=world_size)
    except Exception as error:
        if (told := _unmendable(error)) is None:
            raise
        arguments["steps"].put(told)
        if world_size > 1:  # the others wait for this one until Ray Train hears that it failed
            raise


def _unmendable(error: Exception) -> LrRayError | None:
    """What the user is told of an error that would come again; None for others."""
    if isinstance(error, LrRayError):
        return error
    if not gpu_is_full(error):
        return None
    what = str(error).partition("\n")[0]
    return ClusterError(f"a GPU ran out of memory: {what}; set training.recompute=true, or lower training.episode")


class BatchLoader:
    """Draws and packs the batches of a step, in an actor beside its trainer; lost and started again, it draws the same."""

    def __init__(self, job: "TrainingJob", rank: int, world_size: int) -> None:
        import torch

        torch.set_num_threads(1)
        self._job, self._rank, self._world_size = job, rank, world_size

    @cached_property
    def _maker(self) -> "BatchMaker":
        """Made at the first draw: of what fails there the trainer hears more than that an actor died."""
        from lr_ray.runtime.stream import batch_maker

        return batch_maker(self._job)

    def draw(self, step: int) -> bytes:
        """The packed batches of a step."""
        from lr_ray.runtime.stream import draw_packed

        return draw_packed(self._job, self._maker, step, rank=self._rank, world_size=self._world_size)
