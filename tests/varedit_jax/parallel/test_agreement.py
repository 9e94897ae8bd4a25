"""What the processes of a run agree on: all go on, or all end with the same sentence, soon."""

import json
import pathlib
import sys
import time
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests.varedit_jax.parallel.test_processes import two_processes
from varedit_jax.causes import exit_code
from varedit_jax.config import MeshConfig
from varedit_jax.errors import TEMPORARY, UserError
from varedit_jax.parallel import agreement, processes
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.training import checkpoint, checksums, run_config
from varedit_jax.training.state import TrainState
from varedit_jax.weights import blocks, native


@pytest.mark.slow
@pytest.mark.subprocess
def test_two_processes(tmp_path: pathlib.Path) -> None:
    codes, said = two_processes("all_cases", tmp_path, devices=1, program=__file__)
    assert codes == [0, 0], said


def test_a_process_alone_agrees_with_itself() -> None:
    assert agreement.gather("é") == ["é"]
    assert agreement.agreed(lambda: "a", lambda _: "not reached") == "a"
    with pytest.raises(UserError, match=r"^a mistake$"), agreement.together():
        raise UserError("a mistake")


def all_cases(directory: pathlib.Path, address: str, index: int) -> None:
    """For `test_two_processes`."""
    with processes.joined(address, 2, index):
        mesh = make_mesh(MeshConfig(data=1, fsdp=2))
        processes.meet(mesh)
        assert agreement.gather(f"of {index}" * (1 + 1000 * index)) == ["of 0", "of 1" * 1001]
        sentence = r"^in process 1: a mistake$" if index == 0 else r"^a mistake$"
        with pytest.raises(UserError, match=sentence), agreement.together():
            if index == 1:
                raise UserError("a mistake")
        with pytest.raises(UserError, match="cannot read") as found, agreement.together():
            if index == 1:
                raise UserError("cannot read") from ConnectionResetError()
        assert exit_code(found.value) == TEMPORARY  # in both
        configurations(index)
        agreement.STALE_SECONDS = 2.0
        directories(directory, index)
        damage(directory / "damage", mesh, index)
        listings(directory / "damage", index)
        weights(directory / "weights", mesh, index)


def configurations(index: int) -> None:
    """One differs."""
    run_config.check_alike({"seed": 1, "data": {"directory": f"/{index}"}})
    with pytest.raises(UserError, match=r"process 1 was started with data.seed = 1, but process 0 with 0; start all"):
        run_config.check_alike({"data": {"seed": index}})


def directories(directory: pathlib.Path, index: int) -> None:
    """One has a directory of its own; a shared one has the same run at every start."""
    (directory / str(index)).mkdir()
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"is not the same directory on all hosts: process 1 on .* does not find what"):
        run_config.identify(directory / str(index))
    assert time.monotonic() - begin < 10
    run = run_config.identify(directory)
    assert run_config.identify(directory) == run and set(agreement.gather(run)) == {run}


def batches() -> grain.DatasetIterator:
    """Of the same numbers in both processes."""
    return iter(grain.MapDataset.source(np.arange(8)).repeat().batch(4).to_iter_dataset())


def damage(workdir: pathlib.Path, mesh: jax.sharding.Mesh, index: int) -> None:
    """A bit of what process 1 wrote: both go back to the checkpoint before."""
    sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
    whole = jax.NamedSharding(mesh, jax.P())

    def make(step: int) -> TrainState:
        return TrainState(step=jnp.int32(step), params={"x": jnp.arange(4000.0) + step}, opt_state={})

    shape = jax.eval_shape(lambda: make(0))
    places: Any = TrainState(step=whole, params={"x": sharding}, opt_state={})  # type: ignore[arg-type]
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shape, places)

    with checkpoint.Checkpoints(workdir) as checkpoints:
        for step in (1, 2, 3):
            state = jax.jit(make, static_argnums=0, out_shardings=places)(step)
            checkpoints.save(step, state, batches())
    processes.wait_for_all("checksums")
    found = {path.name for path in (workdir / "checkpoints" / "3").glob("manifest*")}
    assert found == {"manifest_0-of-2.json", "manifest_1-of-2.json"}
    processes.wait_for_all("looking")
    if index == 0:
        own = (workdir / "checkpoints" / "3" / "state" / "ocdbt.process_1").rglob("d/*")
        path = max(own, key=lambda path: path.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    processes.wait_for_all("damage")
    with checkpoint.Checkpoints(workdir) as checkpoints:
        state = checkpoints.restore(abstract, batches())
        assert int(state.step) == 2
        own_part = np.asarray(state.params["x"].addressable_shards[0].data)
        np.testing.assert_array_equal(own_part, np.arange(4000.0)[2000 * index : 2000 * (index + 1)] + 2)
    assert checkpoint.agreed_steps(workdir) == [1, 2] and (workdir / "damaged" / "3").is_dir()
    newest = workdir / "checkpoints" / "2"
    if index == 0:  # as if process 1 had been killed before its checksums
        (newest / "manifest_1-of-2.json").unlink()
    processes.wait_for_all("killed")
    missing = checksums.unlisted(newest)
    assert "data/process_1-of-2.json" in missing and "data/process_0-of-2.json" not in missing
    with checkpoint.Checkpoints(workdir) as checkpoints:
        assert int(checkpoints.restore(abstract, batches()).step) == 2
    processes.wait_for_all("checksums of what was restored")
    assert checksums.unlisted(newest) == [] and checksums.find_damage(newest) == ""
    written = [json.loads((newest / f"manifest_resumed_{i}-of-2.json").read_text())["files"] for i in range(2)]
    assert all(written) and sorted([*written[0], *written[1]]) == missing


def listings(workdir: pathlib.Path, index: int) -> None:
    """Process 1 sees an older checkpoint as the newest one: for a while, and for good."""
    module: Any = checkpoint
    truth, stale = module.checkpoint_steps, [[1]] * index

    def listed(directory: pathlib.Path) -> list[int]:
        return list(stale.pop() if stale else truth(directory))

    module.checkpoint_steps = listed
    assert checkpoint.agreed_steps(workdir) == [1, 2]
    stale += [[1]] * 100 * index
    begin = time.monotonic()
    sentence = r"are not the same for all hosts: process 1 on .* sees steps \[1\], process 0 on .* \[1, 2\]; see that"
    with pytest.raises(UserError, match=sentence):
        checkpoint.agreed_steps(workdir)
    assert time.monotonic() - begin < 10


def weights(directory: pathlib.Path, mesh: jax.sharding.Mesh, index: int) -> None:
    """Columns of an array that is stored in rows: each process reads half of it, and they exchange."""
    values = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    if index == 0:
        directory.mkdir()
        safetensors.numpy.save_file({"x": values}, directory / "text.safetensors")
    processes.wait_for_all("weights")
    leaf = native.find_part(directory, "text")["x"]
    sharding = jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    reading = blocks.choose_reading(leaf, sharding, 4)
    assert reading.exchanged is not None and leaf.bytes_of(((0, 32), (0, 256))) == values.nbytes // 2
    array = native.load_sharded(leaf, jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding))
    (shard,) = array.addressable_shards
    np.testing.assert_array_equal(shard.data, values[:, 128 * index : 128 * (index + 1)])


if __name__ == "__main__":
    all_cases(pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
