"""Compares the ends of two runs bit for bit, for programs that kill one of them."""

import pathlib
from typing import Any

import jax

from varedit_jax.config import RunConfig, from_dict
from varedit_jax.training import checkpoint
from varedit_jax.training.metrics import read_metrics
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.state import make_init
from varedit_jax.weights import run_directory


def newest(workdir: pathlib.Path) -> int:
    """Returns the step of the newest checkpoint; 0 if there is none."""
    return next(reversed(run_directory.checkpoint_steps(workdir)), 0)


def read(workdir: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """Returns state and data iterator position of the newest checkpoint, on this process's first device, whatever mesh
    and number of processes saved it. Raises UserError if they cannot be read."""
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


def differences(ours: pathlib.Path, theirs: pathlib.Path) -> list[str]:
    """Returns the names of what differs between the ends of two runs; empty if they are equal."""
    (our_state, our_place), (their_state, their_place) = read(ours), read(theirs)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(their_state)]
    pairs = zip(jax.tree.leaves(our_state), jax.tree.leaves(their_state), strict=True)
    differ = [path for path, pair in zip(paths, pairs, strict=True) if pair[0].tobytes() != pair[1].tobytes()]
    if our_place != their_place:
        differ.append("the position in the data")
    if metrics(ours) != metrics(theirs):
        differ.append("the metrics")
    return differ
