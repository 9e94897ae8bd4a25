"""Checkpoints: what is restored, what is kept, and the sentences about failures."""

import collections
import dataclasses
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.configs import shapes
from varedit_jax.config import Cadence, DataConfig, GuardConfig, MeshConfig, OptimizerConfig, RunConfig, preset, to_dict
from varedit_jax.errors import UserError
from varedit_jax.training.checkpoint import Checkpoints, check_resume, restore_state
from varedit_jax.training.run_config import check_config, write_config
from varedit_jax.training.state import TrainState
from varedit_jax.weights.run_directory import checkpoint_steps, read_config

RUNS = pathlib.Path(__file__).parents[2] / "data" / "runs"
OPTIMIZER = optax.adam(1e-3)

# When one of several reads or writes fails, Orbax closes the event loop that the others then report to, and they
# complain to whichever test is running. So where something fails on purpose here, there is one array and no other.
LONELY = {"kernel": jax.random.normal(jax.random.key(0), (1000, 1000))}


def make_state(width: int = 8, seed: int = 0, optimizer: optax.GradientTransformation = OPTIMIZER) -> TrainState:
    kernel = jax.random.normal(jax.random.key(seed), (8, width))
    params = {"head": {"kernel": kernel, "bias": jnp.arange(width, dtype=jnp.bfloat16)}}
    return TrainState(step=jnp.asarray(seed, jnp.int32), params=params, opt_state=optimizer.init(params))


def make_iterator() -> grain.DatasetIterator:
    return iter(grain.MapDataset.source(np.arange(50)).seed(1).shuffle().repeat().batch(4).to_iter_dataset())


def save(workdir: pathlib.Path, *steps: int, keep: int = 3) -> None:
    with Checkpoints(workdir, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(seed=step), make_iterator())


def assert_same(ours: object, theirs: object) -> None:
    def same(a: jax.Array, b: jax.Array) -> None:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(same, ours, theirs)


def test_state_and_iterator_come_back_exactly(tmp_path: pathlib.Path) -> None:
    state, iterator = make_state(seed=7), make_iterator()
    for _ in range(5):
        next(iterator)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, iterator)
        expected = next(iterator)
    fresh = make_iterator()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 7
        restored = checkpoints.restore(jax.eval_shape(make_state), fresh)
    assert isinstance(restored, TrainState)
    assert_same(restored, state)
    np.testing.assert_array_equal(next(fresh), expected)


def test_restores_onto_a_mesh(tmp_path: pathlib.Path) -> None:
    """A checkpoint of one device is restored with the requested shardings."""
    save(tmp_path, 1)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = jax.P("data") if leaf.ndim == 2 and leaf.shape[0] % mesh.size == 0 else jax.P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    abstract = jax.tree.map(place, jax.eval_shape(make_state))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract, make_iterator())
    assert_same(restored, make_state(seed=1))
    jax.tree.map(lambda leaf, wanted: _assert_equal(leaf.sharding, wanted.sharding), restored, abstract)


def _assert_equal(ours: object, theirs: object) -> None:
    assert ours == theirs


def test_keeps_the_newest(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert checkpoint_steps(tmp_path) == [3, 4]
    with pytest.raises(UserError, match="keep_checkpoints is 0; it must be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_keeps_some_forever(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path, keep=2, keep_every=3) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, make_state(seed=step), make_iterator())
    assert checkpoint_steps(tmp_path) == [3, 6, 7, 8]
    with pytest.raises(UserError, match="keep_every is -1; it is a number of steps, or 0"):
        Checkpoints(tmp_path, keep_every=-1)


def test_what_a_killed_save_left_is_removed(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    rest = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", rest)
    (rest / "_CHECKPOINT_METADATA").unlink()
    save(tmp_path, 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]


RESHARD = """
import sys, jax, numpy as np, optax, grain
import jax.numpy as jnp
from varedit_jax.config import MeshConfig
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.training.checkpoint import Checkpoints
from varedit_jax.training.state import TrainState

def make():
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 64)), "bias": jnp.arange(8.0)}
    return TrainState(step=jnp.int32(3), params=params, opt_state=optax.adam(1e-3).init(params), ema=params)

def batches():
    return iter(grain.MapDataset.source(np.arange(50)).seed(1).shuffle().repeat().batch(4).to_iter_dataset())

def placed(mesh, axes):
    def place(leaf):
        spec = {0: jax.P(), 1: jax.P(axes[0]), 2: jax.P(*axes)}[leaf.ndim]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))
    return jax.tree.map(place, jax.eval_shape(make))

one = placed(make_mesh(MeshConfig(data=1, fsdp=8)), ("fsdp",))
two = placed(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), ("fsdp", "tensor"))
state = jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, one))()
assert len({shard.device for shard in state.params["kernel"].addressable_shards}) == 8
assert state.params["kernel"].addressable_shards[0].data.shape == (2, 64)
with Checkpoints(sys.argv[1]) as checkpoints:
    checkpoints.save(3, state, batches())
    checkpoints.wait()
    for abstract in (two, jax.eval_shape(make)):
        restored = checkpoints.restore(abstract, batches())
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
        if abstract is two:
            assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, two)
        kernel = restored.params["kernel"].addressable_shards
        print(len(kernel), kernel[0].data.shape)
"""


@pytest.mark.subprocess
def test_restores_onto_another_mesh(tmp_path: pathlib.Path) -> None:
    """Saved on eight devices, restored on eight in another layout and on one, bit for bit."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", RESHARD, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["8 (8, 32)", "1 (16, 64)"]


def test_an_ema_is_started_and_dropped(tmp_path: pathlib.Path) -> None:
    """A new EMA starts from the parameters; one that is switched off is dropped; else it is restored."""
    plain = make_state(seed=3)
    average = jax.tree.map(lambda leaf: leaf + 1, plain.params)
    with Checkpoints(tmp_path / "off") as checkpoints:
        checkpoints.save(1, plain, make_iterator())
        checkpoints.wait()
        restored = checkpoints.restore(jax.eval_shape(lambda: plain.replace(ema=average)), make_iterator())
    assert_same(restored, plain.replace(ema=plain.params))
    for ours, theirs in zip(jax.tree.leaves(restored.ema), jax.tree.leaves(restored.params), strict=True):
        assert ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()  # both can be donated
    with Checkpoints(tmp_path / "on") as checkpoints:
        checkpoints.save(1, plain.replace(ema=average), make_iterator())
        checkpoints.wait()
        assert checkpoints.restore(jax.eval_shape(lambda: plain), make_iterator()).ema is None
        both = checkpoints.restore(jax.eval_shape(lambda: plain.replace(ema=average)), make_iterator())
    assert_same(both, plain.replace(ema=average))


def test_another_models_checkpoint(tmp_path: pathlib.Path) -> None:
    """The sentence names the first parameter that differs, with both shapes."""
    save(tmp_path, 1)

    def refusal(state: TrainState) -> str:
        with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError) as of_state:
            checkpoints.restore(jax.eval_shape(lambda: state), make_iterator())
        return str(of_state.value).partition("another model: ")[2]

    wide = make_state(width=16)
    assert refusal(wide) == "parameter head/bias is bfloat16[8] there and bfloat16[16] in this model"
    params = {"head": {"kernel": jnp.zeros((8, 8))}}
    without_bias = TrainState(step=jnp.asarray(0, jnp.int32), params=params, opt_state=OPTIMIZER.init(params))
    assert refusal(without_bias).endswith("absent in this model")
    other_optimizer = make_state(optimizer=optax.sgd(1e-3))
    assert refusal(other_optimizer) == "array opt_state/0/count is int32[] there and absent in this model"


def test_damaged_checkpoint(tmp_path: pathlib.Path) -> None:
    """A checkpoint with truncated files is refused, and the previous one still loads."""
    state = TrainState(step=jnp.int32(0), params=LONELY, opt_state={})
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, make_iterator())
    abstract = jax.eval_shape(lambda: state)
    for path in (tmp_path / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1_000_000:
            path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"checkpoints/2 cannot be read .* delete that directory to resume from"):
        restore_state(tmp_path, abstract, 2)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    assert_same(restore_state(tmp_path, abstract, 1).params, LONELY)


def test_checkpoint_without_its_index(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "1" / "state" / "_METADATA").write_text("{")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"checkpoints/1 is damaged: state/_METADATA has 1 of \d+ bytes; there is no"),
    ):
        checkpoints.restore(jax.eval_shape(make_state), make_iterator())


def test_other_number_of_processes(tmp_path: pathlib.Path) -> None:
    """If all processes were at the same position in the data, any number of them can resume."""
    iterator = make_iterator()
    next(iterator)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), iterator)
    own = tmp_path / "checkpoints" / "1" / "data" / "process_0-of-1.json"
    (own.parent.parent / "manifest_0-of-1.json").unlink()
    for index in range(4):
        shutil.copy(own, own.with_name(f"process_{index}-of-4.json"))
    own.unlink()
    fresh = make_iterator()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(jax.eval_shape(make_state), fresh)
        np.testing.assert_array_equal(next(fresh), next(iterator))
        own.with_name("process_3-of-4.json").write_text("{}")
        with pytest.raises(UserError, match="was saved by 4 processes, each at its own place .* there are 1 now"):
            checkpoints.restore(jax.eval_shape(make_state), make_iterator())


def test_directory_that_is_a_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match=r"/run is a file, where a directory should be"):
        Checkpoints(tmp_path / "run")


def test_foreign_directory(tmp_path: pathlib.Path) -> None:
    """Somebody else's directory is left alone."""
    directory = tmp_path / "checkpoints"
    (directory / "7" / "weights").mkdir(parents=True)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"checkpoints/7 is no checkpoint of a run: it holds weights instead of state"),
    ):
        checkpoints.restore(jax.eval_shape(make_state), make_iterator())
    (directory / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"checkpoints/model.safetensors is no checkpoint; use another --workdir"):
        Checkpoints(tmp_path)


def test_a_nearly_full_disk_is_noticed_before_saving(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda directory: usage(1000, 900, 100))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"a checkpoint takes up to 0.0 MB, but only 0.0 MB are free in .* step 1"):
            checkpoints.save(2, make_state(seed=2), make_iterator())
        assert checkpoints.latest() == 1


def test_a_disk_that_fills_up_while_saving(tmp_path: pathlib.Path) -> None:
    """A limit on the size of files replaces a full disk: writing fails midway."""
    save(tmp_path, 1)
    large = TrainState(step={}, params=LONELY, opt_state={})  # type: ignore[arg-type]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            with pytest.raises(
                UserError, match="File too large; what was complete before is intact; make room and run"
            ):
                checkpoints.save(2, large, make_iterator())
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint_steps(tmp_path) == [1]
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(jax.eval_shape(make_state), make_iterator()), make_state(seed=1))
        checkpoints.save(2, make_state(seed=2), make_iterator())
    assert checkpoint_steps(tmp_path) == [1, 2]


def test_config_that_may_change_and_that_may_not(tmp_path: pathlib.Path) -> None:
    record = {"name": "a", "model": to_dict(preset("tiny")), "steps": 10, "data": {"seed": 0, "directory": ""}}
    check_config(tmp_path, record)  # a new directory
    write_config(tmp_path, record)
    assert read_config(tmp_path)["model"]["transformer"]["width"] == 32
    check_config(tmp_path, record)  # tuples of grids included
    check_config(
        tmp_path, record | {"name": "b", "steps": 20, "data": {"seed": 0, "directory": "/d", "cache_directory": "/c"}}
    )
    with pytest.raises(UserError, match=r"holds a run with data.seed = 0, but this one has 1; use another --workdir"):
        check_config(tmp_path, record | {"data": {"seed": 1, "directory": ""}})
    grids = record["model"] | {"grids": ((1, 1), (3, 3), (4, 4))}
    with pytest.raises(UserError, match=r"model.grids = \[\[1, 1\], \[2, 2\], \[4, 4\]\], but this one has"):
        check_config(tmp_path, record | {"model": grids})
    with pytest.raises(UserError, match="with model.new = 'absent', but this one has 3"):
        check_config(tmp_path, record | {"model": record["model"] | {"new": 3}})


def test_config_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="is not the directory of a run: it has no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read as JSON: Expecting property name"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="does not hold a configuration, but list"):
        read_config(tmp_path)


def test_a_newer_versions_run(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    write_config(tmp_path, {"name": "a"})
    assert read_config(tmp_path) == {"name": "a"}
    newer = json.loads((tmp_path / "config.json").read_text()) | {"format_version": 2}
    (tmp_path / "config.json").write_text(json.dumps(newer))
    words = "was written by a newer version of this program: its format is 2, and this version knows none above 1"
    abstract = jax.eval_shape(make_state)
    with pytest.raises(UserError, match=words):
        check_config(tmp_path, {"name": "a"})
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=words):
        checkpoints.restore(abstract, make_iterator())


def test_a_field_that_is_newer_than_the_run_has_its_default(tmp_path: pathlib.Path) -> None:
    run = RunConfig(name="a", model=preset("tiny"), data=DataConfig(text_tokens=16))
    old = to_dict(run)
    for name in ("mesh", "guard", "tokenizer_precision"):
        del old[name]
    del old["model"]["transformer"]["remat_saved"], old["optimizer"]["moment_dtype"]
    write_config(tmp_path, old)
    check_config(tmp_path, to_dict(run))
    free = dataclasses.replace(run, mesh=MeshConfig(fsdp=4), guard=GuardConfig(spike_factor=3.0))
    free = dataclasses.replace(
        free, cadence=Cadence(save_minutes=5.0, keep_every=10), optimizer=OptimizerConfig(ema_decay=0.9, accumulation=2)
    )
    check_config(tmp_path, to_dict(free))
    reading = dataclasses.replace(run.data, workers=2, read_threads=1, prefetch_batches=3, bad_share=0.5)
    check_config(tmp_path, to_dict(dataclasses.replace(run, data=reading)))
    precise = dataclasses.replace(run, tokenizer_precision="high")
    with pytest.raises(UserError, match="tokenizer_precision = 'highest', but this one has 'high'"):
        check_config(tmp_path, to_dict(precise))
    moments = dataclasses.replace(run, optimizer=OptimizerConfig(moment_dtype="bfloat16"))
    with pytest.raises(UserError, match="optimizer.moment_dtype = 'float32', but this one has 'bfloat16'"):
        check_config(tmp_path, to_dict(moments))


@pytest.mark.parametrize("variant", ["tiny", "tokenizer_tiny"])
def test_a_run_recorded_before_cadence_is_resumed(tmp_path: pathlib.Path, variant: str) -> None:
    """Its own experiment config still fits its record, at any cadence; another seed does not."""
    shutil.copy(RUNS / f"shapes_{variant}.json", tmp_path / "config.json")
    run = shapes.get_config(variant)
    check_config(tmp_path, to_dict(run))
    check_config(tmp_path, to_dict(dataclasses.replace(run, cadence=Cadence(save_every=7))))
    with pytest.raises(UserError, match="seed = 0, but this one has 1"):
        check_config(tmp_path, to_dict(dataclasses.replace(run, seed=1)))


def test_a_run_that_lost_its_checkpoints_does_not_start_over(tmp_path: pathlib.Path) -> None:
    for resume in (None, False):
        check_resume(tmp_path / "new", resume)
    with pytest.raises(UserError, match=r"there is no checkpoint in .*/new to resume from, and --resume=yes"):
        check_resume(tmp_path / "new", True)
    save(tmp_path, 1, 2)
    check_resume(tmp_path, None)
    check_resume(tmp_path, True)
    with pytest.raises(UserError, match="has a checkpoint of step 2, but --resume=no starts a new run; use another"):
        check_resume(tmp_path, False)
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    check_resume(tmp_path, None)  # deleted by hand, as the user is told where one is damaged
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    with pytest.raises(UserError, match="lost its checkpoints: a checkpoint of step 2 was saved, but there is none"):
        check_resume(tmp_path, None)
    check_resume(tmp_path, False)
    # A run from before that was noted.
    (tmp_path / "saved.json").unlink()
    write_config(tmp_path, {"name": "a"})
    (tmp_path / "metrics.jsonl").write_text('{"step": 6, "loss": 1.0}\n{"step": 7, "eval/loss": 1.0}\n')
    check_resume(tmp_path, None)  # killed before its first save
    (tmp_path / "checkpoints").rmdir()
    with pytest.raises(UserError, match="has lost its checkpoints: 7 steps were made, but there is none in"):
        check_resume(tmp_path, None)
