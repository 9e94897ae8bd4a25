"""Checkpoints: what comes back, what is kept, and what the user is told when it does not work."""

import collections
import pathlib
import resource
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varedit_jax.config import preset, to_dict
from varedit_jax.errors import UserError
from varedit_jax.training.checkpoint import (
    Checkpoints,
    check_config,
    checkpoint_steps,
    read_config,
    restore_params,
    write_config,
)
from varedit_jax.training.state import TrainState

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
    """What one device saved comes back with the shardings that are asked for."""
    save(tmp_path, 1)
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = jax.P("data") if leaf.ndim == 2 and leaf.shape[0] % mesh.size == 0 else jax.P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    abstract = jax.tree.map(place, jax.eval_shape(make_state))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract, make_iterator())
    assert_same(restored, make_state(seed=1))
    params = restore_params(tmp_path, abstract.params)
    assert_same(params, make_state(seed=1).params)
    for tree, shape in ((restored, abstract), (params, abstract.params)):
        jax.tree.map(lambda leaf, wanted: _assert_equal(leaf.sharding, wanted.sharding), tree, shape)


def _assert_equal(ours: object, theirs: object) -> None:
    assert ours == theirs


def test_keeps_the_newest(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert checkpoint_steps(tmp_path) == [3, 4]
    with pytest.raises(UserError, match="keep_checkpoints is 0; it must be at least 1"):
        Checkpoints(tmp_path, keep=0)


def test_restore_params(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1, 2)
    abstract = jax.eval_shape(make_state).params
    assert_same(restore_params(tmp_path, abstract), make_state(seed=2).params)
    assert_same(restore_params(tmp_path, abstract, step=1), make_state(seed=1).params)


def test_restore_params_says_what_is_wrong(tmp_path: pathlib.Path) -> None:
    abstract = jax.eval_shape(make_state).params
    with pytest.raises(UserError, match=r"there is no folder .*/nowhere"):
        restore_params(tmp_path / "nowhere", abstract)
    foreign = tmp_path / "foreign"
    for name in ("model.safetensors", "vocab.json"):
        foreign.mkdir(exist_ok=True)
        (foreign / name).touch()
    with pytest.raises(UserError, match=r"is not the folder of a run .* it holds model.safetensors, vocab.json"):
        restore_params(foreign, abstract)
    save(tmp_path / "run", 1, 2)
    with pytest.raises(UserError, match=r"has no checkpoint of step 5; it has 1, 2"):
        restore_params(tmp_path / "run", abstract, step=5)


def test_another_models_checkpoint(tmp_path: pathlib.Path) -> None:
    """The first parameter that differs is named, with what it is on both sides."""
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
    with pytest.raises(UserError, match=r"parameter head/bias is bfloat16\[8\] there and bfloat16\[16\] in this model"):
        restore_params(tmp_path, jax.eval_shape(lambda: wide.params))


def test_damaged_checkpoint(tmp_path: pathlib.Path) -> None:
    """A checkpoint whose files were cut is refused, and the one before it still loads."""
    with Checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, TrainState(step=jnp.int32(step), params=LONELY, opt_state={}), make_iterator())
    for path in (tmp_path / "checkpoints" / "2" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1_000_000:
            path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"checkpoints/2 cannot be read .* delete that folder to go on from"):
        restore_params(tmp_path, jax.eval_shape(lambda: LONELY))
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    assert_same(restore_params(tmp_path, jax.eval_shape(lambda: LONELY)), LONELY)


def test_checkpoint_without_its_index(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "1" / "state" / "_METADATA").write_text("{")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"checkpoints/1 cannot be read .* delete that folder to go on from"),
    ):
        checkpoints.restore(jax.eval_shape(make_state), make_iterator())


def test_other_number_of_processes(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 1)
    place = tmp_path / "checkpoints" / "1" / "data" / "process_0-of-1.json"
    place.rename(place.with_name("process_0-of-4.json"))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match="was saved by 4 processes, .* there are 1 now"),
    ):
        checkpoints.restore(jax.eval_shape(make_state), make_iterator())


def test_folder_that_is_a_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match=r"/run.* is a file, where the folder of a run should be"):
        Checkpoints(tmp_path / "run")


def test_foreign_folder(tmp_path: pathlib.Path) -> None:
    """Somebody else's folder is left alone."""
    folder = tmp_path / "checkpoints"
    (folder / "7" / "weights").mkdir(parents=True)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(UserError, match=r"checkpoints/7 is no checkpoint of a run: it holds weights instead of state"),
    ):
        checkpoints.restore(jax.eval_shape(make_state), make_iterator())
    (folder / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"checkpoints/model.safetensors is no checkpoint; use another --workdir"):
        Checkpoints(tmp_path)


def test_a_nearly_full_disk_is_noticed_before_saving(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage(1000, 900, 100))
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"a checkpoint takes up to 0.0 MB, but only 0.0 MB are free in .* step 1"):
            checkpoints.save(2, make_state(seed=2), make_iterator())
        assert checkpoints.latest() == 1


def test_a_disk_that_fills_up_while_saving(tmp_path: pathlib.Path) -> None:
    """A limit on the size of files stands for the disk: writing fails midway, as it does there."""
    save(tmp_path, 1)
    large = TrainState(step={}, params=LONELY, opt_state={})  # type: ignore[arg-type]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
        try:
            with pytest.raises(UserError, match="File too large; earlier checkpoints are intact; make room and run"):
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
    check_config(tmp_path, record)  # a new folder
    write_config(tmp_path, record)
    assert read_config(tmp_path)["model"]["transformer"]["width"] == 32
    check_config(tmp_path, record)  # tuples of grids included
    check_config(tmp_path, record | {"name": "b", "steps": 20, "data": {"seed": 0, "directory": "/elsewhere"}})
    with pytest.raises(UserError, match=r"holds a run with data.seed = 0, but this one has 1; use another --workdir"):
        check_config(tmp_path, record | {"data": {"seed": 1, "directory": ""}})
    grids = record["model"] | {"grids": ((1, 1), (3, 3), (4, 4))}
    with pytest.raises(UserError, match=r"model.grids = \[\[1, 1\], \[2, 2\], \[4, 4\]\], but this one has"):
        check_config(tmp_path, record | {"model": grids})
    with pytest.raises(UserError, match="with model.new = 'absent', but this one has 3"):
        check_config(tmp_path, record | {"model": record["model"] | {"new": 3}})


def test_config_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="is not the folder of a run: it has no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read as JSON: Expecting property name"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="does not hold a configuration, but list"):
        read_config(tmp_path)
