"""Products with kernels: eight bits against float64, gradients, and that scales are the same on a mesh."""

import collections
import dataclasses
import functools
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from varedit_jax.analysis import compiled, hlo
from varedit_jax.config import MeshConfig, TransformerConfig
from varedit_jax.parallel import rules
from varedit_jax.parallel.constrain import gathered
from varedit_jax.parallel.mesh import BATCH, make_mesh
from varedit_jax.parallel.rules import gather, param_shardings, with_shardings
from varedit_jax.parallel.topology import topology_devices
from varedit_jax.quantized import Int8, rounded
from varedit_jax.transformer import products as products_lib
from varedit_jax.transformer.attention import kernel_init
from varedit_jax.transformer.block import MLP
from varedit_jax.transformer.products import Dense, add_bias, from_heads, product, to_heads, to_keys_and_values

CONFIG = TransformerConfig(width=16, heads=2, depth=2, text_width=16)
TOKENS, WIDTH, OUT = 6, 16, 12
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiles in half the time


@pytest.fixture(scope="module")
def operands():
    """Tokens [2, 6, 16], a kernel [16, 12] and a gradient [2, 6, 12], whose rows and columns differ in size."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, TOKENS, WIDTH)) * draw.uniform(0.01, 10, (2, TOKENS, 1))
    kernel = draw.normal(size=(WIDTH, OUT)) * draw.uniform(0.01, 10, (1, OUT))
    gradient = draw.normal(size=(2, TOKENS, OUT)) * draw.uniform(0.01, 10, (2, TOKENS, 1))
    return tuple(array.astype(np.float32) for array in (x, kernel, gradient))


def restated(x, axis, digits):
    """x in float64 as it is after rounding: whole multiples of a step of int8, or to so many bits of mantissa."""
    x = x.astype(np.float64)
    most = np.abs(x).max(axis=axis, keepdims=True)
    if digits == "int8":
        return np.round(x / (most / 127)) * (most / 127)
    largest, bits = {"e4m3": (448, 3), "e5m2": (57344, 2)}[digits]
    scaled = x / (most / largest)
    step = 2.0 ** (np.floor(np.log2(np.abs(scaled) + 1e-30)) - bits)
    return np.round(scaled / step) * step * (most / largest)


@pytest.mark.parametrize(("name", "forward", "backward"), [("int8", "int8", "int8"), ("fp8", "e4m3", "e5m2")])
@pytest.mark.parametrize("whole", [False, True])
def test_eight_bits_against_numpy(operands, name, forward, backward, whole):
    """Outputs and gradients; the kernel's is always plain, the tokens' unless `products_backward`."""
    x, kernel, gradient = operands
    config = dataclasses.replace(CONFIG, products=name, products_backward=whole)
    found, pull = jax.vjp(lambda x, kernel: product(x, kernel, config), x, kernel)
    x_gradient, kernel_gradient = pull(gradient)
    round_x, round_kernel = restated(x, -1, forward), restated(kernel, 0, forward)

    def near(found, wanted):
        # A float32 that lies on the other side of a tie of float64 is one step away; there is hardly one.
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert error < 2e-6, error

    near(found, round_x @ round_kernel)
    near(kernel_gradient, np.einsum("bli,blo->io", x.astype(np.float64), gradient))
    if whole:
        steps = np.abs(kernel).max(axis=0) / {"int8": 127, "e4m3": 448}[forward]
        near(x_gradient, restated(gradient * steps, -1, backward) @ (round_kernel / steps).T)
    else:
        near(x_gradient, gradient @ kernel.astype(np.float64).T)
    exact = x.astype(np.float64) @ kernel
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-3 < error < {"int8": 0.015, "fp8": 0.05}[name]


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_rounding_keeps_zeros_and_extremes(dtype):
    """A row of zeros stays one; the largest magnitude becomes the largest of the type, never infinite or NaN."""
    x = np.array([[0, 0, 0], [1e-30, -3e-30, 0], [3e38, 1, -3e38]], np.float32)
    values, scale = rounded(x, -1, dtype)
    back = np.asarray(values, np.float32) * np.asarray(scale)
    assert np.isfinite(back).all() and (back[0] == 0).all()
    np.testing.assert_allclose(np.abs(back).max(axis=1), np.abs(x).max(axis=1), rtol=1e-6)


def test_the_default_is_what_flax_computes():
    """`Dense` has the parameters of flax's, drawn alike, and the same bits come out, in bfloat16 too.

    The gradient of the bias alone is more exact: its sum over tokens is float32.
    """
    x = np.random.default_rng(0).normal(size=(2, TOKENS, WIDTH)).astype(jnp.bfloat16)
    theirs = nn.Dense(OUT, dtype=jnp.bfloat16, kernel_init=kernel_init(), name="fc1")
    ours = Dense(dataclasses.replace(CONFIG, dtype="bfloat16"), OUT, kernel_init(), name="fc1")
    params = theirs.init(jax.random.key(0), x)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, ours.init(jax.random.key(0), x)))
    params = jax.tree.map(lambda leaf: leaf + np.float32(0.1), params)

    def run(module):
        return jax.value_and_grad(lambda params: jnp.sum(module.apply(params, x).astype(jnp.float32) ** 2))(params)

    (loss, gradients), (our_loss, our_gradients) = run(theirs), run(ours)
    assert loss == our_loss
    np.testing.assert_array_equal(gradients["params"]["kernel"], our_gradients["params"]["kernel"])
    outputs = np.asarray(ours.apply(params, x), np.float32)
    exact = (2 * outputs).astype(jnp.bfloat16).astype(np.float64).sum(axis=(0, 1))
    errors = [np.abs(g["params"]["bias"] - exact).max() for g in (our_gradients, gradients)]
    assert errors[0] < 1e-5 < 1e-2 < errors[1]


def test_the_bias_of_heads():
    """[H, D] goes along heads and channels, and its gradient sums over the rest in float32."""
    generator = np.random.default_rng(1)
    x_BHLD = generator.normal(size=(2, 3, 50, 4)).astype(jnp.bfloat16)
    bias_HD = generator.normal(size=(3, 4)).astype(np.float32)
    out, pull = jax.vjp(add_bias, x_BHLD, bias_HD)
    np.testing.assert_array_equal(out, x_BHLD + bias_HD.astype(jnp.bfloat16)[None, :, None])
    gradient = generator.normal(size=out.shape).astype(jnp.bfloat16)
    x_gradient, bias_gradient = pull(gradient)
    np.testing.assert_array_equal(x_gradient, gradient)
    assert bias_gradient.dtype == np.float32
    np.testing.assert_allclose(bias_gradient, gradient.astype(np.float64).sum(axis=(0, 2)), rtol=1e-5, atol=1e-6)


def test_gradients_are_rounded_once_less_with_float32_sums(operands):
    """The gradient of a kernel leaves its matmul in float32, not in bfloat16; the output is the same."""
    x, kernel, gradient = operands
    x, gradient = x.astype(jnp.bfloat16), gradient.astype(jnp.bfloat16)
    exact = np.einsum("bli,blo->io", x.astype(np.float64), gradient.astype(np.float64))
    outputs, errors = [], []
    for sums in ("dtype", "float32"):
        config = dataclasses.replace(CONFIG, dtype="bfloat16", gradient_sums=sums)
        output, pull = jax.vjp(lambda kernel, config=config: product(x, kernel, config), kernel)
        outputs.append(output)
        errors.append(np.linalg.norm(pull(gradient)[0] - exact) / np.linalg.norm(exact))
    np.testing.assert_array_equal(*outputs)
    assert errors[0] > 1e-3 and errors[1] < 1e-6, errors


def mlp(config, mesh):
    """The gradient function of an MLP whose parameters are split as the rules say, and their shardings."""
    module = gathered(
        MLP, "block_0/mlp", functools.partial(gather, "transformer"), config.dtype, config.gradient_dtype
    )(config)
    shapes = {
        "fc1": {"kernel": (config.width, 4 * config.width), "bias": (4 * config.width,)},
        "fc2": {"kernel": (4 * config.width, config.width), "bias": (config.width,)},
    }
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda node: isinstance(node, tuple)
    )
    shardings = param_shardings({"transformer": {"block_0": {"mlp": params}}}, mesh)["transformer"]["block_0"]["mlp"]

    def loss(params, x):
        return jnp.mean(jnp.square(module.apply({"params": params}, x).astype(jnp.float32)))

    return jax.grad(loss, argnums=(0, 1)), params, shardings


@pytest.fixture
def unkept():
    """Nothing compiled is kept: a program for a TPU could not be read back where there is none."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)


@pytest.mark.tpu
@pytest.mark.usefixtures("unkept")
@pytest.mark.parametrize(("sums", "type_name"), [("dtype", "bf16"), ("float32", "f32")])
def test_the_type_of_reduce_scatters_on_a_tpu(sums, type_name):
    """Kernels are gathered in bfloat16 either way; their gradients are summed in the type that the config names."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), topology_devices("v5e:2x2"))
    config = dataclasses.replace(CONFIG, width=128, dtype="bfloat16", gradient_sums=sums)
    with jax.set_mesh(mesh):
        gradient, params, shardings = mlp(config, mesh)
        x = jax.ShapeDtypeStruct((8, 64, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(BATCH)))
        places = (shardings, x.sharding)
        program = jax.jit(gradient, in_shardings=places, out_shardings=places).lower(params, x).compile()
    found = compiled.collectives(hlo.parse(program.as_text()), mesh)
    scattered = [entry for entry in found if entry.kind == "reduce-scatter" and entry.array.size == 4 * 128 * 128]
    gathers = [entry for entry in found if entry.kind == "all-gather" and entry.array.size == 4 * 128 * 128]
    assert len(scattered) == 2 and {entry.array.dtype for entry in scattered} == {type_name}
    assert len(gathers) >= 2 and {entry.array.dtype for entry in gathers} == {"bf16"}


@pytest.mark.tpu
@pytest.mark.usefixtures("unkept")
@pytest.mark.parametrize("early", [False, True])
def test_a_stack_in_int8_is_never_widened_on_a_tpu(early):
    """The kernels of a layer are converted within its matmuls; `early` is what it looks like otherwise."""
    layers, width = 4, 256
    config = dataclasses.replace(CONFIG, width=width, heads=2, dtype="bfloat16")

    def run(params, x_BLC):
        if early:
            params = jax.tree.map(restored, params, is_leaf=lambda node: isinstance(node, Int8))

        def layer(x_BLC, kernels):
            params = {name: {"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])} for name, kernel in kernels.items()}
            return x_BLC + MLP(config).apply({"params": params}, x_BLC), None

        return jax.lax.scan(layer, x_BLC, params)[0]

    mesh = make_mesh(MeshConfig(data=1), topology_devices("v5e:1x1"))
    kernels = {"fc1": (layers, width, 4 * width), "fc2": (layers, 4 * width, width)}
    params = {
        name: Int8(jax.ShapeDtypeStruct(shape, jnp.int8), jax.ShapeDtypeStruct((layers, 1, shape[2]), jnp.float32))
        for name, shape in kernels.items()
    }
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, PartitionSpec())
        abstract = (params, jax.ShapeDtypeStruct((2, 512, width), jnp.bfloat16))
        arguments = with_shardings(abstract, jax.tree.map(lambda leaf: place, abstract))
        text = jax.jit(run).lower(*arguments).compile().as_text()
    stacks = {array.dtype for array in hlo.arrays(text) if array.shape in kernels.values()}
    assert "s8" in stacks and (stacks - {"s8"} != set()) == early, stacks


def restored(kernel):
    """What an int8 kernel stands for, bfloat16."""
    return kernel.values.astype(jnp.bfloat16) * kernel.scale.astype(jnp.bfloat16)


@pytest.mark.tpu
@pytest.mark.usefixtures("unkept")
@pytest.mark.parametrize("by_matrix", [True, False])
def test_sums_of_kernels_of_heads_are_scattered_on_a_tpu(monkeypatch, by_matrix):
    """As matrices; libtpu reduces them in every device if they are left as they come."""
    for module, name in (
        (products_lib, "scatters_matrices"),
        (products_lib, "merges_keys_and_values"),
        (rules, "merges_keys_and_values"),
    ):
        monkeypatch.setattr(module, name, lambda: by_matrix)
    mesh = make_mesh(MeshConfig(data=4, fsdp=64), topology_devices("v5e:16x16"))
    config = dataclasses.replace(CONFIG, width=3584, heads=28, dtype="bfloat16")
    square = {"kernel": (3584, 3584)}
    shapes = {
        "self_attention": {"qkv_kernel": (3584, 3, 28, 128), "proj": square},
        "cross_attention": {"q": square, "kv_kernel": (3584, 2, 28, 128)},
    }
    params = {"transformer": {"block_0": shapes}}
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x, jnp.float32), params, is_leaf=lambda x: type(x) is tuple)
    params = with_shardings(params, param_shardings(params, mesh))

    def loss(params, x_BLC):
        gathered = gather("transformer", "block_0", jnp.bfloat16, jnp.bfloat16, {"params": params})["params"]
        kernels, others = gathered["self_attention"], gathered["cross_attention"]
        q, k, v = (to_heads(x_BLC, kernels["qkv_kernel"][:, part], config) for part in range(3))
        other_q = to_heads(x_BLC, others["q"]["kernel"], config)
        other_k, other_v = to_keys_and_values(x_BLC, others["kv_kernel"], config)
        x_BHLD = q * jnp.tanh(k) * jnp.sin(v) + other_q * jnp.tanh(other_k) * jnp.cos(other_v)
        out_BLC = from_heads(x_BHLD, kernels["proj"]["kernel"], config)
        return jnp.sum(jnp.square(out_BLC.astype(jnp.float32)))

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((256, 128, 3584), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(BATCH)))
        block = params["transformer"]["block_0"]
        places = jax.tree.map(lambda leaf: leaf.sharding, block)
        program = jax.jit(jax.grad(loss), out_shardings=places).lower(block, x).compile()
    found = compiled.collectives(hlo.parse(program.as_text()), mesh)
    sums = collections.Counter()
    for entry in found:
        sums[entry.kind] += entry.times * (entry.array.size // 3584**2)
    assert (sums["reduce-scatter"], sums["all-reduce"]) == ((7, 0) if by_matrix else (0, 7)), found


ONE, FSDP, ALL = {"data": 1}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}
SHARDED = {
    "int8": {"products": "int8", "products_backward": True},
    "fp8": {"products": "fp8", "products_backward": True},
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "bfloat16", "gradient_sums": "float32"},
}
PLACES = {
    "int8": {"one": ONE, "all": ALL},
    "fp8": {"one": ONE, "all": ALL},
    "bfloat16": {"fsdp": FSDP},
    "float32": {"one": ONE, "fsdp": FSDP},
}


def gradients(settings, sizes):
    """Gradients of kernels, biases and tokens on a mesh of eight devices, or on one."""
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: int(np.prod([*sizes.values()]))])
    config = dataclasses.replace(CONFIG, **settings)
    draw = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        gradient, params, shardings = mlp(config, mesh)
        params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), params)
        x = draw.normal(size=(16, 8, 16)).astype(np.float32)
        places = (shardings, NamedSharding(mesh, PartitionSpec(BATCH)))
        found = jax.jit(gradient, in_shardings=places, out_shardings=places)(params, x)
    return jax.tree.map(np.asarray, found)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Gradients by settings and mesh, from a process that has eight devices."""
    path = tmp_path_factory.mktemp("products") / "gradients.npz"
    environment = {**os.environ, "XLA_FLAGS": FLAGS}
    done = subprocess.run(
        [sys.executable, __file__, path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(path))


@pytest.mark.subprocess
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_eight_bits_on_a_mesh_are_those_of_one_device(results, name):
    """Scales are the same, over `tensor` too: what differs is the order of float32 sums."""
    for leaf in ("fc1", "fc2", "x"):
        one, sharded = results[f"{name}/one/{leaf}"], results[f"{name}/all/{leaf}"]
        # A value near a tie may round to the other side, which changes what follows from it by one step.
        assert np.linalg.norm(sharded - one) < {"int8": 1e-3, "fp8": 4e-3}[name] * np.linalg.norm(one), leaf


@pytest.mark.subprocess
def test_float32_sums_bring_sharded_gradients_nearer(results):
    """Of kernels, to those of one device: below a third of the distance that sums in bfloat16 have."""
    for leaf in ("fc1", "fc2"):

        def distance(name, leaf=leaf):
            one = results[f"float32/one/{leaf}"]
            return np.linalg.norm(results[f"{name}/fsdp/{leaf}"] - one) / np.linalg.norm(one)

        assert distance("bfloat16") > 1e-3 and distance("float32") < distance("bfloat16") / 3, leaf


if __name__ == "__main__":
    _found = {}
    for _name, _settings in SHARDED.items():
        for _mesh, _sizes in PLACES[_name].items():
            _params, _x = gradients(_settings, _sizes)
            for _leaf, _value in {"fc1": _params["fc1"]["kernel"], "fc2": _params["fc2"]["kernel"], "x": _x}.items():
                _found[f"{_name}/{_mesh}/{_leaf}"] = _value
    np.savez(sys.argv[1], **_found)


@pytest.mark.parametrize("by_matrix", [False, True])
def test_heads_are_the_same_whether_matmuls_order_them_or_a_copy(operands, monkeypatch, by_matrix):
    """As on CPUs, and as on GPUs and TPUs, some of which scatter matrices; gradients, too."""
    x_BLC = operands[0]
    draw = np.random.default_rng(1)
    kernel_CHD = draw.normal(size=(WIDTH, 2, 8)).astype(np.float32)
    kernel_CI, kernel_IC = draw.normal(size=(2, WIDTH, WIDTH)).astype(np.float32)
    kernel_C2HD = draw.normal(size=(WIDTH, 2, 2, 8)).astype(np.float32)

    def all_kinds(x_BLC, *kernels):
        x_BHLD, y_BHLD = (to_heads(x_BLC, kernel, CONFIG) for kernel in kernels[:2])
        k_BHLD, v_BHLD = to_keys_and_values(x_BLC, kernels[2], CONFIG)
        return x_BHLD, y_BHLD, k_BHLD, v_BHLD, from_heads(x_BHLD * y_BHLD + k_BHLD * v_BHLD, kernels[3], CONFIG)

    def outputs(by_matmuls, by_matrix):
        monkeypatch.setattr(products_lib, "matmuls_order_heads", lambda: by_matmuls)
        for name in ("scatters_matrices", "merges_keys_and_values"):
            monkeypatch.setattr(products_lib, name, lambda: by_matrix)
        found, pull = jax.vjp(all_kinds, x_BLC, kernel_CHD, kernel_CI, kernel_C2HD, kernel_IC)
        return jax.tree.leaves((found, pull(found)))

    assert outputs(True, by_matrix)[0].shape == (2, 2, TOKENS, 8)
    for one, other in zip(outputs(True, by_matrix), outputs(False, False), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(one).max())
