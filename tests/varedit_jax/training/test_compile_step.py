"""The step on meshes of eight devices equals the step on one: loss, gradients, moments, parameters."""

import dataclasses
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from varedit_jax.config import DataConfig, LossConfig, MeshConfig, OptimizerConfig, RunConfig, preset
from varedit_jax.parallel.constrain import batch_only
from varedit_jax.parallel.mesh import make_mesh, put_batch
from varedit_jax.parallel.rules import path_name
from varedit_jax.scales import Pyramid, editor_pyramid
from varedit_jax.training.compile_step import abstract_frozen, abstract_state, sharded_step
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.self_correction import draw_flips, strength_groups
from varedit_jax.training.setup import KINDS, jitted_evaluation

pytestmark = [pytest.mark.slow, pytest.mark.subprocess]

MESHES = {
    "one": {},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiles in half the time
BATCH = 16
TINY = preset("tiny")
MODEL = dataclasses.replace(
    TINY,
    tokenizer=dataclasses.replace(TINY.tokenizer, base_channels=16, norm_groups=8),
    text=dataclasses.replace(TINY.text, vocabulary_size=24, layers=2, heads=8, head_size=8),
    transformer=dataclasses.replace(TINY.transformer, depth=3, width=64, heads=8, remat="full"),
    grids=((1, 1), (2, 2), (3, 3)),
)
RUN = RunConfig(
    name="test",
    model=MODEL,
    loss=LossConfig(noise_max=0.3, text_drop=0.3),
    data=DataConfig(batch_size=BATCH, text_tokens=5),
    train_text=True,
    # Without clipping, and with a large epsilon: what is compared is smooth in the gradients.
    optimizer=OptimizerConfig(learning_rate=1e-2, epsilon=1e-2, clip_norm=0.0, weight_decay=0.1, accumulation=2),
)
STEPS = 2


def lively(abstract: Any) -> Any:
    """Parameters of an abstract tree, none of them zero or one."""
    draw = np.random.default_rng(1)

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        around = 1.0 if path[-1].key in ("scale", "scale_mul") else 0.0
        return (around + 0.1 * draw.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, abstract)


def images_and_texts() -> dict[str, np.ndarray]:
    """Returns a batch."""
    draw = np.random.default_rng(0)
    side = editor_pyramid(MODEL).last[0] * MODEL.token_stride
    return {
        "source": draw.integers(0, 256, (BATCH, side, side, 3), np.uint8),
        "target": draw.integers(0, 256, (BATCH, side, side, 3), np.uint8),
        "text_ids": draw.integers(0, 24, (BATCH, 5), np.int32),
        "text_length": draw.integers(1, 6, BATCH, np.int32),
    }


def evaluation(sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Returns metrics of a held-out batch in two microbatches, and sums by kind of edit."""
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: int(np.prod([*sizes.values()]))])
    described = abstract_state(RUN, make_optimizer(RUN.optimizer, STEPS), mesh).params, abstract_frozen(RUN, mesh)
    params, frozen = (jax.device_put(lively(x), jax.tree.map(lambda leaf: leaf.sharding, x)) for x in described)
    batch = images_and_texts() | {KINDS: np.arange(BATCH, dtype=np.int32) % 4 - 1}
    with jax.set_mesh(mesh):
        found = jitted_evaluation(RUN, editor_pyramid(MODEL), mesh, 3)(params, frozen, put_batch(mesh, batch))
    return {name: np.asarray(value) for name, value in found.items()}


def run(sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """State and metrics after some steps, by path."""
    devices = jax.devices()[: int(np.prod([*sizes.values()]))]
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), devices)
    pyramid = editor_pyramid(MODEL)
    optimizer = make_optimizer(RUN.optimizer, STEPS)
    batch = images_and_texts()
    abstract = abstract_state(RUN, optimizer, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    # Nothing but the moments starts at zero, which could hide a gradient that is missing.
    state = jax.device_put(state.replace(params=lively(abstract.params)), places)
    frozen = abstract_frozen(RUN, mesh)
    frozen = jax.device_put(lively(frozen), jax.tree.map(lambda leaf: leaf.sharding, frozen))
    with jax.set_mesh(mesh):
        step = sharded_step(RUN, pyramid, optimizer, mesh)
        metrics = []
        for number in range(STEPS):
            key = jax.random.fold_in(jax.random.key(1), number)
            state, values = step(state, frozen, put_batch(mesh, batch), key)
            metrics.append(values)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == places  # donated, and back where it lay
    tree = {"state": state, "metrics": metrics}
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def strengths(sharing: str, sizes: dict[str, int]) -> np.ndarray:
    """Shares of flipped bits of each example, drawn on a mesh, [B]."""
    devices = jax.devices()[: int(np.prod([*sizes.values()]))]
    mesh, cells = make_mesh(MeshConfig(**{"data": 1, **sizes}), devices), Pyramid(((32, 32),), ((32, 32),))

    def draw(key: jax.Array) -> jax.Array:
        (flips,) = draw_flips(key, BATCH, 16, cells, 1, 0.3, strength_groups(sharing, BATCH))
        return batch_only(flips).mean(axis=(1, 2, 3))

    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(draw)(jax.random.key(2)))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """Of every mesh, from a process that has eight devices."""
    directory = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "XLA_FLAGS": FLAGS}
    done = subprocess.run(
        [sys.executable, __file__, str(directory)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    names = (*MESHES, "noise", "evaluation one", "evaluation all")
    return {name: dict(np.load(directory / f"{name}.npz")) for name in names}


@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_sharded_equals_unsharded(results, name):
    """To float32 rounding. The first moments are the gradients, averaged over two steps."""
    one, sharded = results["one"], results[name]
    assert sharded.keys() == one.keys()
    moments = [path for path in one if "/mu/" in path]
    assert len(moments) > 40
    for path, value in one.items():
        if path in moments:
            assert np.abs(value).max() > 1e-8 or "text_unconditional" in path, f"{path} has no gradient"
        scale = max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(sharded[path], value, rtol=2e-5, atol=2e-5 * scale, err_msg=f"{name}: {path}")


def test_a_sharded_evaluation_equals_an_unsharded_one(results):
    """Kinds of edits are counted over all examples, wherever they lie."""
    one, sharded = results["evaluation one"], results["evaluation all"]
    assert one["count"].tolist() == [4, 4, 4] and set(one["example_loss"].shape) == {3}
    assert one.keys() == sharded.keys()
    for name, value in one.items():
        np.testing.assert_allclose(sharded[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_strengths_of_noise_on_a_mesh(results):
    """The draws of `batch` and `example` do not depend on the mesh; `device` draws once for each device."""
    noise = results["noise"]
    for sharing in ("batch", "example"):
        np.testing.assert_array_equal(noise[f"{sharing} all"], noise[f"{sharing} one"])
    levels = {name: np.round(shares * 100).astype(int) for name, shares in noise.items()}
    assert len(set(levels["batch all"])) == len(set(levels["device one"])) == 1
    assert len(set(levels["example all"])) > 8
    of_devices = levels["device all"].reshape(4, 4)  # data 2 x fsdp 2; devices of `tensor` share examples
    assert np.ptp(of_devices, axis=1).max() <= 1 and len(set(of_devices[:, 0])) == 4


if __name__ == "__main__":
    for _name, _sizes in MESHES.items():
        np.savez(f"{sys.argv[1]}/{_name}.npz", **run(_sizes))
    _noise = {
        f"{_sharing} {_name}": strengths(_sharing, MESHES[_name])
        for _sharing in ("batch", "device", "example")
        for _name in ("one", "all")
    }
    np.savez(f"{sys.argv[1]}/noise.npz", **_noise)
    for _name in ("one", "all"):
        np.savez(f"{sys.argv[1]}/evaluation {_name}.npz", **evaluation(MESHES[_name]))
