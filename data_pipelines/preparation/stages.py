"""Stages on Apache Beam: each runs tasks that write files, after the previous stage has finished.

Runners move tasks, never records, which go from file to file. So memory does not grow with the data set under any
runner (Beam's local one groups in memory), and a resumed job runs the remaining tasks only. Every worker must see
inputs and output under the same path.
"""

import pathlib
import shlex
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from data_pipelines.preparation import beam
from varedit_jax.errors import UserError
from varedit_jax.progress import Progress
from varedit_jax.storage import disk
from varedit_jax.storage.files import write_text

_LOCAL = ("DirectRunner", "FnApiRunner")


class StageTask(Protocol):
    """Picklable unit of work."""

    def is_done(self) -> bool:
        """Returns True if its output exists."""


T = TypeVar("T", bound=StageTask)


class StageRunner:
    """Runs stages on one of Beam's runners."""

    def __init__(self, runner: str, workers: int, options: Sequence[str], directory: pathlib.Path) -> None:
        """`runner` and `options` are Beam's; `workers` are processes of the local runner; errors go to `directory`.

        Raises UserError if there is no such runner.
        """
        self._name, self._workers, self._options, self._directory = runner, workers, list(options), directory
        self._runner(1)

    def run(
        self, name: str, work: Callable[[T], object], tasks: Sequence[T], note: Callable[[], str] = lambda: ""
    ) -> None:
        """Runs the tasks that are not done yet; `note` adds the progress of running ones to the progress bar.

        Raises UserError if one of them did.
        """
        todo = [task for task in tasks if not task.is_done()]
        if not todo:
            return
        for path in self._directory.glob("*.error"):
            path.unlink()
        bar = Progress(desc=name, total=len(tasks), initial=len(tasks) - len(todo), unit="task", leave=False)
        with bar, _Watch(bar, todo, note):
            runner, options = self._runner(len(todo))
            pipeline = beam.Pipeline(runner, beam.PipelineOptions(options))
            tasks_P = pipeline | beam.Create(todo) | beam.Reshuffle()
            _ = tasks_P | name >> beam.ParDo(_Do(work, self._directory))
            try:
                pipeline.run().wait_until_finish()
            except RuntimeError as error:  # the local runner converts Ctrl-C in a task
                if "KeyboardInterrupt" in str(error):
                    raise KeyboardInterrupt from error
                raise
        for path in sorted(self._directory.glob("*.error")):
            raise UserError(path.read_text(encoding="utf-8"))

    def _runner(self, tasks: int) -> tuple[beam.PipelineRunner, list[str]]:
        """Returns a runner for a number of tasks, and its options.

        DirectRunner would first try to download another runner, so the local one is chosen explicitly. Its processes
        take seconds to start: there are no more than tasks, and a single task runs in this process.
        """
        if self._name not in _LOCAL:
            try:
                return beam.create_runner(self._name), self._options
            except (ValueError, ImportError, AttributeError) as error:
                raise UserError(
                    f"Apache Beam has no runner {self._name!r} here; DirectRunner works everywhere"
                ) from error
        workers = min(self._workers, tasks)
        if workers == 1:
            return beam.FnApiRunner(), self._options
        command = f"{shlex.quote(sys.executable)} -m data_pipelines.preparation.worker"
        environment = beam.SubprocessSDKEnvironment.from_command_string(command)
        return beam.FnApiRunner(environment), [f"--direct_num_workers={workers}", *self._options]


class _Do(beam.DoFn):
    """Runs tasks. A UserError becomes a file, since runners wrap exceptions beyond recognition."""

    def __init__(self, work: Callable[[Any], object], directory: pathlib.Path) -> None:
        self._work, self._directory = work, directory

    def process(self, task: Any) -> None:
        if task.is_done() or any(self._directory.glob("*.error")):
            return
        try:
            with disk.explained("data set", self._directory):
                self._work(task)
        except UserError as error:
            write_text(self._directory / f"{uuid.uuid4().hex}.error", str(error))


class _Watch:
    """Updates a progress bar as tasks are done, in whatever process."""

    def __init__(self, bar: Progress, tasks: Sequence[StageTask], note: Callable[[], str]) -> None:
        self._bar, self._left, self._note = bar, list(tasks), note
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.5):
            self._count()
        self._count()

    def _count(self) -> None:
        left = [task for task in self._left if not task.is_done()]
        self._bar.set_postfix_str(self._note(), refresh=False)
        self._bar.update(len(self._left) - len(left))
        self._left = left
