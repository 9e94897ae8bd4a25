"""Stages: the step of each number, and the compilation of later ones in another thread."""

import pathlib
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.varedit_jax.parallel.test_processes import two_processes
from varedit_jax.config import MeshConfig
from varedit_jax.parallel import processes
from varedit_jax.parallel.mesh import batch_sharding, make_mesh, put_batch, replicated
from varedit_jax.training.stages import Stages
from varedit_jax.training.state import TrainState


def state() -> TrainState:
    return TrainState(step=jnp.zeros((), jnp.int32), params={"w": jnp.zeros(3)}, opt_state=())


def make_step(factor: float, threads: list[str]):
    """A step that adds `factor` times the sum of the batch and what is frozen, and notes which thread traced it."""

    def step(state, frozen, batch, key):
        threads.append(threading.current_thread().name)
        params = {"w": state.params["w"] + jnp.float32(factor) * jnp.sum(batch["x"]) + frozen["bias"]}
        metrics = {"loss": jnp.sum(params["w"]), "draw": jax.random.uniform(key)}
        return TrainState(step=state.step + 1, params=params, opt_state=()), metrics

    compiled = jax.jit(step, donate_argnums=0)
    return lambda batch: compiled


def test_every_stage_has_its_step() -> None:
    threads: list[list[str]] = [[], [], []]
    steps = [
        (end, make_step(factor, names)) for end, factor, names in zip((2, 3, 5), (1, 10, 100), threads, strict=True)
    ]
    batch, key = {"x": jnp.ones(2)}, jax.random.key(0)
    with Stages(steps, {"bias": jnp.float32(0.5)}) as stages:
        assert len({id(stages.step(number)) for number in range(5)}) == 3
        assert stages.step(0) is stages.step(1) and stages.step(3) is stages.step(4)
        now, values = state(), []
        for number in range(5):
            now, metrics = stages.step(number)(now, batch, key)
            values.append(float(now.params["w"][0]))
    np.testing.assert_allclose(values, np.cumsum([2.5, 2.5, 20.5, 200.5, 200.5]))
    assert int(now.step) == 5 and metrics["draw"] == jax.random.uniform(key)
    assert threads[0] == ["MainThread"]
    assert all(len(names) == 1 and names[0].startswith("compile") for names in threads[1:])


def test_what_the_run_needs_later_is_compiled_after_the_first_step() -> None:
    """Before the steps of later stages, in their thread, and once."""
    threads: list[str] = []
    done: list[str] = []
    batch, key = {"x": jnp.ones(2)}, jax.random.key(0)
    later = [lambda: done.append(threading.current_thread().name), lambda: threads.append("evaluation")]
    steps = [(1, make_step(1, [])), (9, make_step(10, threads))]
    with Stages(steps, {"bias": jnp.float32(0)}, later) as stages:
        assert not done
        now, _ = stages.step(0)(state(), batch, key)
        for number in (1, 2):
            now, _ = stages.step(number)(now, batch, key)
    assert len(done) == 1 and done[0].startswith("compile")
    assert threads[0] == "evaluation" and len(threads) == 2


def test_steps_for_other_shapes_of_batches_are_compiled_ahead() -> None:
    """Those that are named, for every stage; the first step alone is compiled by the run itself."""
    threads: list[str] = []

    def alike(batch):
        return [{"x": jax.ShapeDtypeStruct((size,), jnp.float32)} for size in (3, 4)]

    with Stages([(3, make_step(1, threads)), (9, make_step(10, threads))], {"bias": jnp.float32(0)}, (), alike) as run:
        now = state()
        for number, size in enumerate((2, 3, 4, 4, 2, 3)):
            now, _ = run.step(number)(now, {"x": jnp.ones(size)}, jax.random.key(0))
    assert float(now.params["w"][0]) == 2 + 3 + 4 + 10 * (4 + 2 + 3)
    assert threads[0] == "MainThread" and len(threads) == 6
    assert all(name.startswith("compile") for name in threads[1:])


def test_a_run_may_begin_in_a_later_stage() -> None:
    threads: list[list[str]] = [[], []]
    steps = [(2, make_step(1, threads[0])), (4, make_step(10, threads[1]))]
    with Stages(steps, {"bias": jnp.float32(0)}) as stages:
        now, _ = stages.step(3)(state(), {"x": jnp.ones(2)}, jax.random.key(0))
    assert float(now.params["w"][0]) == 20 and threads == [[], ["MainThread"]]


def test_a_failure_to_compile_comes_up_at_its_stage() -> None:
    def broken(state, frozen, batch, key):
        raise ZeroDivisionError

    with Stages([(1, make_step(1, [])), (2, lambda batch: jax.jit(broken))], {"bias": jnp.float32(0)}) as stages:
        now, _ = stages.step(0)(state(), {"x": jnp.ones(2)}, jax.random.key(0))
        with pytest.raises(ZeroDivisionError):
            stages.step(1)(now, {"x": jnp.ones(2)}, jax.random.key(0))


def test_a_batch_of_another_shape_has_a_step_of_its_own() -> None:
    met: list[tuple[int, ...]] = []

    def step_of(batch):
        met.append(batch["x"].shape)
        return make_step(len(batch["x"]), [])(batch)

    with Stages([(9, step_of)], {"bias": jnp.float32(0)}) as stages:
        now = state()
        for size in (2, 3, 2, 3):
            now, _ = stages.step(0)(now, {"x": jnp.ones(size)}, jax.random.key(0))
    assert met == [(2,), (3,)]
    assert float(now.params["w"][0]) == 2 * (2 * 2 + 3 * 3)


@pytest.mark.slow
@pytest.mark.subprocess
def test_a_step_compiled_in_the_background_waits_for_slow_processes(tmp_path: pathlib.Path) -> None:
    """No process runs a later stage's step before all have compiled it: a collective may not wait for long."""
    codes, said = two_processes("one_of_two", tmp_path, devices=1, program=__file__)
    assert codes == [0, 0], said
    assert [text.splitlines()[-1] for text in said] == 2 * ["after the slow one: 12.0"]


def one_of_two(directory: pathlib.Path, address: str, index: int) -> None:
    """For `test_a_step_compiled_in_the_background_waits_for_slow_processes`."""
    compiled = directory / "compiled"
    with processes.joined(address, 2, index):
        mesh = make_mesh(MeshConfig(data=1, fsdp=2))
        processes.meet(mesh)

        def sums(state, frozen, batch, key):  # over both processes
            return TrainState(step=state.step + 1, params=state.params + jnp.sum(batch["x"]), opt_state=()), {}

        def alone(state, frozen, batch, key):  # meets no other process, so that nothing but the barrier waits
            return TrainState(step=state.step + 1, params=2 * state.params, opt_state=()), {}

        def slowly(batch):
            if index == 1:
                time.sleep(2)
                compiled.touch()
            return jax.jit(alone, out_shardings=replicated(mesh))

        steps = [(1, lambda batch: jax.jit(sums, out_shardings=replicated(mesh))), (2, slowly)]
        with jax.set_mesh(mesh), Stages(steps, {}, mesh=mesh) as stages:
            now = jax.device_put(TrainState(jnp.int32(0), jnp.float32(0), ()), replicated(mesh))
            batch = put_batch(mesh, {"x": np.array([2.0 + 2 * index], np.float32)})
            assert batch["x"].sharding == batch_sharding(mesh)
            key = jax.device_put(jax.random.key(0), replicated(mesh))
            for number in range(2):
                now, _ = stages.step(number)(now, batch, key)
            when = "after" if compiled.exists() else "before"
            print(f"{when} the slow one: {float(now.params)}")


if __name__ == "__main__":
    one_of_two(pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
