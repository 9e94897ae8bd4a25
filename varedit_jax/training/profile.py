"""A profile of a few steps on demand, for TensorBoard, XProf or Perfetto."""

import contextlib
import pathlib
import re
import tempfile
from typing import Any

import jax

from varedit_jax.errors import UserError
from varedit_jax.storage.files import make_directory, upload
from varedit_jax.storage.paths import PathLike, is_remote, resolve

PROFILE = "profile"


class Profiler:
    """Traces the steps [first, last) of a run into `workdir`/profile, in process 0.

    The names of operations contain those of their `jax.named_scope`.
    """

    def __init__(self, workdir: PathLike, first: int, last: int) -> None:
        """Does nothing before `step`. An empty range is never traced."""
        self._directory = resolve(workdir) / PROFILE
        self._local: tempfile.TemporaryDirectory[str] | None = None
        self._first, self._last = first, last
        self._waits = jax.process_index() == 0 and first < last
        self._tracing = False
        self._annotation = contextlib.ExitStack()  # of the current step

    def step(self, step: int, state: Any = None) -> None:
        """Begins or ends the trace where due; call it before step `step` is dispatched.

        Args:
          step: counted from 0. A run that resumes inside the range is traced from there.
          state: result of the previous step, which the end of the trace waits for.

        Raises:
          UserError: the directory cannot be written.
        """
        if self._waits and self._first <= step < self._last:
            self._waits = False
            make_directory(self._directory)
            if is_remote(self._directory):  # the profiler writes to local disks only
                self._local = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._local.name if self._local else self._directory)
            self._tracing = True
        if self._tracing and step >= self._last:
            self.close(state)
        if self._tracing:
            self._annotation.close()
            self._annotation.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def close(self, state: Any = None) -> None:
        """Ends a trace that has begun, once `state` is ready, and writes it."""
        if not self._tracing:
            return
        self._tracing = False
        jax.block_until_ready(state)
        self._annotation.close()
        jax.profiler.stop_trace()
        if self._local:
            upload(pathlib.Path(self._local.name), self._directory, keep=True)
            self._local.cleanup()


def parse_steps(text: str) -> tuple[int, int]:
    """Returns the steps [first, last) of a text such as "10:13"; (0, 0), no steps, for "".

    Raises UserError for another form or an empty range.
    """
    if not text:
        return 0, 0
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(
            f"--profile_steps is {text!r}; give the first step and the one to end before, as in --profile_steps=10:13"
        )
    return int(found[1]), int(found[2])
