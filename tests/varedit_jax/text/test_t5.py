"""The T5 encoder against Hugging Face's, and the sizes of the published ones."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from varedit_jax import config as configs
from varedit_jax.parameters import abstract_params
from varedit_jax.text.t5 import T5Encoder, relative_buckets
from varedit_jax.weights import names

DATA = pathlib.Path(__file__).parents[2] / "data"
ENCODERS = json.loads((DATA / "t5_encoders.json").read_text())


def load_encoder(name: str) -> tuple[configs.TextConfig, dict, jax.Array, jax.Array, list[np.ndarray]]:
    """Config, parameters, ids, lengths and the expected features of each row."""
    config = configs.TextConfig(**ENCODERS[name])
    arrays = load_file(DATA / f"t5_encoder_{name}.safetensors")
    ids_BT, length_B = jnp.asarray(arrays.pop("ids")), arrays.pop("lengths")
    features = np.split(arrays.pop("features"), np.cumsum(length_B)[:-1])
    editor = dataclasses.replace(
        configs.preset("tiny"),
        text=config,
        transformer=dataclasses.replace(configs.preset("tiny").transformer, text_width=config.width),
    )
    parameters = names.to_tree("text", arrays, abstract_params(editor, "text"))
    return config, parameters, ids_BT, jnp.asarray(length_B), features


@pytest.mark.parametrize("name", ENCODERS)
def test_equals_hugging_face(name):
    config, parameters, ids_BT, length_B, features = load_encoder(name)
    encoder = T5Encoder(config)
    abstract = jax.eval_shape(encoder.init, jax.random.key(0), ids_BT, length_B)["params"]
    assert jax.tree.map(jnp.shape, parameters) == jax.tree.map(jnp.shape, abstract)

    result_BTE = jax.jit(encoder.apply)({"params": parameters}, ids_BT, length_B)
    assert result_BTE.dtype == jnp.float32
    for result_TE, length, wanted_TE in zip(np.asarray(result_BTE), length_B, features, strict=True):
        np.testing.assert_allclose(result_TE[:length], wanted_TE, rtol=1e-5, atol=1e-5)
        assert (result_TE[length:] == 0).all()


def test_buckets_equal_hugging_face():
    for buckets, max_distance, wanted in json.loads((DATA / "t5_buckets.json").read_text()):
        result = relative_buckets(np.arange(-600, 601), buckets, max_distance)
        assert result.dtype == np.int32
        assert result.tolist() == wanted


def test_padding_is_not_seen():
    config, parameters, ids_BT, length_B, _ = load_encoder("heads")
    encode = jax.jit(T5Encoder(config).apply)
    features_BTE = encode({"params": parameters}, ids_BT, length_B)
    padding_BT = np.arange(ids_BT.shape[1]) >= np.asarray(length_B)[:, None]
    assert padding_BT.any()
    changed_BT = jnp.where(padding_BT, ids_BT + 1, ids_BT)
    np.testing.assert_array_equal(features_BTE, encode({"params": parameters}, changed_BT, length_B))
    # The same text in a longer batch: only the order of summation differs.
    longer_BT = jnp.pad(ids_BT, ((0, 0), (0, 9)))
    longer_BTE = encode({"params": parameters}, longer_BT, length_B)
    np.testing.assert_allclose(longer_BTE[:, : ids_BT.shape[1]], features_BTE, rtol=1e-5, atol=1e-5)


def test_empty_row_gives_zeros_and_finite_gradients():
    config, parameters, ids_BT, _, _ = load_encoder("heads")
    length_B = jnp.array([0, 3], jnp.int32)

    def total(parameters: dict) -> jax.Array:
        return jnp.square(T5Encoder(config).apply({"params": parameters}, ids_BT, length_B)).sum()

    value, gradients = jax.jit(jax.value_and_grad(total))(parameters)
    assert value > 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))
    alone = jax.jit(T5Encoder(config).apply)({"params": parameters}, ids_BT, jnp.zeros(2, jnp.int32))
    assert (np.asarray(alone) == 0).all()


@pytest.mark.parametrize("cast", [False, True])
def test_bfloat16_is_near_float32(cast):
    """With float32 parameters and with a tree cast to bfloat16, as a frozen encoder may be kept."""
    config, parameters, ids_BT, length_B, _ = load_encoder("long")
    if cast:
        parameters = jax.tree.map(lambda value: jnp.asarray(value, jnp.bfloat16), parameters)
    exact_parameters = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), parameters)
    exact = jax.jit(T5Encoder(config).apply)({"params": exact_parameters}, ids_BT, length_B)
    result = jax.jit(T5Encoder(config, jnp.bfloat16).apply)({"params": parameters}, ids_BT, length_B)
    assert result.dtype == jnp.float32
    error = jnp.linalg.norm(result - exact) / jnp.linalg.norm(exact)
    assert 1e-5 < error < 0.02  # 8 bits of mantissa, over 2 layers; below it, bfloat16 was not used


BY_HAND = {
    # 32128 x 2048 + 32 x 32 + 24 x (4 x 2048 x 2048 + 3 x 2048 x 5120 + 2 x 2048) + 2048
    "xl": 65_798_144 + 1_024 + 24 * (16_777_216 + 31_457_280 + 4_096) + 2_048,
    # 32128 x 4096 + 32 x 64 + 24 x (4 x 4096 x 4096 + 3 x 4096 x 10240 + 2 x 4096) + 4096
    "xxl": 131_596_288 + 2_048 + 24 * (67_108_864 + 125_829_120 + 8_192) + 4_096,
}


@pytest.mark.parametrize("name", ["small", "base", "large", "xl", "xxl"])
def test_parameter_count(name):
    config = configs.text_preset(name)
    ids_BT = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    length_B = jax.ShapeDtypeStruct((2,), jnp.int32)
    encoder = T5Encoder(config, jnp.bfloat16)
    features_BTE, variables = jax.eval_shape(encoder.init_with_output, jax.random.key(0), ids_BT, length_B)
    assert features_BTE.shape == (2, 512, config.width)
    assert features_BTE.dtype == jnp.float32
    leaves = jax.tree.leaves(variables["params"])
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)

    attention = 4 * config.width * config.heads * config.head_size
    mlp = 3 * config.width * config.mlp_width
    by_formula = (
        config.vocabulary_size * config.width
        + config.relative_buckets * config.heads
        + config.layers * (attention + mlp + 2 * config.width)
        + config.width
    )
    assert sum(math.prod(leaf.shape) for leaf in leaves) == by_formula
    assert BY_HAND.get(name, by_formula) == by_formula


def test_initialization_is_t5s():
    config = configs.TextConfig(width=64, layers=3, heads=4, head_size=32, mlp_width=96, vocabulary_size=512)
    ids_BT, length_B = jnp.zeros((1, 4), jnp.int32), jnp.full(1, 4, jnp.int32)
    parameters = jax.jit(T5Encoder(config).init)(jax.random.key(0), ids_BT, length_B)["params"]
    attention, mlp = parameters["layers"]["attention"], parameters["layers"]["mlp"]
    stds = {
        "embedding": (parameters["embedding"]["embedding"], 1.0),
        "bias": (parameters["relative_bias"]["table"], 64**-0.5),
        "query": (attention["query"]["kernel"], (64 * 32) ** -0.5),
        "key": (attention["key"]["kernel"], 64**-0.5),
        "value": (attention["value"]["kernel"], 64**-0.5),
        "out": (attention["out"]["kernel"], (4 * 32) ** -0.5),
        "gate": (mlp["gate"]["kernel"], 64**-0.5),
        "up": (mlp["up"]["kernel"], 64**-0.5),
        "down": (mlp["down"]["kernel"], 96**-0.5),
    }
    for name, (array, std) in stds.items():
        # The standard error of a measured deviation of n numbers is std / sqrt(2 n); five of them are allowed.
        assert abs(float(array.std()) / std - 1) < 5 / math.sqrt(2 * array.size), name
    queries = attention["query"]["kernel"]
    assert not (queries[0] == queries[1]).all()  # every layer draws its own
    assert (parameters["final_norm"]["scale"] == 1).all()
