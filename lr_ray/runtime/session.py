"""Starting or joining Ray, and handing work to it."""

import logging
import os
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from lr_ray.errors import ClusterError, LrRayError, StorageError, gpu_is_full

if TYPE_CHECKING:  # torch takes seconds to import, and some of Ray's processes have no need of it
    from ray.data import Dataset

    from lr_ray.config import RayConfig
    from lr_ray.report.progress import Reporter

_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # bind to 127.0.0.1; read when ray is imported
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # one line at the start, that it is set; else Ray Data's actors warn of themselves
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # a worker may report no oftener; by default every 2 s
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process that asks the cloud whether it takes this machine away
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

_FEW_CPUS = 4
_ON_FEW_CPUS = {
    "RAY_idle_worker_killing_time_threshold_ms": "180000",  # kept for the next step of a job; each holds 0.7 GB
    "RAY_worker_maximum_startup_concurrency": "8",  # else Ray warns of the processes of two trainings
}

_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in a submitted job, whose workers have the environment that it was submitted with."""

_MOST_BLOCKS = 4000

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def ray_session(config: "RayConfig") -> Iterator[str]:
    """Ray, started here or joined, for as long as the context lasts; one that runs already is used and left alone.

    Yields the dashboard's host and port, or "" if it has none or was not started here.
    Workers started here inherit the environment; to those of a cluster that is joined goes `storage_environment`.

    Raises:
        ClusterError: it cannot be started or joined.
    """
    os.environ.setdefault("RAY_task_oom_retries", str(config.max_failures))  # Ray goes on for ever by default
    if config.address == "local":
        with local_ray(num_cpus=config.num_cpus, dashboard=config.dashboard) as dashboard:
            yield dashboard
        return
    variables = {} if _SUBMITTED in os.environ else storage_environment()
    options = {"runtime_env": {"env_vars": variables}} if variables else {}
    with _session(config.address, options) as dashboard:
        yield dashboard


@contextmanager
def local_ray(*, num_cpus: int | None = None, dashboard: bool = True, libraries: bool = True) -> Iterator[str]:
    """Ray on this machine, else as `ray_session`.

    Args:
        num_cpus: processors that it may use; default all.
        dashboard: without it, Ray is there seconds sooner.
        libraries: import Ray Data and Ray Train, which takes seconds too.
    """
    few = (num_cpus or os.cpu_count() or 1) <= _FEW_CPUS
    for name, value in (_ENVIRONMENT | (_ON_FEW_CPUS if few else {})).items():
        os.environ.setdefault(name, value)
    options = {"num_cpus": num_cpus, "_node_ip_address": "127.0.0.1", "include_dashboard": dashboard}
    with _session("local", options, libraries=libraries) as url:
        yield url


@contextmanager
def _session(address: str, options: dict[str, Any], *, libraries: bool = True) -> Iterator[str]:
    import ray

    if ray.is_initialized():
        yield ""
        return
    try:
        context = ray.init(address, logging_level="error", log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"Ray at {address!r}: {' '.join(str(error).split())}; the address (ray.address, or RAY_ADDRESS) is 'local', 'auto' "
            "or host:port of a running cluster"
        ) from error
    if libraries:
        import ray.data
        import ray.train

        for noisy in ("ray.data", "ray.train"):  # they set their levels when imported
            logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        yield context.dashboard_url or ""
    finally:
        ray.shutdown()


_OF_THIS_POD = ("AWS_CONTAINER_", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_")
"""How variables begin that a cloud gives to each of its containers: other nodes have their own."""


def storage_environment() -> dict[str, str]:
    """The AWS variables of this process: endpoint, region, profile, credentials. Never to be printed or saved."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_") and not name.startswith(_OF_THIS_POD)}


def this_node() -> Any:
    """The scheduling strategy of an actor that lives and dies with the node of whoever starts it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def worker_device(config: "RayConfig") -> str:
    """Hold this worker to its processors; returns the device that it computes on."""
    import torch

    torch.set_num_threads(config.cpus_per_actor)
    return "cuda" if config.num_gpus_per_actor else "cpu"


def without_gpus(config: "RayConfig") -> "RayConfig":
    """For work on processors alone, beside which a GPU would lie idle."""
    return config.model_copy(update={"num_gpus_per_actor": 0.0})


def _room(config: "RayConfig") -> int:
    """How many workers Ray holds now.

    Raises:
        ClusterError: this machine cannot hold a single one, for which Ray would wait for ever.
    """
    import ray

    there, room = ray.cluster_resources(), []
    for name, key, need in (("CPU", "cpus", config.cpus_per_actor), ("GPU", "num_gpus", config.num_gpus_per_actor)):
        found = there.get(name, 0)
        if config.address == "local" and need > found:
            raise ClusterError(f"ray.{key}_per_actor {need:g}: this machine has {found:g} {name} for Ray; lower it")
        if need:
            room.append(int(found / need))
    return min(room)


def check_shared(uris: Collection[str], there: Container[str], *, output: str) -> None:
    """Raise if files that workers wrote are not there.

    Args:
        uris: what they wrote.
        there: what is found from here.
        output: what the files are below.

    Raises:
        StorageError: the workers' nodes do not share it.
    """
    if lost := sorted(uri for uri in uris if uri not in there):
        raise StorageError(
            f"{len(lost)} files, such as {lost[0]}, were written on nodes that do not share {output}; give an --output "
            "that all nodes see, such as s3://bucket/prefix"
        )


def map_tasks(
    function: Callable[[Item], Result], items: Sequence[Item], config: "RayConfig"
) -> Iterator[tuple[Item, Result | LrRayError]]:
    """Run a function on each item in parallel Ray tasks; yields as they finish.

    An item whose function raises an `LrRayError` yields that error, and the others go on; a task whose worker is lost
    is run again up to `max_failures` times, then yields a `ClusterError`.
    """
    import ray

    _room(config)
    remote = ray.remote(num_cpus=config.cpus_per_actor, num_gpus=config.num_gpus_per_actor, max_retries=config.max_failures)(
        function
    )
    waiting = {remote.remote(item): item for item in items}
    while waiting:
        (finished, *_), _ = ray.wait(list(waiting), num_returns=1)
        item = waiting.pop(finished)
        try:
            yield item, ray.get(finished)
        except ray.exceptions.RayError as error:
            yield item, user_error(error)


def actor_pool(items: Sequence[Any], config: "RayConfig", actor: type, *arguments: Any) -> "Dataset":
    """What actors make of the items, as they finish; Ray Data runs an item again whose actor or node was lost.

    Args:
        items: dataclasses.
        actor: a class, called with a batch of one row of an item's fields.
        arguments: of its constructor.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    room = _room(config)
    DataContext.get_current().enable_progress_bars = False
    largest = max(config.min_actors, min(len(items), config.max_actors or room))
    rows = ray.data.from_items([asdict(item) for item in items], override_num_blocks=min(len(items), _MOST_BLOCKS))
    found: Dataset = rows.map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        num_cpus=config.cpus_per_actor,
        num_gpus=config.num_gpus_per_actor,
        compute=ActorPoolStrategy(min_size=config.min_actors, max_size=largest, initial_size=largest),
    )
    return found


def fields_of(batch: dict[str, Any]) -> dict[str, Any]:
    """The fields of the item in a batch of one row."""
    return {name: values.tolist()[0] for name, values in batch.items()}


class Commit(Protocol):
    """A piece of work that ends in one file."""

    @property
    def uri(self) -> str:
        """Of the file."""


Piece = TypeVar("Piece", bound=Commit)


def work_through(
    title: str,
    function: Callable[[Piece], Result],
    items: Sequence[Piece],
    config: "RayConfig",
    reporter: "Reporter",
    take: Callable[[Piece, Result], str],
) -> None:
    """Run a function that commits an item's file by `map_tasks`, and show how far it is; what fails does not keep the others.

    Args:
        take: is handed each result as it comes; returns a few words on it.

    Raises:
        LrRayError: the first of those that items failed with, when all others are done.
        StorageError: a file was written where this machine does not see it.
    """
    failures: list[LrRayError] = []
    made: list[str] = []
    if not items:
        return
    with ray_session(config), reporter.track(title, len(items)) as advance:
        for item, result in map_tasks(function, items, config):
            if isinstance(result, LrRayError):
                failures.append(result)
                advance(f"failed: {result}")
            else:
                made.append(item.uri)
                advance(take(item, result))
    if failures:
        raise failures[0]
    if config.address != "local":
        from lr_ray.storage.filesystem import exists, read_many

        there = {uri for uri, found in zip(made, read_many(exists, made), strict=True) if found}
        check_shared(made, there, output=made[0].rpartition("/")[0])


def user_error(error: BaseException) -> LrRayError:
    """The `LrRayError` that a Ray error stands for; a fault in our own code is raised again, with its traceback."""
    import ray

    cause: BaseException | None = error
    wrapper = ray.exceptions.RayTaskError  # also where it is an `LrRayError`: Ray gives it the class of its cause
    while cause is not None and (isinstance(cause, wrapper) or not isinstance(cause, LrRayError)):
        cause = getattr(cause, "cause", None) or cause.__cause__
    if cause is not None:
        return cause
    origin = getattr(error, "cause", None) or error
    if gpu_is_full(origin):
        what = str(origin).partition("\n")[0]
        return ClusterError(
            f"a GPU ran out of memory: {what}; lower the batch_size of that section, or raise ray.num_gpus_per_actor "
            "where several processes share a GPU"
        )
    lost = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError)
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        what = str(error).partition("\n")[0]
        return ClusterError(
            f"a machine ran out of memory: {what}; run fewer processes on it at once (raise ray.cpus_per_actor), or give it "
            "more memory"
        )
    if isinstance(error, lost):
        return ClusterError(f"Ray lost a process for good: {error}; what was finished is kept: run the same command again")
    raise error
