"""The ends of two runs, compared bit for bit, for programs that kill one of them."""

import os
import pathlib
import platform
from typing import Any

import jax

from varedit_jax.config import RunConfig, from_dict
from varedit_jax.training import checkpoint
from varedit_jax.training.metrics import read_metrics
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.state import make_init
from varedit_jax.weights import run_directory


def newest(workdir: pathlib.Path) -> int:
    """Step of the newest checkpoint; 0 if there is none."""
    return next(reversed(run_directory.checkpoint_steps(workdir)), 0)


def read(workdir: pathlib.Path) -> tuple[Any, dict[str, Any]]:
    """State and place in the data of the newest checkpoint, on this process's first device, whatever mesh and number
    of processes saved it. Raises UserError if they cannot be read."""
    config = from_dict(RunConfig, run_directory.read_config(workdir))
    init = make_init(config, make_optimizer(config.optimizer, config.steps))
    step = newest(workdir)
    state = checkpoint.restore_state(workdir, jax.eval_shape(init), step)
    return jax.device_get(state), checkpoint.data_place(workdir, step)


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What a run wrote down, but for what depends on the clock and the machine."""
    return [
        {name: value for name, value in line.items() if not name.startswith(("time/", "memory/"))}
        for line in read_metrics(workdir)
    ]


def differences(ours: pathlib.Path, theirs: pathlib.Path) -> list[str]:
    """How the end of one run differs from that of another; nothing if it does not."""
    (our_state, our_place), (their_state, their_place) = read(ours), read(theirs)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(their_state)]
    pairs = zip(jax.tree.leaves(our_state), jax.tree.leaves(their_state), strict=True)
    differ = [path for path, pair in zip(paths, pairs, strict=True) if pair[0].tobytes() != pair[1].tobytes()]
    if our_place != their_place:
        differ.append("the place in the data")
    if metrics(ours) != metrics(theirs):
        differ.append("the metrics")
    return differ


def machine() -> str:
    """Processors, as the system names them."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {next(iter(names), platform.machine())}"
