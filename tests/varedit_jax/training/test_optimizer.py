"""AdamW and Muon: against plain numpy versions, and which parameters decay or count as matrices."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varedit_jax.config import OptimizerConfig
from varedit_jax.training.optimizer import MATRICES, NO_DECAY, decays, learning_rate, make_optimizer

BLOCK_DECAYED = (
    "self_attention/qkv_kernel",
    "self_attention/proj/kernel",
    "cross_attention/q/kernel",
    "cross_attention/kv_kernel",
    "cross_attention/proj/kernel",
    "mlp/fc1/kernel",
    "mlp/fc2/kernel",
)
BLOCK_EXCLUDED = (
    "ada_gss",
    "self_attention/q_bias",
    "self_attention/v_bias",
    "self_attention/scale_mul",
    "self_attention/proj/bias",
    "cross_norm/scale",
    "cross_norm/bias",
    "cross_attention/q/bias",
    "cross_attention/v_bias",
    "cross_attention/proj/bias",
    "mlp/fc1/bias",
    "mlp/fc2/bias",
)
DECAYED = (
    "transformer/word_embed/kernel",
    "transformer/text_pool/kv_kernel",
    "transformer/text_pool/proj/kernel",
    "transformer/text_proj_in/kernel",
    "transformer/text_proj_out/kernel",
    "transformer/shared_ada/kernel",
    "transformer/head_ada/kernel",
    "transformer/head/kernel",
    *(f"transformer/{block}/{name}" for block in ("block_0", "blocks") for name in BLOCK_DECAYED),
    "text/layers/attention/query/kernel",
    "text/layers/attention/out/kernel",
    "text/layers/mlp/gate/kernel",
)
EXCLUDED = (
    "transformer/text_norm/scale",
    "transformer/text_unconditional",
    "transformer/pos_start",
    "transformer/level_embed",
    "transformer/word_embed/bias",
    "transformer/text_pool/query",
    "transformer/text_pool/v_bias",
    "transformer/text_pool/proj/bias",
    "transformer/text_proj_in/bias",
    "transformer/text_proj_out/bias",
    "transformer/shared_ada/bias",
    "transformer/head_ada/bias",
    "transformer/head/bias",
    *(f"transformer/{block}/{name}" for block in ("block_0", "blocks") for name in BLOCK_EXCLUDED),
    "text/embedding/embedding",
    "text/relative_bias/table",
    "text/layers/attention_norm/scale",
    "text/layers/mlp_norm/scale",
    "text/final_norm/scale",
)


def test_kernels_decay_and_nothing_else() -> None:
    """The rule of the recipe, parameter by parameter."""
    assert [path for path in DECAYED if not decays(path)] == []
    assert [path for path in EXCLUDED if decays(path)] == []


@pytest.mark.parametrize("pattern", NO_DECAY)
def test_no_exclusion_is_dead(pattern: str) -> None:
    """Every entry of the table matches a parameter."""
    assert any(re.fullmatch(pattern, path) for path in EXCLUDED)


def reference_adamw(
    params: dict[str, np.ndarray], grads: list[dict[str, np.ndarray]], config: OptimizerConfig, rates: list[float]
) -> dict[str, np.ndarray]:
    """AdamW with clipping, in float64; of the two parameters, `kernel` decays."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    first = {name: np.zeros_like(value) for name, value in params.items()}
    second = {name: np.zeros_like(value) for name, value in params.items()}
    for count, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
        norm = math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in grad.values()))
        factor = config.clip_norm / norm if config.clip_norm and norm > config.clip_norm else 1.0
        for name, value in grad.items():
            clipped = value.astype(np.float64) * factor
            first[name] = config.beta1 * first[name] + (1 - config.beta1) * clipped
            second[name] = config.beta2 * second[name] + (1 - config.beta2) * clipped**2
            direction = (first[name] / (1 - config.beta1**count)) / (
                np.sqrt(second[name] / (1 - config.beta2**count)) + config.epsilon
            )
            decay = config.weight_decay * params[name] if name == "kernel" else 0.0
            params[name] = params[name] - rate * (direction + decay)
    return params


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_equals_plain_adamw(clip_norm: float) -> None:
    """Five updates; gradients of the first three exceed the clipping norm, those of the last two do not."""
    config = OptimizerConfig(
        learning_rate=0.1, schedule="cosine", warmup_steps=2, weight_decay=0.5, clip_norm=clip_norm, final_fraction=0.1
    )
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "bias": rng.normal(size=4).astype(np.float32)}
    sizes = (3.0, 2.0, 5.0, 0.1, 0.05)
    grads = [{k: (s * rng.normal(size=v.shape)).astype(np.float32) for k, v in params.items()} for s in sizes]
    cosine = [0.1 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t / 8))) for t in range(3)]
    expected = reference_adamw(params, grads, config, [0.0, 0.05, *cosine])

    optimizer = make_optimizer(config, total_steps=10)
    result = jax.tree.map(jnp.asarray, params)
    state = optimizer.init(result)
    for grad in grads:
        updates, state = jax.jit(optimizer.update)(jax.tree.map(jnp.asarray, grad), state, result)
        result = optax.apply_updates(result, updates)
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=2e-6, atol=1e-6)  # float32 against float64


@pytest.mark.parametrize("pattern", MATRICES)
def test_no_matrix_is_dead(pattern: str) -> None:
    """Every entry of Muon's table matches parameters, all of which decay."""
    found = [path for path in DECAYED + EXCLUDED if re.fullmatch(pattern, path)]
    assert found
    assert set(found) <= set(DECAYED)


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Three Newton-Schulz iterations with Muon's coefficients, in float64."""
    x = matrix.astype(np.float64) / np.linalg.norm(matrix)
    for _ in range(3):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_updates_matrices_head_by_head() -> None:
    """The first update is the gradient made orthogonal, for each projection and head; the rest moves as with AdamW."""
    config = OptimizerConfig(algorithm="muon", learning_rate=0.1, weight_decay=0.5, clip_norm=1.0)
    rng = np.random.default_rng(0)
    shapes = {
        "self_attention": {"qkv_kernel": (8, 3, 2, 4), "q_bias": (2, 4)},
        "mlp": {"fc1": {"kernel": (8, 16), "bias": (16,)}},
    }
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    params = {"transformer": {"block_0": jax.tree.map(draw, shapes, is_leaf=is_shape)}}
    grads = {"transformer": {"block_0": jax.tree.map(draw, shapes, is_leaf=is_shape)}}
    optimizer = make_optimizer(config, total_steps=10)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    before, grad, update = (tree["transformer"]["block_0"] for tree in (params, grads, updates))

    expected = -0.1 * 0.5 * before["self_attention"]["qkv_kernel"]
    for projection in range(3):
        for head in range(2):
            matrix = orthogonal(grad["self_attention"]["qkv_kernel"][:, projection, head].T).T
            expected[:, projection, head] -= 0.1 * 0.1 * math.sqrt(8) * matrix
    np.testing.assert_allclose(update["self_attention"]["qkv_kernel"], expected, atol=1e-5)  # float32 against float64
    matrix = orthogonal(grad["mlp"]["fc1"]["kernel"])
    expected = -0.1 * (0.1 * math.sqrt(16) * matrix + 0.5 * before["mlp"]["fc1"]["kernel"])
    np.testing.assert_allclose(update["mlp"]["fc1"]["kernel"], expected, atol=1e-5)
    # Adam's first step has one size for all entries, and somewhat more with Nesterov momentum.
    size = 0.1 * (1 + 0.9 * 0.1 / (1 - 0.9**2))
    np.testing.assert_allclose(update["mlp"]["fc1"]["bias"], -size * np.sign(grad["mlp"]["fc1"]["bias"]), rtol=1e-4)


def test_first_moments_can_be_bfloat16() -> None:
    """Two bytes instead of four in the state; the second moment, and with it the size of a step, stays float32."""
    draw = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(draw.normal(size=(8, 4)), jnp.float32)}
    results = {}
    for dtype in ("float32", "bfloat16"):
        config = OptimizerConfig(learning_rate=0.1, epsilon=1e-2, clip_norm=0.0, moment_dtype=dtype)
        optimizer = make_optimizer(config, 10)
        state, result = optimizer.init(params), params
        for seed in range(4):
            grads = {"kernel": jnp.asarray(np.random.default_rng(seed).normal(size=(8, 4)), jnp.float32)}
            updates, state = jax.jit(optimizer.update)(grads, state, result)
            result = optax.apply_updates(result, updates)
        moments = state[1][0]
        assert (moments.mu["kernel"].dtype, moments.nu["kernel"].dtype) == (dtype, jnp.float32)
        assert result["kernel"].dtype == jnp.float32
        results[dtype] = np.asarray(result["kernel"])
    change = np.abs(results["bfloat16"] - results["float32"]).max()
    assert 0 < change < 4 * 0.1 * 2**-7  # four steps, each off by a rounding or two of bfloat16


def test_state_keeps_its_structure() -> None:
    """A run can resume with another configuration: neither clipping nor decay nor schedule changes the state's tree."""
    params = {"kernel": jnp.ones((2, 3))}
    configs = (
        OptimizerConfig(),
        OptimizerConfig(clip_norm=0.0, weight_decay=0.1, schedule="cosine", warmup_steps=5),
    )
    first, second = (jax.tree.structure(make_optimizer(config, 10).init(params)) for config in configs)
    assert first == second


def test_learning_rate() -> None:
    """Warm-up from 0, then constant, or a cosine that ends at its fraction."""
    constant = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=4), 10)
    assert [float(constant(step)) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    cosine = learning_rate(
        OptimizerConfig(learning_rate=2.0, warmup_steps=2, schedule="cosine", final_fraction=0.25), 10
    )
    np.testing.assert_allclose([float(cosine(step)) for step in (0, 2, 6, 10, 99)], [0.0, 2.0, 1.25, 0.5, 0.5])
    late = learning_rate(OptimizerConfig(learning_rate=2.0, warmup_steps=2, schedule="cosine", decay_steps=4), 10)
    np.testing.assert_allclose([float(late(step)) for step in (1, 2, 6, 8, 10)], [1.0, 2.0, 2.0, 1.0, 0.0], atol=1e-6)
    for warmup, decay in ((10, 0), (7, 4)):
        with pytest.raises(ValueError, match=f"warmup_steps is {warmup} and .*decay_steps {decay}, .* 10 steps"):
            learning_rate(OptimizerConfig(warmup_steps=warmup, decay_steps=decay, schedule="cosine"), 10)
