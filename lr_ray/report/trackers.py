"""A training in Weights & Biases or MLflow, for those who keep all their runs there.

The driver speaks to them, not Ray's `setup_wandb` and `setup_mlflow`: these belong into a worker, whose loss would begin
another run. Here a training is one run, also when it goes on after a kill.
"""

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from lr_ray.config import TrackingConfig
from lr_ray.errors import ConfigError
from lr_ray.report.progress import Reporter

_OPENING = threading.Lock()
"""Trainings that begin side by side would both create an MLflow experiment that is not there yet."""
_INSTALL = "pip install 'lr-ray[tracking]', where the driver runs"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """What a tracker is told of a training.

    Attributes:
        name: of the experiment.
        kind: of the training; a run is called so.
        digest: of its inputs: the same training is the same run.
        config: resolved.
    """

    name: str
    kind: str
    digest: str
    config: Mapping[str, Any]

    @property
    def run_id(self) -> str:
        return f"{self.kind}-{self.digest[:12]}"


class Tracker(ABC):
    """Points that go to a service a validation at a time; what it does not take now is offered again at the next one.

    A service that fails is said once and never ends a training.
    """

    def __init__(self, title: str, reporter: Reporter) -> None:
        self._title, self._reporter = title, reporter
        self._points: list[Mapping[str, float]] = []
        self._complained = False

    def add(self, metrics: Mapping[str, float]) -> None:
        """A point on each curve, at `metrics["step"]`."""
        self._points.append(dict(metrics))

    def commit(self) -> None:
        """Send what was added."""
        try:
            self._send(self._points)
        except Exception as error:  # of the service, its process or its network: nothing there may end a training
            if not self._complained:
                self._reporter.say(f"{self._title}: {' '.join(str(error).split())}; the training goes on and tries again")
            self._complained = True
        else:
            self._points = []

    def end(self, *, failed: bool) -> None:
        """Send the rest and say there how it ended."""
        self.commit()
        try:
            self._end(failed=failed)
        except Exception as error:  # as above
            self._reporter.say(f"{self._title}: {' '.join(str(error).split())}")
        if self._points:
            self._reporter.say(f"{self._title}: {len(self._points)} steps were not taken; they are in TensorBoard's curves")

    @abstractmethod
    def _send(self, points: Sequence[Mapping[str, float]]) -> None: ...
    @abstractmethod
    def _end(self, *, failed: bool) -> None: ...


class WandbTracker(Tracker):
    """`tracking.wandb`: a run in a project of Weights & Biases."""

    def __init__(self, project: str, run: TrackedRun, reporter: Reporter) -> None:
        super().__init__(f"tracking.wandb {project}", reporter)
        try:
            import wandb
        except ImportError:
            raise ConfigError(f"{self._title}: wandb is not installed; {_INSTALL}, or leave it out") from None
        entity, _, name = project.rpartition("/")
        try:
            self._run: Any = wandb.init(
                entity=entity or None,
                project=name,
                id=run.run_id,
                name=f"{run.name}/{run.kind}",
                config=dict(run.config),
                resume="allow",
                settings=wandb.Settings(console="off", silent=True, reinit="create_new"),  # beside another training's
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"{self._title}: {error}; set WANDB_API_KEY, or WANDB_MODE=offline to send it later, or leave it out"
            ) from error
        if self._run.url:
            reporter.say(f"{self._title}: {self._run.url}")

    def _send(self, points: Sequence[Mapping[str, float]]) -> None:
        for point in points:
            self._run.log({key: value for key, value in point.items() if key != "step"}, step=int(point["step"]))

    def _end(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MlflowTracker(Tracker):
    """`tracking.mlflow`: a run on an MLflow server, in the experiment of the config's name."""

    def __init__(self, uri: str, run: TrackedRun, reporter: Reporter) -> None:
        super().__init__(f"tracking.mlflow {uri}", reporter)
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # a commit that fails is tried again at the next one
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError:
            raise ConfigError(f"{self._title}: mlflow is not installed; {_INSTALL}, or leave it out") from None
        try:
            self._client: Any = MlflowClient(uri)
            self._run_id = self._find(run) or self._create(run)
        except MlflowException as error:
            raise ConfigError(
                f"{self._title}: {error}; give the URI of a tracking server that answers, or leave it out"
            ) from error
        reporter.say(f"{self._title}: experiment {run.name}, run {self._run_id}")

    def _find(self, run: TrackedRun) -> str | None:
        """The run of an earlier part of this training, opened again."""
        experiment = self._client.get_experiment_by_name(run.name)
        if experiment is None:
            return None
        found = self._client.search_runs([experiment.experiment_id], f"tags.`lr_ray.run` = '{run.run_id}'", max_results=1)
        if not found:
            return None
        run_id: str = found[0].info.run_id
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _create(self, run: TrackedRun) -> str:
        from mlflow.entities import Param

        experiment = self._client.get_experiment_by_name(run.name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(run.name)
        tags = {"lr_ray.run": run.run_id, "lr_ray.inputs": run.digest}
        run_id: str = self._client.create_run(experiment_id, run_name=run.kind, tags=tags).info.run_id
        params = [Param(key, value) for key, value in _flat(run.config)]
        for start in range(0, len(params), 100):  # the most that a server takes at once
            self._client.log_batch(run_id, params=params[start : start + 100])
        return run_id

    def _send(self, points: Sequence[Mapping[str, float]]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [
            Metric(key, float(value), now, int(point["step"]))
            for point in points
            for key, value in point.items()
            if key != "step"
        ]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self._run_id, metrics=metrics[start : start + 1000])

    def _end(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


@contextmanager
def open_trackers(config: TrackingConfig, run: TrackedRun, reporter: Reporter) -> Iterator[list[Tracker]]:
    """Those that the config asks for, told at the end whether the context was left by an error.

    Raises:
        ConfigError: not installed, not reachable, or without a key.
    """
    with ExitStack() as stack:
        opened: list[Tracker] = []
        with _OPENING:
            if config.wandb is not None:
                opened.append(_open(stack, WandbTracker(config.wandb, run, reporter)))
            if config.mlflow is not None:
                opened.append(_open(stack, MlflowTracker(config.mlflow, run, reporter)))
        yield opened


def _open(stack: ExitStack, tracker: Tracker) -> Tracker:
    stack.push(lambda kind, _error, _traceback: tracker.end(failed=kind is not None))
    return tracker


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`{"a": {"b": 1}}` → `("a.b", "1")`."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
