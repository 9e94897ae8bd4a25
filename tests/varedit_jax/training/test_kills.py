"""Runs in processes of their own: killed, on several devices, and by several processes."""

import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.varedit_jax.training.runs import assert_same, without_times
from varedit_jax.config import Cadence, MeshConfig, OptimizerConfig
from varedit_jax.parallel.mesh import batch_part, make_mesh, put_batch
from varedit_jax.training.checkpoint import Checkpoints, data_place, restore_state
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.stages import SingleStage
from varedit_jax.training.state import TrainState
from varedit_jax.training.stop import poll
from varedit_jax.training.trainer import Job, Launch, Trainer
from varedit_jax.weights.run_directory import checkpoint_steps

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

STEPS = 12
WIDTH = 296  # large enough that a save takes a while; divides over eight devices
BATCH = 8
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=3, weight_decay=0.1), STEPS)

ORDER = grain.MapDataset.range(40).seed(7).shuffle().repeat()  # of the examples


def example(index: int) -> dict[str, np.ndarray]:
    """Example number `index`."""
    rng = np.random.default_rng(index)
    values = {name: rng.normal(size=WIDTH).astype(np.float32) for name in ("x", "y")}
    return values | {"example_ids": np.int64(index)}


class Run:
    """A run whose state is split over all devices, of all processes; each process has its part of a batch."""

    def __init__(self, workdir: pathlib.Path, **cadence: Any) -> None:
        """Nothing is computed."""
        self.workdir = workdir
        self.mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
        self.cadence = Cadence(
            evaluate_first=True,
            **{"log_every": 1, "eval_every": 0, "sample_every": 0, "save_every": 2, "keep_checkpoints": 2, **cadence},
        )
        abstract = jax.tree.map(self._place, jax.eval_shape(self.init))
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        everywhere = jax.NamedSharding(self.mesh, jax.P())
        compiled = jax.jit(self.step, donate_argnums=0, out_shardings=(self.shardings, everywhere))
        self.arguments: dict[str, Any] = {
            "abstract_state": abstract,
            "init_state": jax.jit(self.init, out_shardings=self.shardings),
            "stages": SingleStage(compiled),
        }

    def __call__(self, **arguments: Any) -> TrainState:
        """Starts or resumes it."""
        part, parts = batch_part(self.mesh)
        rows = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
        # Batches first, parts then: the place in the data is the same in all processes.
        batches = ORDER.map(lambda index: example(int(index))).batch(BATCH)
        mine = batches.map(lambda batch: {name: value[rows] for name, value in batch.items()})
        with jax.set_mesh(self.mesh):
            job = Job(
                steps=STEPS,
                key=jax.random.key(1),
                batches=iter(mine.to_iter_dataset()),
                put=functools.partial(put_batch, self.mesh),
                record={"name": "toy"},
                cadence=self.cadence,
                ids_field="example_ids",
                **(self.arguments | arguments),
            )
            return Trainer(job, Launch(workdir=self.workdir)).run()

    def _place(self, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = jax.P("fsdp") if leaf.ndim == 2 else jax.P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(self.mesh, spec))

    @staticmethod
    def init() -> TrainState:
        """A linear model."""
        params = {"kernel": jax.random.normal(jax.random.key(3), (WIDTH, WIDTH))}
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=OPTIMIZER.init(params))

    @staticmethod
    def step(state: TrainState, batch: Any, key: jax.Array) -> Any:
        """One update. Step 2 says that it was skipped."""

        def loss_of(params: Any) -> jax.Array:
            noisy = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
            return jnp.mean((noisy @ params["kernel"] - batch["y"]) ** 2)

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "skipped": (state.step == 2).astype(jnp.float32)}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics


# This file as a program (see its end), which other tests' modules are in reach of.
PROGRAM = [sys.executable, "-m", "tests.varedit_jax.training.test_kills"]
ROOT = pathlib.Path(__file__).parents[3]


def run_here(directory: pathlib.Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program, to its end."""
    return subprocess.run(
        [*PROGRAM, str(directory), *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# Of each process: the phase it is killed in, the number of its call, and so many seconds into that. A save waits for
# the one before it, so that each of the last three finds a later checkpoint, however fast the machine.
KILLS = (
    ("restore", 0, 0.0),  # a new run: making the state of step 0
    ("step", 7, 0.0),
    ("restore", 0, 0.02),
    ("save", 2, 0.005),
    ("save", 0, 0.04),
)


def test_killed_again_and_again(tmp_path: pathlib.Path) -> None:
    """SIGKILL in restores, steps and saves: the newest checkpoint can be read, and the end is that of a whole run."""
    run, whole = Run(tmp_path / "killed"), Run(tmp_path / "whole")
    newest = 0
    for phase, call, delay in KILLS:
        done = run_here(tmp_path / "killed", "killed", phase, str(call), str(delay))
        assert done.returncode == -signal.SIGKILL, (phase, call, delay, done.stderr)
        steps = checkpoint_steps(tmp_path / "killed")
        assert not newest or steps[-1] >= newest
        if steps:
            newest = steps[-1]
            state = restore_state(tmp_path / "killed", run.arguments["abstract_state"], newest)
            assert int(state.step) == newest
    assert newest >= 6
    assert_same(run(), whole())
    assert without_times(run.workdir) == without_times(whole.workdir)
    assert len(without_times(run.workdir)) == STEPS
    assert data_place(run.workdir, STEPS) == data_place(whole.workdir, STEPS)


def be_killed(directory: pathlib.Path, phase: str, call: int, delay: float) -> None:
    """For `test_killed_again_and_again`: a run that dies without farewell."""
    calls = 0

    def kill_in(function: Callable) -> Callable:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call + 1:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return function(*arguments, **keywords)

        return wrapped

    run = Run(directory)
    if phase == "step":
        run.arguments["stages"] = SingleStage(kill_in(run.arguments["stages"].function))
    else:
        setattr(Checkpoints, phase, kill_in(getattr(Checkpoints, phase)))
    if phase == "restore":
        run.arguments["init_state"] = kill_in(run.arguments["init_state"])
    state = run()
    time.sleep(2)  # the kill may be due after the last save was begun
    raise AssertionError(f"it was not killed, and made {int(state.step)} steps")


def test_several_processes(tmp_path: pathlib.Path) -> None:
    """Both save when the first one's clock says so, and stop at one point when one of them gets a signal; then a single
    process with as many devices resumes, and its final state is that of a separate run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [*PROGRAM, str(tmp_path / "run"), "process", port]
    both = [subprocess.Popen([*command, str(i)], cwd=ROOT, stderr=subprocess.PIPE, text=True) for i in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [143, 143], said
    assert "stopped by SIGTERM at step 8 of 12, which is saved" in said[0]
    ids = [int(ORDER[i]) for i in range(2 * BATCH, 3 * BATCH)]
    assert "step 2 was skipped: loss " in said[0] and f"; examples {', '.join(map(str, ids))}; " in said[0]
    saved = checkpoint_steps(tmp_path / "run")
    assert saved[-1] == 8 and len(saved) > 2, said
    names = {path.name for path in (tmp_path / "run" / "checkpoints" / "8" / "data").glob("*.json")}
    assert names == {"process_0-of-2.json", "process_1-of-2.json"}
    parts = [np.load(tmp_path / "run/replay/step_2" / f"inputs_process_{i}-of-2.npz")["example_ids"] for i in range(2)]
    assert np.concatenate(parts).tolist() == ids
    done = run_here(tmp_path, "alone", XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.returncode == 0, done.stderr
    assert "resuming from the checkpoint of step 8" in done.stderr


def one_of_two_processes(directory: pathlib.Path, port: str, index: int) -> None:
    """For `test_several_processes`: gets a SIGTERM in an evaluation, if it is the second one."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)

    def evaluate(state: TrainState) -> dict[str, float]:
        if int(jax.device_get(state.step)) == 8:
            if index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(600):
                time.sleep(0.05)
                poll()
            raise AssertionError("nobody stopped")
        return {}

    # Clocks of processes are not the same: only that of the first one counts.
    minutes = 1e-9 if index == 0 else 1e9
    Run(directory, eval_every=4, save_every=5, save_minutes=minutes, keep_checkpoints=20)(evaluate=evaluate)


def alone(directory: pathlib.Path) -> None:
    """For `test_several_processes`: ends their run, and does it all alone."""
    assert_same(Run(directory / "run")(), Run(directory / "whole")())


if __name__ == "__main__":
    _directory, _what, *_rest = sys.argv[1:]
    if _what == "process":
        one_of_two_processes(pathlib.Path(_directory), _rest[0], int(_rest[1]))
    elif _what == "alone":
        alone(pathlib.Path(_directory))
    else:
        be_killed(pathlib.Path(_directory), _rest[0], int(_rest[1]), float(_rest[2]))
