"""Loading: types, checkpoints and places of weights, and what is recorded with them."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varedit_jax.config import DataConfig, EditingConfig, OptimizerConfig, RunConfig, SamplingConfig, preset, to_dict
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params
from varedit_jax.sampling.loading import load
from varedit_jax.scales import editor_pyramid
from varedit_jax.text.t5 import T5Encoder
from varedit_jax.training.checkpoint import Checkpoints
from varedit_jax.training.run_config import write_config
from varedit_jax.training.state import TrainState
from varedit_jax.transformer.model import Transformer
from varedit_jax.weights import names
from varedit_jax.weights.directory import PARTS, save_weights

TINY = preset("tiny")
HALF = dataclasses.replace(TINY, transformer=dataclasses.replace(TINY.transformer, dtype="bfloat16"))
EDITING = EditingConfig(text_dtype="bfloat16", tokenizer_precision="highest", aspects=("1.0",))


@pytest.fixture(scope="module")
def params(lively) -> dict[str, Any]:
    return {part: lively(abstract_params(TINY, part)) for part in PARTS}


@pytest.fixture(scope="module")
def directory(params, tmp_path_factory) -> pathlib.Path:
    """Weights in float32 that are recorded to be used in bfloat16, as converted ones are."""
    path = tmp_path_factory.mktemp("weights") / "half"
    save_weights(path, HALF, params, sampling=SamplingConfig(top_p=0.97), editing=EDITING)
    return path


def types_of(params: Any) -> dict[str, str]:
    return {path: str(leaf.dtype) for path, leaf in names.flat(params).items()}


# --- types


def test_recorded_types_are_the_default(directory, params):
    loaded = load(directory)
    assert (loaded.config, loaded.editing, loaded.sampling) == (HALF, EDITING, SamplingConfig(top_p=0.97))
    assert set(types_of(loaded.params["text"]).values()) == {"bfloat16"}
    assert set(types_of(loaded.params["tokenizer"]).values()) == {"float32"}
    halved = {path for path, dtype in types_of(loaded.params["transformer"]).items() if dtype == "bfloat16"}
    kernels = ("self_attention/qkv_kernel", "self_attention/proj/kernel", "cross_attention/q/kernel",
        "cross_attention/kv_kernel", "cross_attention/proj/kernel", "mlp/fc1/kernel", "mlp/fc2/kernel")  # fmt: skip
    assert halved == {f"{blocks}/{kernel}" for blocks in ("block_0", "blocks") for kernel in kernels}
    for part in PARTS:
        for path, leaf in names.flat(loaded.params[part]).items():
            np.testing.assert_array_equal(leaf, names.flat(params[part])[path].astype(leaf.dtype))


def test_float32_on_request_is_exact(directory, params):
    loaded = load(directory, dtype="float32")
    assert loaded.config == TINY
    assert loaded.editing == dataclasses.replace(EDITING, text_dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert {dtype for part in PARTS for dtype in types_of(loaded.params[part]).values()} == {"float32"}


def test_blocks_compute_the_same_from_matrices_that_are_kept_rounded(directory, params, quick_jit):
    """Logits of all scales, bit for bit those of float32 parameters that are rounded in every step."""
    pyramid, draw = editor_pyramid(TINY), np.random.default_rng(0)
    model = Transformer(HALF.transformer, pyramid)
    inputs = (
        draw.normal(size=(2, 16, 4)).astype(np.float32),
        draw.normal(size=(2, 20, 4)).astype(np.float32),
        draw.normal(size=(2, 5, 32)).astype(np.float32),
        np.int32([5, 3]),
    )
    apply = quick_jit(model.apply)
    found = apply({"params": load(directory).params["transformer"]}, *inputs)
    wanted = apply({"params": params["transformer"]}, *inputs)
    np.testing.assert_array_equal(found, wanted)
    assert np.std(found) > 0.1


def test_the_text_encoder_computes_in_the_type_of_its_weights(directory, params, quick_jit):
    """Given the recorded type, its features are those of rounded weights, not of float32 ones."""
    loaded = load(directory)
    ids, lengths = np.int32([[3, 4, 5, 1]]), np.int32([4])

    def features(tree: Any, dtype: Any) -> Any:
        return quick_jit(T5Encoder(TINY.text, dtype).apply)({"params": tree}, ids, lengths)

    found = features(loaded.params["text"], jnp.dtype(loaded.editing.text_dtype))
    exact = features(params["text"], jnp.float32)
    assert 1e-3 < np.abs(found - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("arguments, sentence", [
    ({"dtype": "float16"}, "weights cannot be loaded as 'float16'; give float32, bfloat16 or int8"),
    ({"weights": "best"}, "there are no weights 'best'; give model or ema"),
    ({"weights": "ema"}, "half holds no EMA of its parameters; only a run with optimizer.ema_decay keeps one"),
    ({"step": 3}, "half is a directory of weights, which has no checkpoint of step 3; give a run's"),
])  # fmt: skip
def test_mistakes(directory, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        load(directory, **arguments)


# --- records


def test_weights_of_earlier_versions_record_nothing(params, tmp_path):
    """They are used as they were: in float32, at any aspect."""
    save_weights(tmp_path / "old", TINY, params)
    assert "editing" not in json.loads((tmp_path / "old" / "config.json").read_text())
    loaded = load(tmp_path / "old")
    assert loaded.editing == EditingConfig(text_dtype="float32", tokenizer_precision="default", aspects=())
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_a_part_of_another_directory(directory, params, tmp_path):
    other = jax.tree.map(lambda x: 2 * x, params["tokenizer"])
    save_weights(tmp_path / "tokenizer", TINY, {"tokenizer": other})
    loaded = load(directory, tokenizer=tmp_path / "tokenizer")
    jax.tree.map(np.testing.assert_array_equal, loaded.params["tokenizer"], other)


# --- runs


def times(factor: float, tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(factor * x), tree)


@pytest.fixture(scope="module")
def run(directory, params, tmp_path_factory) -> pathlib.Path:
    """A run with checkpoints of steps 3 and 6, whose transformers are so many times `params`, and the EMA 16 times."""
    workdir = tmp_path_factory.mktemp("run")
    config = RunConfig(
        name="r",
        model=HALF,
        data=DataConfig(text_tokens=16, aspects=("1.0", "2.0")),
        optimizer=OptimizerConfig(ema_decay=0.9),
        text_dtype="bfloat16",
        tokenizer_precision="high",
        tokenizer_weights=str(directory),
        text_weights=str(directory),
    )
    write_config(workdir, to_dict(config))
    with Checkpoints(workdir) as checkpoints:
        iterator = iter(grain.MapDataset.range(4).to_iter_dataset())
        for step in (3, 6):
            own = {"transformer": times(step, params["transformer"])}
            state = TrainState(
                step=jnp.int32(step), params=own, opt_state=optax.sgd(1e-3).init(own), ema=times(16, own)
            )
            checkpoints.save(step, state, iterator)
    return workdir


@pytest.mark.parametrize("arguments, factor", [
    ({}, 6), ({"step": 3}, 3), ({"weights": "ema"}, 96), ({"weights": "ema", "step": 3}, 48),
])  # fmt: skip
def test_a_run_has_checkpoints_and_their_ema(run, params, arguments, factor):
    loaded = load(run, **arguments)
    for path, leaf in names.flat(loaded.params["transformer"]).items():
        np.testing.assert_array_equal(
            leaf, np.asarray(names.flat(times(factor, params["transformer"]))[path], leaf.dtype)
        )
    assert loaded.editing == EditingConfig(text_dtype="bfloat16", tokenizer_precision="high", aspects=("1.0", "2.0"))
    assert set(types_of(loaded.params["text"]).values()) == {"bfloat16"}
    assert str(loaded.params["transformer"]["block_0"]["mlp"]["fc1"]["kernel"].dtype) == "bfloat16"


def test_a_text_encoder_that_was_trained_is_float32():
    """Whatever the run says of a frozen one."""
    run = RunConfig(name="r", model=HALF, data=DataConfig(text_tokens=16), text_dtype="bfloat16", train_text=True)
    assert run.editing.text_dtype == "float32"
    assert dataclasses.replace(run, train_text=False).editing.text_dtype == "bfloat16"


def test_a_step_that_was_not_saved(run):
    with pytest.raises(UserError, match="has no checkpoint of step 4, but of 3, 6"):
        load(run, step=4)


def test_a_run_that_names_no_tokenizer(params, tmp_path):
    write_config(tmp_path, to_dict(RunConfig(name="r", model=TINY, data=DataConfig(text_tokens=16))))
    own = {"transformer": times(1, params["transformer"])}
    with Checkpoints(tmp_path) as checkpoints:
        state = TrainState(step=jnp.int32(1), params=own, opt_state=optax.sgd(1e-3).init(own))
        checkpoints.save(1, state, iter(grain.MapDataset.range(4).to_iter_dataset()))
    with pytest.raises(UserError, match="names no directory of its tokenizer weights; give --tokenizer=DIRECTORY"):
        load(tmp_path)


# --- on a mesh

ON_A_MESH = """
import sys
import jax, numpy as np
from varedit_jax.config import MeshConfig
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.parallel.rules import param_shardings
from varedit_jax.sampling.loading import load

mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
alone, split = load(sys.argv[1]), load(sys.argv[1], mesh=mesh)
jax.tree.map(np.testing.assert_array_equal, split.params, alone.params)
assert jax.tree.map(lambda x: x.dtype, split.params) == jax.tree.map(lambda x: x.dtype, alone.params)
wanted = param_shardings(split.params, mesh)
assert jax.tree.map(lambda x: x.sharding, split.params) == wanted
with jax.set_mesh(mesh):
    assert jax.tree.map(lambda x: x.sharding, load(sys.argv[1]).params) == wanted
kernel = split.params["transformer"]["blocks"]["mlp"]["fc1"]["kernel"]
print([shard.data.shape for shard in kernel.addressable_shards])
"""


@pytest.mark.subprocess
def test_parameters_are_split_by_the_table_of_rules(directory):
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, str(directory)],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{[(2, 16, 64)] * 4}\n"
