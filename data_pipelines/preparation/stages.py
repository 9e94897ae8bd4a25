"""Stages: each runs tasks that write files, after the previous stage has finished.

On this machine the tasks run in processes that stay for all stages; on a cluster, each stage is a pipeline of Apache
Beam. Runners move tasks, never records, which go from file to file. So memory does not grow with the data set under any
runner (Beam's local one groups in memory), and a resumed job runs the remaining tasks only. Every worker must see
inputs and staging directory under the same path.
"""

import concurrent.futures
import concurrent.futures.process
import contextlib
import os
import pathlib
import shutil
import threading
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

from data_pipelines.preparation import messages
from data_pipelines.preparation.pool import Pool
from varedit_jax.errors import UserError
from varedit_jax.progress import Progress
from varedit_jax.starting import needs
from varedit_jax.storage import disk
from varedit_jax.storage.files import make_directory

LOCAL = "DirectRunner"
LOG = "runner.log"
_POLL = 0.5  # seconds


class StageTask(Protocol):
    """Picklable unit of work."""

    def is_done(self) -> bool:
        """Returns True if its output exists."""


T = TypeVar("T", bound=StageTask)
Left = Mapping[int, StageTask]


class StageRunner:
    """Context manager that runs stages, on this machine or on one of Beam's runners."""

    def __init__(
        self, runner: str, workers: int, options: Sequence[str], timeout: float, directory: pathlib.Path
    ) -> None:
        """Takes the choices of the user.

        Args:
          runner: Beam's name of a runner. DirectRunner without options is this machine.
          workers: processes on this machine.
          options: of Beam.
          timeout: seconds without a sign of life from any of Beam's workers, after which a stage is given up.
          directory: for messages of workers, and what the runner prints.
        """
        self._here = runner == LOCAL and not options
        self._runner, self._workers, self._options, self._timeout = runner, workers, list(options), timeout
        self._log = directory / LOG
        # Workers of an attempt that was given up may live on in a cluster; nobody reads their messages.
        self._messages = directory / f"messages-{uuid.uuid4().hex}"
        self._pool = Pool(workers if self._here else 1)

    def __enter__(self) -> Self:
        make_directory(self._messages)
        self._pool.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.__exit__(*error)
        shutil.rmtree(self._messages, ignore_errors=True)

    def run(
        self,
        name: str,
        work: Callable[[T], object],
        tasks: Sequence[T],
        note: Callable[[], str] = lambda: "",
        after: Callable[[Sequence[T]], object] = lambda left: None,
    ) -> None:
        """Runs the tasks that are not done yet.

        `note` adds the progress of running ones to the progress bar; `after` is called with what is left, at first
        and whenever some are done.

        Raises UserError if one of them did, or if the runner fails.
        """
        left = {index: task for index, task in enumerate(tasks) if not task.is_done()}
        after([*left.values()])
        if not left:
            return
        if not self._here:
            done = self._on_beam(name, work, left)
        elif min(self._workers, len(left)) == 1:
            done = self._in_this_process(work, left)
        else:
            done = self._in_processes(work, left)
        with contextlib.closing(done), _Progress(name, len(tasks), left, note):
            for index in done:
                del left[index]
                after([*left.values()])

    def _in_this_process(self, work: Callable[[Any], object], left: Left) -> Generator[int, None, None]:
        for index, task in list(left.items()):
            do(work, task, self._log.parent)
            yield index

    def _in_processes(self, work: Callable[[Any], object], left: Left) -> Generator[int, None, None]:
        futures = {self._pool.submit(do, work, task, self._log.parent): index for index, task in list(left.items())}
        for future in concurrent.futures.as_completed(futures):
            try:
                future.result()
            except concurrent.futures.process.BrokenProcessPool as error:
                raise UserError(
                    "a worker process was killed, maybe because memory is short; run the same command again, with "
                    "fewer --workers"
                ) from error
            yield futures[future]

    def _on_beam(self, name: str, work: Callable[[Any], object], left: Left) -> Generator[int, None, None]:
        """Yields what is done as the files show, since a runner tells nothing before its pipeline ends."""

        def finished() -> list[int]:
            return [index for index, task in left.items() if task.is_done()]

        messages.clear(self._messages)
        life = messages.SignsOfLife(self._messages)
        running = self._pool.submit(
            _drive, self._runner, self._options, name, work, list(left.values()), self._messages, self._log
        )
        while not concurrent.futures.wait([running], _POLL).done:
            yield from (done := finished())
            if not done and life.seconds_ago() > self._timeout:
                raise UserError(
                    f"no worker of --runner={self._runner} has shown a sign of life for {self._timeout:.0f} seconds, "
                    f"and {len(left)} tasks of the stage {name!r} are left; {self._log} has what the runner printed; "
                    f"run the same command again when workers run, with more --runner_timeout if they start slowly"
                )
        messages.raise_failure(self._messages)
        try:
            running.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UserError(
                f"the process that hands tasks to --runner={self._runner} was killed; run the same command again"
            ) from error
        yield from finished()
        if left:
            raise UserError(
                f"--runner={self._runner} ended without {len(left)} tasks of the stage {name!r}; see that its workers "
                f"have {self._log.parent} under the same path, and run the same command again"
            )


def do(work: Callable[[Any], object], task: StageTask, directory: pathlib.Path) -> None:
    """Does a task that is not done yet. Raises UserError for a failure of the machine to write in `directory`."""
    if task.is_done():
        return
    try:
        with disk.explained("data set", directory):
            work(task)
    except Exception:
        if not task.is_done():  # else another worker has been faster, and what it read may be deleted
            raise


def _drive(runner: str, *arguments: Any) -> None:
    """Runs a pipeline, in a process that prints to a file. Raises UserError if Apache Beam is missing, or fails."""
    log = arguments[-1]
    with log.open("a") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        from data_pipelines.preparation import beam
    except ModuleNotFoundError as error:
        raise UserError(needs(f"--runner={runner}", str(error.name), "prepare")) from error
    beam.run(runner, *arguments)


class _Progress:
    """Context manager with a progress bar, which follows how many tasks are left."""

    def __init__(self, name: str, total: int, left: Mapping[int, object], note: Callable[[], str]) -> None:
        self._bar = Progress(desc=name, total=total, initial=total - len(left), unit="task", leave=False)
        self._total, self._left, self._note = total, left, note
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self._bar.close()

    def _look(self) -> None:
        while not self._end.wait(_POLL):
            self._show()
        self._show()

    def _show(self) -> None:
        self._bar.set_postfix_str(self._note(), refresh=False)
        self._bar.update(self._total - len(self._left) - self._bar.n)
