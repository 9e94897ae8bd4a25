"""Compares the final states of two runs bit for bit, for programs that kill one of them."""

import pathlib
from typing import Any

import jax

from varedit_jax.config import RunConfig, from_dict
from varedit_jax.errors import UserError
from varedit_jax.training import checkpoint
from varedit_jax.training.metrics import read_metrics
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.state import make_init
from varedit_jax.weights import run_directory


def newest(workdir: pathlib.Path) -> int:
    """Returns the step of the newest checkpoint; 0 if there is none."""
    return next(reversed(run_directory.checkpoint_steps(workdir)), 0)


def read(workdir: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """Returns state and data iterator position of the newest checkpoint, on this process's first device.

    Any mesh and number of processes may have saved it. Raises UserError if it cannot be read.
    """
    config = from_dict(RunConfig, run_directory.read_config(workdir))
    init = make_init(config, make_optimizer(config.optimizer, config.steps))
    step = newest(workdir)
    state = checkpoint.restore_state(workdir, jax.eval_shape(init), step)
    return jax.device_get(state), checkpoint.data_place(workdir, step)


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the logged metrics of a run, except those that depend on the clock and the machine."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "memory/"))}
        for line in read_metrics(workdir)
    ]


def check_equal(killed: pathlib.Path, whole: pathlib.Path) -> None:
    """Raises UserError, naming the differences, unless two runs have equal final states, data positions and metrics."""
    (state, position), (other_state, other_position) = read(killed), read(whole)
    pairs = zip(jax.tree.leaves_with_path(state), jax.tree.leaves(other_state), strict=True)
    differ = [jax.tree_util.keystr(path) for (path, leaf), other in pairs if leaf.tobytes() != other.tobytes()]
    differ += ["the position in the data"] * (position != other_position)
    differ += ["the metrics"] * (metrics(killed) != metrics(whole))
    if differ:
        raise UserError(f"NOT EQUAL: the run that was killed ended otherwise: {', '.join(differ)} differ")
