"""Every fast kernel equals plain attention and a dense mask, forward and backward, also on a mesh; who gets which."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.config import MeshConfig, TransformerConfig
from varedit_jax.parallel.constrain import merges_keys_and_values, scatters_matrices
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.scales import Pyramid, published_pyramid
from varedit_jax.transformer import kernels
from varedit_jax.transformer.attention import (
    attend,
    blocked_attention,
    cross_attention,
    grouped_attention,
    prefix_attention,
    splash_attention,
)
from varedit_jax.transformer.kernels import choose, cores
from varedit_jax.transformer.model import Transformer
from varedit_jax.transformer.visibility import SMALL_GROUP, Visibility, query_groups, visibility_mask

GRIDS = ((1, 1), (3, 2), (7, 9))
PYRAMID = Pyramid(GRIDS, GRIDS)
BLOCKS = {
    "finest": Visibility(PYRAMID, "finest", scale_aligned=False),
    "full": Visibility(PYRAMID, "full", scale_aligned=False),
    "sar, block 0": Visibility(PYRAMID, "sar", scale_aligned=True),
    "sar, others": Visibility(PYRAMID, "sar", scale_aligned=False),
}
BATCH, HEADS, SIZE = 2, 2, 8


def dense(q, k, v, visibility):
    """One product under the whole mask."""
    return attend(q, visibility.all_keys(k), visibility.all_keys(v), mask_LM=visibility_mask(visibility))


def splash(q, k, v, visibility, tokens=0):
    """The kernel, which may get more than the tokens it is of."""
    return splash_attention(q, k, v, visibility, tokens or q.shape[2], interpret=True)


KERNELS = {
    "plain": prefix_attention,
    "plain, scores recomputed": functools.partial(prefix_attention, remat=True),
    "blocked": blocked_attention,
    "splash": splash,
    "grouped": functools.partial(grouped_attention, implementation="xla", small=16),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks a sequence, as long ones have."""
    monkeypatch.setattr(kernels.splash, "LARGEST_BLOCK", 128)
    monkeypatch.setattr(kernels.blocked, "LARGEST_BLOCK", 25)


@pytest.fixture(scope="module")
def compare(quick_jit):
    """(output, gradients of q, k and v) of an attention function on random arrays; compiled once each."""

    @functools.cache
    def run(function, visibility, tokens):
        q, k, v, cotangent = np.random.default_rng(0).normal(size=(4, BATCH, HEADS, tokens, SIZE)).astype(np.float32)

        @quick_jit
        def both(q, k, v):
            out, pull = jax.vjp(lambda q, k, v: function(q, k, v, visibility), q, k, v)
            return out, pull(jnp.asarray(cotangent))

        return jax.tree.leaves(both(q, k, v))

    return run


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", BLOCKS)
def test_equals_a_dense_mask_forward_and_backward(compare, block, kernel):
    visibility = BLOCKS[block]
    tokens = visibility.source_tokens + PYRAMID.target_tokens
    wanted = compare(dense, visibility, tokens)
    found = compare(KERNELS[kernel], visibility, tokens)
    for name, x, y in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kernel", ["plain", "blocked", "splash", "grouped"])
@pytest.mark.parametrize("block", ["full", "sar, block 0"])
def test_the_source_alone_gives_what_it_gives_within_the_sequence(quick_jit, block, kernel):
    """As the sampler fills its caches."""
    visibility = BLOCKS[block]
    source = visibility.source_tokens
    q, k, v = np.random.default_rng(0).normal(size=(3, BATCH, HEADS, source + PYRAMID.target_tokens, SIZE))
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    alone = quick_jit(lambda *x: KERNELS[kernel](*x, visibility))(*(x[:, :, :source] for x in (q, k, v)))
    np.testing.assert_allclose(alone, dense(q, k, v, visibility)[:, :, :source], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", ["plain", "blocked", "splash", "cudnn"])
def test_attention_to_the_text_equals_a_dense_mask_forward_and_backward(quick_jit, kernel):
    """Texts of one token, of some and of all, in several blocks; gradients of what is padding are zero."""
    draw = np.random.default_rng(0)
    queries, text = 140, 150
    q, cotangent = draw.normal(size=(2, 3, HEADS, queries, SIZE)).astype(np.float32)
    k, v = draw.normal(size=(2, 3, HEADS, text, SIZE)).astype(np.float32)
    mask_BT = np.arange(text) < np.array([[1], [97], [text]])

    def both(function):
        @quick_jit
        def run(q, k, v):
            out, pull = jax.vjp(lambda *x: function(*x, mask_BT), q, k, v)
            return out, *pull(jnp.asarray(cotangent))

        return run(q, k, v)

    wanted = both(attend)
    found = both(functools.partial(cross_attention, kernel=kernel, remat=True, implementation="xla"))
    for name, x, y in zip(("output", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5, err_msg=name)
    assert np.any(found[2][1, :, :97]) and not np.any(found[2][1, :, 97:]) and not np.any(found[3][0, :, 1:])


def test_groups_of_the_published_pyramid():
    """512 px: the source, one masked product for scales of 1 to 144 tokens, and the four large scales alone."""
    pyramid = published_pyramid("0.25M")
    for aligned in (False, True):
        visibility = Visibility(pyramid, "sar", scale_aligned=aligned)
        tokens = visibility.source_tokens + pyramid.target_tokens
        groups = query_groups(visibility, tokens)
        assert [group.queries.stop - group.queries.start for group in groups] == [1024, 265, 256, 400, 576, 1024]
        assert [group.mask is not None for group in groups] == [False, True, False, False, False, False]
        assert [group.queries.start for group in groups[1:]] == [group.queries.stop for group in groups[:-1]]
        mask = visibility_mask(visibility)
        for group in groups:
            rebuilt = np.zeros_like(mask[group.queries])
            start = 0
            for keys in group.keys:
                size = keys.stop - keys.start
                rebuilt[:, keys] = True if group.mask is None else group.mask[:, start : start + size]
                start += size
            np.testing.assert_array_equal(rebuilt, mask[group.queries])
    assert [group.mask for group in query_groups(visibility, visibility.source_tokens)] == [None]
    assert SMALL_GROUP == 256


def test_what_follows_the_tokens_is_not_seen():
    """Padding of any value, as the residual stream has behind its tokens, changes nothing and gets no gradient."""
    visibility = BLOCKS["sar, block 0"]
    tokens = visibility.source_tokens + PYRAMID.target_tokens
    q, k, v = np.random.default_rng(0).normal(size=(3, BATCH, HEADS, tokens + 11, SIZE)).astype(np.float32)
    out, pull = jax.vjp(lambda *x: splash(*x, visibility, tokens)[:, :, :tokens], q, k, v)
    np.testing.assert_allclose(out, dense(*(x[:, :, :tokens] for x in (q, k, v)), visibility), rtol=0, atol=1e-5)
    for gradient in pull(jnp.ones(out.shape)):
        assert not np.any(gradient[:, :, tokens:]) and np.any(gradient[:, :, :tokens])


@pytest.mark.parametrize("cores", [1, 2])
def test_one_example_is_split_over_groups_of_heads(monkeypatch, cores):
    """A chip of two cores splits a kernel over its examples, of which there may be one."""
    monkeypatch.setattr(kernels.splash, "cores", lambda: cores)
    library = kernels.splash.splash_attention
    masks, make = [], library.make_splash_mha
    monkeypatch.setattr(library, "make_splash_mha", lambda mask, **more: masks.append(mask) or make(mask, **more))
    draw = np.random.default_rng(0)
    q, k, v = draw.normal(size=(3, 1, 4, 24, SIZE)).astype(np.float32)
    mask = np.tril(np.ones((24, 24), bool))
    found = kernels.splash.masked_attention(q, k, v, mask, interpret=True)
    assert [len(mask) for mask in masks] == [4 // cores]
    np.testing.assert_allclose(found, attend(q, k, v, mask_LM=mask), rtol=0, atol=1e-5)


def causal(blocks):
    """`Seen` of a square causal mask of `blocks` lanes."""
    return kernels.splash.seen_tiles(np.tril(np.ones((128 * blocks, 128 * blocks), bool)))


def test_seen_tiles_are_those_with_a_pair_that_may_attend():
    seen = causal(4)
    assert [seen(128, 128), seen(256, 256), seen(512, 512), seen(128, 512), seen(512, 128)] == [10, 3, 1, 4, 4]


@pytest.mark.parametrize("aspect", ["1.0", "0.75", "0.333"])
@pytest.mark.parametrize("aligned", [False, True])
def test_blocks_divide_the_sequence(aspect, aligned):
    visibility = Visibility(published_pyramid("0.25M", aspect), "sar", scale_aligned=aligned)
    mask = visibility_mask(visibility)
    shape = (kernels.splash.padded_tokens(len(mask), 3584), kernels.splash.padded_keys(mask.shape[1]))
    mask = np.pad(mask, [(0, more - size) for size, more in zip(mask.shape, shape, strict=True)], mode="edge")
    sizes = kernels.splash.block_sizes(mask)
    assert all(shape[0] % block == 0 for block in (sizes.block_q, sizes.block_q_dkv))
    assert all(shape[1] % block == 0 for block in (sizes.block_kv, sizes.block_kv_dkv))
    assert sizes.block_kv % sizes.block_kv_compute == 0 == sizes.block_kv_dkv % sizes.block_kv_dkv_compute
    assert min(sizes.block_q, sizes.block_kv, sizes.block_q_dkv, sizes.block_kv_dkv) >= 384


def test_skipping_is_weighed_against_steps(monkeypatch):
    """Where a step costs nothing the smallest blocks are best, where it costs much the fewest."""
    mask = np.tril(np.ones((1024, 1024), bool))
    monkeypatch.setattr(kernels.splash, "STEP_SCORES", 0)
    assert kernels.splash.forward_tiles(mask.shape, kernels.splash.seen_tiles(mask))[:2] == (128, 128)
    monkeypatch.setattr(kernels.splash, "STEP_SCORES", 10**7)
    assert kernels.splash.forward_tiles(mask.shape, kernels.splash.seen_tiles(mask))[:2] == (1024, 1024)


def test_a_sequence_is_padded_where_larger_blocks_pay():
    """29 is prime: 3,712 tokens would need blocks of 128."""
    assert [kernels.splash.padded_tokens(tokens, 3584) for tokens in (3545, 3629, 3640, 14617)] == [
        *(3584, 3840, 3840, 14720)
    ]


@pytest.fixture
def compile_for():
    """Pretends that a mesh of some platform's devices is set."""

    def mesh(platform, kind="some", num_cores=1, devices=1, tensor=1):
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=num_cores, platform=platform)
        axes = ("data", "fsdp", "tensor")
        types = (jax.sharding.AxisType.Auto,) * 3
        mesh = jax.sharding.AbstractMesh((1, devices, tensor), axes, types, abstract_device=device)
        return jax.sharding.use_abstract_mesh(mesh)

    return mesh


@pytest.mark.parametrize(
    "platform, head_size, dtype, wanted",
    [
        ("tpu", 128, "bfloat16", "splash"),
        ("tpu", 128, "float32", "splash"),
        ("tpu", 64, "bfloat16", "plain"),
        ("gpu", 128, "bfloat16", "cudnn"),
        ("gpu", 96, "bfloat16", "cudnn"),
        ("gpu", 100, "bfloat16", "plain"),
        ("gpu", 128, "float32", "plain"),
        ("cpu", 128, "bfloat16", "plain"),
    ],
)
def test_auto_is_the_fast_kernel_that_can_work(compile_for, platform, head_size, dtype, wanted):
    with compile_for(platform):
        assert choose("auto", head_size, dtype) == wanted
        assert choose("plain", head_size, dtype) == "plain"


def test_what_depends_on_the_chip_that_is_compiled_for(compile_for):
    assert cores() == 1 and not scatters_matrices()
    with compile_for("tpu", "TPU v5", num_cores=2, devices=4):
        assert cores() == 2 and not scatters_matrices()
    with compile_for("tpu", "TPU v5", num_cores=1):  # each core is a device
        assert cores() == 1
    for kind in ("TPU v5 lite", "TPU v6 lite"):
        with compile_for("tpu", kind, devices=4):
            assert cores() == 1 and scatters_matrices() and merges_keys_and_values()
        with compile_for("tpu", kind, devices=4, tensor=2):
            assert scatters_matrices() and not merges_keys_and_values()
        with compile_for("tpu", kind):  # nothing is scattered
            assert not scatters_matrices()


def test_a_kernel_that_was_asked_for_and_cannot_work_is_an_error(compile_for):
    assert choose("splash", 96, "bfloat16") == "splash"  # interpreted on a CPU, where any size works
    with compile_for("tpu"), pytest.raises(ValueError, match="'splash', which needs heads .* 128 channels, not 96"):
        choose("splash", 96, "bfloat16")
    with compile_for("gpu"), pytest.raises(ValueError, match="'cudnn', which needs .* 16 bits, .* not float32"):
        choose("cudnn", 128, "float32")
    with compile_for("gpu"), pytest.raises(ValueError, match="multiple of 8 channels, at most 128, not 256"):
        choose("cudnn", 256, "bfloat16")


def sharded_gradients():
    """Loss and gradients of a small transformer: plain on one device, splash on eight."""
    draw = np.random.default_rng(0)
    found = {}
    source, targets = PYRAMID.source_tokens("sar"), PYRAMID.target_tokens
    shapes = ((BATCH * 2, source, 4), (BATCH * 2, targets - 1, 4), (BATCH * 2, 5, 32))
    inputs = [draw.normal(size=shape).astype(np.float32) for shape in shapes]
    lengths = np.array([5, 3, 1, 4], np.int32)
    params = None
    for attention, sizes in (("plain", {}), ("splash", {"data": 2, "fsdp": 2, "tensor": 2})):
        config = TransformerConfig(
            depth=1, width=64, heads=4, token_bits=4, text_width=32, attention=attention, remat="named"
        )
        model = Transformer(config, PYRAMID)
        if params is None:
            abstract = jax.eval_shape(model.init, jax.random.key(0), *inputs, lengths)["params"]
            params = jax.tree.map(lambda x: (0.3 * draw.normal(size=x.shape)).astype(np.float32), abstract)

        def loss(params, model=model):
            return jnp.sum(jnp.square(model.apply({"params": params}, *inputs, lengths)))

        mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: 8 if sizes else 1])
        with jax.set_mesh(mesh):
            value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        leaves = jax.tree_util.tree_leaves_with_path({"loss": value, "gradient": gradient})
        found[attention] = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    return found


@pytest.mark.slow
@pytest.mark.subprocess
def test_kernels_on_eight_devices_equal_plain_attention_on_one(tmp_path):
    """A batch of 4 over data x fsdp, 4 heads and 133 tokens over tensor."""
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    one, eight = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("plain", "splash"))
    assert one.keys() == eight.keys()
    for path, value in one.items():
        scale = max(np.abs(value).max(), 1e-3)
        np.testing.assert_allclose(eight[path], value, rtol=0, atol=2e-5 * scale, err_msg=path)


if __name__ == "__main__":
    for _name, _arrays in sharded_gradients().items():
        np.savez(f"{sys.argv[1]}/{_name}.npz", **_arrays)
