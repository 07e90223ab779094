"""The curves of a training for TensorBoard: `tensorboard --logdir FOLDER/tensorboard`."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lr_ray.storage.filesystem import join, write_bytes

FOLDER_NAME = "tensorboard"


class Curves:
    """An event file of one training, or of the part of it that this process sees.

    A run that goes on adds a file of its own; TensorBoard drops the steps of earlier files that it does again.
    """

    def __init__(self, folder: str) -> None:
        """Args: folder, of the training, or its URI; its `tensorboard` is written to."""
        self._folder = join(folder, FOLDER_NAME)
        self._local = tempfile.TemporaryDirectory()
        self._writer: Any = None

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()
        self._local.cleanup()

    def add(self, metrics: Mapping[str, float]) -> None:
        """A point on each curve, at `metrics["step"]`."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        step, now = int(metrics["step"]), time.time()
        if self._writer is None:
            self._writer = EventsWriter(str(Path(self._local.name, "events")))
            self._writer.write_event(Event(step=step, wall_time=now, session_log=SessionLog(status=SessionLog.START)))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items() if name != "step"]
        self._writer.write_event(Event(step=step, wall_time=now, summary=Summary(value=values)))

    def commit(self) -> None:
        """Put what was added where TensorBoard finds it.

        Raises:
            StorageError: not writable.
        """
        if self._writer is None:
            return
        self._writer.flush()
        for path in Path(self._local.name).iterdir():
            write_bytes(join(self._folder, path.name), path.read_bytes())
