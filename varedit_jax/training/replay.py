"""The inputs of single steps on disk, and the replay of one step on them alone.

`workdir`/replay/step_N/ holds

    inputs_process_0-of-1.npz   the batch of each process as it came from the pipeline
    step.json                   {"step": N, "reason": "..."}
    state/                      the state before the step, if it was requested
"""

import json
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varedit_jax.errors import UserError
from varedit_jax.parallel.processes import say
from varedit_jax.storage.disk import explained, read_explained
from varedit_jax.storage.files import make_directory, replacing, write_json
from varedit_jax.storage.paths import PathLike, child_names, resolve
from varedit_jax.training import checkpoint
from varedit_jax.training.state import TrainState
from varedit_jax.weights import run_directory

REPLAY = "replay"
MOST = 10  # steps per run that are dumped without a request


class Inputs:
    """Keeps the last two batches: a step turns out to be bad only after the next one has been dispatched."""

    def __init__(self, workdir: PathLike) -> None:
        """Dumps go to `workdir`/replay, which the first one creates."""
        self._directory = resolve(workdir) / REPLAY
        self._dumped = len(child_names(self._directory, "step_*"))  # by earlier processes too
        self._batches: dict[int, dict[str, np.ndarray]] = {}

    def keep(self, step: int, batch: dict[str, np.ndarray]) -> None:
        """Keeps the batch of a step as it came from the pipeline."""
        self._batches = {number: kept for number, kept in self._batches.items() if number >= step - 1}
        self._batches[step] = batch

    def dump(self, step: int, reason: str, state: TrainState | None = None) -> None:
        """Writes this process's part of a kept batch, and of the state before the step, if given.

        Steps without `state` are dumped up to 10 times per run. Raises UserError if the disk is full.
        """
        if state is None and self._dumped >= MOST:
            return
        self._dumped += 1
        directory = self._directory / f"step_{step}"
        make_directory(directory)
        process = f"{jax.process_index()}-of-{jax.process_count()}"
        with explained("inputs of a step", directory):
            with replacing(directory / f"inputs_process_{process}.npz") as file:
                np.savez(file, allow_pickle=False, **self._batches[step])
            if jax.process_index() == 0:
                write_json(directory / "step.json", {"step": step, "reason": reason}, indent=None)
        if state is not None:
            checkpoint.save_tree(directory / "state", state)


def read_inputs(directory: PathLike, ids_field: str = "") -> tuple[int, dict[str, np.ndarray], np.ndarray | None]:
    """Returns the number of the step dumped in `directory`, this process's batch without `ids_field`, and that field.

    Raises UserError if it is no such directory, or was written by another number of processes.
    """
    root = resolve(directory)
    try:
        with read_explained(str(root)):
            step = int(json.loads((root / "step.json").read_text())["step"])
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory} holds no inputs of a step; give a directory as RUN/{REPLAY}/step_12") from error
    files = child_names(root, "inputs_process_*.npz")
    own = f"inputs_process_{jax.process_index()}-of-{jax.process_count()}.npz"
    if own not in files:
        raise UserError(
            f"{directory} holds {', '.join(files) or 'no inputs'}, but {own} is needed; replay it with as many "
            f"processes as it was written by"
        )
    try:
        with read_explained(str(root / own)), (root / own).open("rb") as file, np.load(file) as arrays:
            # NumPy does not know bfloat16, the type of precomputed features.
            batch = {name: x.view(jnp.bfloat16) if x.dtype == np.dtype("V2") else x for name, x in arrays.items()}
    except UserError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{root / own} cannot be read: {error}") from error
    return step, batch, batch.pop(ids_field, None)


def replay(
    directory: PathLike,
    *,
    key: jax.Array,
    abstract_state: TrainState,
    step_fn: Callable[[int], Any],
    put: Callable[[dict[str, np.ndarray]], Any],
    ids_field: str = "",
    say: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Repeats one step of a run on its dumped inputs; nothing is written.

    With a dumped state, the metrics equal those of the run bit for bit on the same devices. Without one, the step
    starts from the newest checkpoint at or before it, and `say` tells which.

    Args:
      directory: `workdir`/replay/step_N of a run.
      key, abstract_state, step_fn, put, ids_field: as in the `Job` of the run.
      say: shows a line to the user.

    Returns:
      The metrics of the step, on the host.

    Raises:
      UserError: no such directory, or no checkpoint to start from.
    """
    step, batch, ids = read_inputs(directory, ids_field)
    root = resolve(directory)
    if (root / "state").is_dir():
        state = checkpoint.read_tree(root / "state", abstract_state)
        say(f"replaying step {step} from the state before it")
    else:
        run = root.parent.parent
        earlier = [number for number in run_directory.checkpoint_steps(run) if number <= step]
        if not earlier:
            raise UserError(
                f"{directory} holds no state, and {run} has no checkpoint of step {step} or before; make the run dump "
                f"both, with --dump_step={step}"
            )
        state = checkpoint.restore_state(run, abstract_state, earlier[-1])
        say(f"replaying step {step} from the checkpoint of step {earlier[-1]}")
    if ids is not None:
        say(f"its examples are {', '.join(map(str, ids.tolist()))}")
    number = jax.device_put(jnp.asarray(step, jnp.int32), state.step.sharding)
    key = jax.device_put(key, state.step.sharding)
    _, metrics = step_fn(step)(state, put(batch), jax.random.fold_in(key, number))
    return jax.device_get(dict(metrics))
