"""Steps computed twice: a device that computes wrongly is found, named, and nothing of it is saved."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.varedit_jax.parallel.test_processes import two_processes
from tests.varedit_jax.training import test_compile_step, test_kills
from tests.varedit_jax.training.runs import Outcome, Run, assert_same_outcome, init_state, outcome, step_fn
from varedit_jax.causes import exit_code
from varedit_jax.config import GuardConfig, MeshConfig
from varedit_jax.errors import TEMPORARY
from varedit_jax.parallel import processes
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.training.compile_step import abstract_frozen
from varedit_jax.training.replay import replay
from varedit_jax.training.setup import MeshRun
from varedit_jax.training.stages import SingleStage
from varedit_jax.training.state import TrainState
from varedit_jax.training.verify import Corrupted, Digests, Examples, digest, digests, disagreeing
from varedit_jax.weights.run_directory import checkpoint_steps

GUARD = GuardConfig(verify_every=4)


def flipped(x: jax.Array, device: Any, byte: int = 0) -> jax.Array:
    """Returns the array with one bit of what `device` holds of it flipped, in a byte of the last element."""

    def part(shard: Any) -> jax.Array:
        if shard.device != device:
            return shard.data
        words = np.array(shard.data)
        words.view(np.uint8).reshape(-1)[byte - words.itemsize] ^= 1
        return jax.device_put(words, device)

    return jax.make_array_from_single_device_arrays(
        x.shape, x.sharding, [part(shard) for shard in x.addressable_shards]
    )


def faulty(step: Callable, at: int, calls: tuple[int, ...], name: str, device: Any) -> Callable:
    """Returns a step that computes one element of a parameter wrongly in some of the calls for step number `at`."""
    count = 0

    def run(state: TrainState, batch: Any, key: jax.Array) -> Any:
        nonlocal count
        number = int(jax.device_get(state.step))
        new, metrics = step(state, batch, key)
        if number == at:
            count += 1
            if count in calls:
                leaves = {**new.params}
                leaves |= jax.tree.map(lambda x: flipped(x, device), {name: leaves[name]})
                new = new.replace(params=leaves)
        return new, metrics

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_digest_sees_every_bit_and_every_place(dtype: str) -> None:
    x = jax.random.normal(jax.random.key(0), (3, 5, 2)) * 100
    x = (x > 0) if dtype == "bool" else x.astype(dtype)
    found = {int(digest(x))}
    bits = 1 if dtype == "bool" else x.dtype.itemsize * 8
    for place in range(x.size):
        for bit in range(0, bits, max(bits // 8, 1)):
            other = np.array(x)
            other.view(np.uint8).reshape(-1)[place * x.dtype.itemsize + bit // 8] ^= 1 << bit % 8
            found.add(int(digest(jnp.asarray(other))))
    assert len(found) == 1 + x.size * len(range(0, bits, max(bits // 8, 1)))
    signs = np.array(x)
    signs.view(np.uint8).reshape(2, -1)[:, -1] ^= 1 if dtype == "bool" else 128
    assert int(digest(jnp.asarray(signs))) not in found  # two that change
    np.testing.assert_array_equal(digest(x, kept=1), [digest(part) for part in x])


def test_a_verified_run_is_the_same(whole: Outcome, tmp_path: pathlib.Path) -> None:
    """Bit for bit, stopped and resumed in between."""
    run = Run(tmp_path)
    run(guard=GUARD, stop_after=6)
    assert_same_outcome(outcome(run, *run(guard=GUARD)), whole)


@pytest.mark.parametrize(
    ("wrong", "agrees"), [((2,), "the repetition"), ((1,), "the step of the run"), ((1, 2), "neither")]
)
def test_a_wrong_step_ends_the_run_unsaved(tmp_path: pathlib.Path, wrong: tuple[int, ...], agrees: str) -> None:
    """The first call for a step is the repetition, the second one that of the run; then a third one decides."""
    calls = 0

    def broken(state: TrainState, batch: Any, key: jax.Array) -> Any:
        nonlocal calls
        number = int(jax.device_get(state.step))
        new, metrics = step_fn(state, batch, key)
        calls += number == 8
        if number == 8 and calls in wrong:
            kernel = np.array(new.params["linear"]["kernel"])
            kernel.reshape(-1)[calls] += 1e-6
            new = new.replace(params={"linear": {**new.params["linear"], "kernel": jax.device_put(kernel)}})
        return new, metrics

    run = Run(tmp_path, step_fn=broken)
    with pytest.raises(Corrupted) as error:
        run(guard=GUARD)
    assert re.match(
        r"step 8 gave other bits when it was repeated: state/params/linear/kernel on device 0 \(cpu, process 0 on .*\)"
        rf"; a third run agrees with {agrees}; a chip, its memory or a link computes wrongly; .* not saved, ",
        str(error.value),
    )
    assert exit_code(error.value) == TEMPORARY == 75
    assert checkpoint_steps(tmp_path)[-1] == 5
    directory = tmp_path / "replay" / "step_8"
    assert json.loads((directory / "step.json").read_text())["reason"] == "corrupted"
    arguments = {"key": jax.random.key(1), "abstract_state": jax.eval_shape(init_state), "put": jax.device_put}
    metrics = replay(directory, step_fn=lambda number: step_fn, say=lambda line: None, **arguments)
    state, _ = Run(tmp_path)()  # goes on with what is right
    lines = [line for line in outcome(run, state, test_kills.ORDER.to_iter_dataset().__iter__()).metrics]
    assert float(metrics["loss"]) == next(line["loss"] for line in lines if line["step"] == 8 and "loss" in line)


@pytest.mark.parametrize(
    ("held", "expected"),
    [([5, 5, 5, 9], []), ([5, 6, 5, 9], [1]), ([5, 5, 6, 8], [2]), ([5, 5, 5, 8], []), ([4, 5, 6, 8], [0, 1, 2])],
)
def test_the_copy_that_is_not_that_of_most(held: list[int], expected: list[int]) -> None:
    """The fourth device holds another part of the array."""
    values = np.array(held, np.uint32)[:, None]
    found = Digests(["a", "b", "c", "d"], ["x"], values, np.array([0, 0, 0, 1])[:, None])
    assert np.flatnonzero(found.apart()).tolist() == expected


def copies() -> None:
    """For `test_four_devices`: one of two copies of a part changes."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    place = jax.NamedSharding(mesh, jax.P("fsdp"))
    x = jax.device_put(jnp.arange(8.0), place)
    assert not digests({"x": x}).apart().any()
    found = digests({"x": flipped(x, mesh.devices[1, 0, 0])})
    assert found.apart()[:, 0].tolist() == [device in mesh.devices[:, 0].flat for device in found.devices]


def of_shares(count: int, wrong: Callable[[int, int], bool]) -> Examples:
    """Examples of which `wrong(device, run)` says whether a device computes them wrongly."""
    runs = 0

    def numbers(state: Any, batch: Any, places: int) -> np.ndarray:
        nonlocal runs
        del state, batch
        runs += 1
        right = np.arange(4 * count, dtype=np.uint32)
        return right + [100 * wrong((row // 4 + places) % count, runs) * runs for row in range(4 * count)]

    return Examples(shares=[[f"chip {share}"] for share in range(count)], numbers=numbers)


@pytest.mark.parametrize(
    ("count", "wrong", "expected"),
    [
        (8, lambda device, run: False, []),
        (8, lambda device, run: device == 3, ["chip 3"]),
        (8, lambda device, run: device == 7 and run == 1, ["chip 7"]),
        (8, lambda device, run: device == 0 and run == 2, ["chip 0"]),
        (3, lambda device, run: device == 1, ["chip 1"]),
        (2, lambda device, run: device == 1, ["chip 0", "chip 1"]),  # one against one
    ],
)
def test_two_of_three_devices_are_right(count: int, wrong: Callable, expected: list[str]) -> None:
    assert sorted(disagreeing(of_shares(count, wrong), None, None)) == expected  # type: ignore[arg-type]


def editor() -> None:
    """For `test_four_devices`: one device of four holds another bias than the others."""
    r, run = dataclasses.replace, test_compile_step.RUN
    transformer = r(run.model.transformer, dtype="bfloat16", depth=2)
    config = r(run, train_text=False, text_dtype="bfloat16", model=r(run.model, transformer=transformer))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2))
    with jax.set_mesh(mesh):
        on_mesh = MeshRun(config, mesh)
        abstract, frozen = on_mesh.abstract_state, abstract_frozen(config, mesh)
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
        state = state.replace(params=test_compile_step.lively(abstract.params))
        state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, abstract))
        frozen = jax.device_put(test_compile_step.lively(frozen), jax.tree.map(lambda leaf: leaf.sharding, frozen))
        rows = np.split(np.arange(test_compile_step.BATCH), jax.process_count())[jax.process_index()]
        batch = on_mesh.put({name: x[rows] for name, x in test_compile_step.images_and_texts().items()})
        examples = on_mesh.examples(frozen)
        assert disagreeing(examples, state, batch) == []
        numbers = examples.numbers(state, batch, 0)
        assert numbers.shape == (8, 2) and all(len(np.unique(column)) == 8 for column in numbers.T)
        for part in ("block_0", "head"):
            params = {**state.params["transformer"]}
            params[part] = jax.tree.map(lambda x: flipped(x, jax.devices()[2], 2) if x.ndim == 1 else x, params[part])
            broken = state.replace(params={**state.params, "transformer": params})
            assert disagreeing(examples, broken, batch) == [jax.devices()[2]], part


def broken_of_two(directory: pathlib.Path, address: str, index: int) -> None:
    """For `test_two_processes`: of four devices the last one, of the second process, errs."""
    with processes.joined(address, 2, index):
        device = jax.devices()[3]
        run = test_kills.Run(directory / "broken", save_every=6, log_every=100)
        step = faulty(run.arguments["stages"].function, 8, (2,), "kernel", device)
        with pytest.raises(Corrupted) as error:
            run(guard=GUARD, stages=SingleStage(step))
        assert exit_code(error.value) == TEMPORARY
        assert f"state/params/kernel on device {device.id} (cpu, process 1 on " in str(error.value)
        assert "agrees with the repetition" in str(error.value)
        assert checkpoint_steps(directory / "broken")[-1] == 6
        print(error.value)


def editor_of_two(directory: pathlib.Path, address: str, index: int) -> None:
    """`editor` on the devices of two processes; it is the second's that errs."""
    with processes.joined(address, 2, index):
        editor()
        print(f"process {index} is done")


@pytest.mark.slow
@pytest.mark.subprocess
def test_examples_of_two_processes(tmp_path: pathlib.Path) -> None:
    """Examples are worked on by devices of the other process, too."""
    codes, said = two_processes("editor_of_two", tmp_path, devices=2, program=__file__)
    assert codes == [0, 0] and all(f"process {index} is done" in said[index] for index in range(2)), said


@pytest.mark.slow
@pytest.mark.subprocess
def test_two_processes(tmp_path: pathlib.Path) -> None:
    """A check passes, the next one does not; both say the same."""
    codes, said = two_processes("broken_of_two", tmp_path, devices=2, program=__file__)
    assert codes == [0, 0], said
    sentences = {line for text in said for line in text.splitlines() if "gave other bits" in line}
    assert len(sentences) == 1, said
    names = {path.name for path in (tmp_path / "broken" / "replay" / "step_8").iterdir()}
    assert names == {"inputs_process_0-of-2.npz", "inputs_process_1-of-2.npz", "state", "step.json"}


@pytest.mark.slow
@pytest.mark.subprocess
def test_four_devices() -> None:
    """Bits do not depend on the device; where one has a wrong number, it is named. Of two copies both are."""
    environment = os.environ | {
        "XLA_FLAGS": test_compile_step.FLAGS.replace("count=8", "count=4"),
        "PYTHONPATH": str(pathlib.Path(__file__).parents[3]),
    }
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    if len(sys.argv) > 1:
        functions = {"broken_of_two": broken_of_two, "editor_of_two": editor_of_two}
        functions[sys.argv[1]](pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        copies()
        editor()
