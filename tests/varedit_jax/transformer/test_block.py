"""One block: layer norm, modulation, and stochastic depth branch by branch."""

import dataclasses

import jax
import numpy as np
import pytest

from varedit_jax.config import TransformerConfig
from varedit_jax.scales import Pyramid
from varedit_jax.transformer import rope
from varedit_jax.transformer.block import Block, plain_norm
from varedit_jax.transformer.visibility import Visibility

GRIDS = ((1, 1), (2, 2))
VISIBILITY = Visibility(Pyramid(GRIDS, GRIDS), "finest", scale_aligned=False)
CONFIG = TransformerConfig(width=16, heads=2, depth=2, text_width=16, drop_path=0.5)
BATCH, TOKENS = 16, 9


def test_plain_norm():
    x = np.random.default_rng(0).normal(3, 2, size=(2, 5, 16)).astype(np.float32)
    wanted = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(plain_norm().apply({}, x), wanted, rtol=0, atol=2e-6)
    # A mean far from zero must not swallow the variance.
    np.testing.assert_allclose(plain_norm().apply({}, x + np.float32(1000)), wanted, rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def block(lively, quick_jit):
    """(parameters, input, run): `run(params, rate, key)` trains, `run(params, rate, None)` is deterministic."""
    draw = np.random.default_rng(0)
    x, memory = (draw.normal(size=(BATCH, n, 16)).astype(np.float32) for n in (TOKENS, 3))
    ada = draw.normal(size=(BATCH, 6, 16)).astype(np.float32)
    rotation = rope.rotation(np.zeros((TOKENS, 2), int), 8)
    rest = (None, None, ada, memory, np.ones((BATCH, 3), bool), rotation)
    model = Block(CONFIG, VISIBILITY)
    params = lively(jax.eval_shape(model.init, jax.random.key(0), x, np.float32(0), *rest)["params"])
    training = Block(CONFIG, VISIBILITY, deterministic=False)
    train = quick_jit(
        lambda params, rate, key: training.apply({"params": params}, x, rate, *rest, rngs={"drop_path": key})[0]
    )
    plain = quick_jit(lambda params: model.apply({"params": params}, x, np.float32(0), *rest)[0])

    def run(params, rate, key):
        return np.asarray(plain(params) if key is None else train(params, np.float32(rate), key))

    return params, x, run


# The last layer of each branch; without it the branch adds nothing.
BRANCHES = {"self": ("self_attention", "proj"), "cross": ("cross_attention", "proj"), "mlp": ("mlp", "fc2")}


def alone(params, branch: str):
    """Parameters with which only one branch adds anything."""
    params = jax.tree.map(np.copy, params)
    for name, (module, layer) in BRANCHES.items():
        if name != branch:
            params[module][layer] = jax.tree.map(np.zeros_like, params[module][layer])
    return params


@pytest.mark.parametrize("branch", ["self", "mlp"])
def test_stochastic_depth_leaves_out_a_branch_of_a_sample(block, branch):
    """Each sample has the whole branch divided by 1 - rate, or nothing of it."""
    params, x, run = block
    params = alone(params, branch)
    added = run(params, 0, None) - x
    assert np.abs(added).max() > 0.1
    dropped = run(params, 0.4, jax.random.key(1)) - x
    kept = np.abs(dropped).max(axis=(1, 2)) > 0
    assert 0 < kept.sum() < BATCH
    np.testing.assert_allclose(dropped[kept], added[kept] / 0.6, rtol=0, atol=1e-4 * np.abs(added).max())


def test_stochastic_depth_leaves_the_text_alone(block):
    params, _, run = block
    params = alone(params, "cross")
    np.testing.assert_allclose(run(params, 0.4, jax.random.key(1)), run(params, 0, None), rtol=0, atol=1e-6)


def test_branches_are_dropped_apart_and_by_key(block):
    params, x, run = block
    kept = {}
    for branch in ("self", "mlp"):
        changed = run(alone(params, branch), 0.4, jax.random.key(1)) - x
        kept[branch] = (np.abs(changed).max(axis=(1, 2)) > 0).tolist()
    assert kept["self"] != kept["mlp"]
    one, same, other = (run(params, 0.4, jax.random.key(key)) for key in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_rate_zero_is_deterministic(block):
    params, _, run = block
    np.testing.assert_allclose(run(params, 0, jax.random.key(1)), run(params, 0, None), rtol=1e-6, atol=1e-5)


def test_modulation(block):
    """Gammas multiply a branch; gamma = 0 closes it. The rows are gamma1, gamma2, scale1, scale2, shift1, shift2."""
    params, x, run = block
    model = Block(dataclasses.replace(CONFIG, drop_path=0.0), VISIBILITY)
    for branch, row in (("self", 0), ("mlp", 1)):
        rest = (
            None,
            None,
            np.zeros((BATCH, 6, 16), np.float32),
            np.zeros((BATCH, 3, 16), np.float32),
            np.ones((BATCH, 3), bool),
            rope.rotation(np.zeros((TOKENS, 2), int), 8),
        )
        closed = alone(params, branch)
        closed["ada_gss"][row] = 0
        np.testing.assert_array_equal(model.apply({"params": closed}, x, np.float32(0), *rest)[0], x)
        shifted = alone(params, branch)
        shifted["ada_gss"][2 + row] = -1  # 1 + scale = 0: what is left is the shift, the same for every token
        output = np.asarray(model.apply({"params": shifted}, x, np.float32(0), *rest)[0]) - x
        np.testing.assert_allclose(output, np.broadcast_to(output[:1, :1], output.shape), rtol=0, atol=1e-5)
        assert np.abs(output).max() > 0.01
