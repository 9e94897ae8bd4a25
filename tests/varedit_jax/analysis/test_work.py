"""Kinds, places and seconds of instructions, on text as the TPU's compiler writes it."""

import dataclasses
import pathlib

import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as info

from varedit_jax import hardware
from varedit_jax.analysis import hlo, work
from varedit_jax.config import preset
from varedit_jax.scales import editor_pyramid
from varedit_jax.transformer.visibility import Visibility, visibility_mask

DATA = pathlib.Path(__file__).parents[2] / "data" / "hlo"
MODULE = hlo.parse((DATA / "work.txt").read_text())
CHIP = hardware.Chip(name="test", tflops=100, hbm_bytes=1, hbm_bandwidth=1e9, link_bandwidth=1, clock=1e9, devices=2)
BODY = MODULE.computations["body.1"]

# Queries 1000 of 1024, keys 1300 of 1536: with tiles of 512 x 512 the mask shows three of two rows of three.
MASK = np.zeros((1000, 1300), bool)
MASK[:512, :512] = MASK[600:, 400:600] = True


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("matmul.1", work.MATMUL),  # in a fusion of a fusion, with a copy and a convert
        ("padded_slice_fusion.1", work.MOVE),  # masks by position are no arithmetic
        ("save_fusion.1", work.MOVE),  # nor is that of an index
        ("residual_fusion.1", work.ELEMENTWISE),  # an addition to what it slices is
        ("zeros_fusion.1", work.ELEMENTWISE),  # nothing is moved
        ("copy.1", work.MOVE),
    ],
)
def test_kinds(name, kind):
    assert work.kind_of(MODULE, BODY[name]) == kind


def test_a_collective_in_a_fusion_does_not_change_its_kind():
    module = hlo.parse((DATA / "overlap.txt").read_text())
    assert work.kind_of(module, module.computations[module.entry]["step.1"]) == work.MATMUL


def test_seconds():
    """Cycles over the clock, as often as the loop runs; kernels as their tiles; nothing without either."""
    found = work.pieces(MODULE, CHIP, [MASK], {"forward": 0.5, "backward": 0.25})
    cycles = {name: round(piece.seconds * 1e9) for (_, name), piece in found.items() if not piece.kernel}
    assert cycles == {
        "log.1": 80,
        "matmul.1": 3000,
        "padded_slice_fusion.1": 600,
        "save_fusion.1": 300,
        "residual_fusion.1": 900,
        "zeros_fusion.1": 60,
        "copy.1": 1200,
        "copy.2": 450,
    }
    kernels = {piece.kernel.name: piece for piece in found.values() if piece.kernel}
    # Tiles shown: of 512 x 512, three; of 256 x 512, two and twice two; of 512 x 256, two and two.
    tiles = {"fwd": 3 * 512 * 512, "dq": 6 * 256 * 512, "dkv": 4 * 512 * 256}
    matmuls = {"fwd": 2, "dq": 3, "dkv": 4}
    for name, piece in kernels.items():
        flops = 4 * 28 * matmuls[name] * 2 * tiles[name] * 128
        assert piece.kernel.flops([MASK]) == flops
        share = 0.5 if name == "fwd" else 0.25
        assert piece.seconds == pytest.approx(3 * flops / (share * 100e12 / 2)) and piece.kind == work.KERNEL
    assert set(kernels) == set(tiles)


def test_sizes_of_a_kernel():
    kernel = work.kernel_of(BODY["splash_mha_dq_no_residuals.3"])
    assert (kernel.rows, kernel.queries, kernel.keys, kernel.head_size) == (4 * 28, 1024, 1536, 128)
    assert (kernel.q_block, kernel.k_block, kernel.tiles) == (256, 512, 12)
    assert kernel.computed([MASK[:200], np.ones((1024, 1024), bool)]) == 12  # masks of other sizes do not count
    plain = BODY["splash_mha_dkv_segmented_no_residuals.3"]
    parts = hlo.Array("bf16", (4, 6, 28, 1024, 128))  # of dq
    fused = work.kernel_of(dataclasses.replace(plain, results=(*plain.results, parts)))
    assert work.kernel_of(plain).name == "dkv"
    assert fused.name == "dkv_fused" and fused.flops([]) == 4 * 28 * 5 * 2 * 1024 * 1536 * 128
    assert work.kernel_of(MODULE.computations[MODULE.entry]["other.1"]) is None


@pytest.mark.parametrize("conditioning", ["full", "sar"])
@pytest.mark.parametrize("aligned", [False, True])
def test_tiles_are_those_of_the_kernels_mask(conditioning, aligned):
    """As many as JAX's own table of the mask's blocks has that are not empty, for the masks of the model."""
    mask = visibility_mask(Visibility(editor_pyramid(preset("2b")), conditioning, aligned and conditioning == "sar"))
    blocks = (512, 384)
    queries, keys = (-(-size // block) * block for size, block in zip(mask.shape, blocks, strict=True))
    padded = np.pad(np.pad(mask, ((0, queries - len(mask)), (0, 0)), "edge"), ((0, 0), (0, keys - mask.shape[1])))
    kernel = work.Kernel(
        name="fwd", rows=1, queries=queries, keys=keys, head_size=128, q_block=blocks[0], k_block=blocks[1]
    )
    table, _ = info.process_mask(
        masks.MultiHeadMask([masks.NumpyMask(padded)]), blocks, head_shards=1, q_seq_shards=1, shrink_grid=False
    )
    assert kernel.computed([mask]) == np.count_nonzero(table.block_mask) < kernel.tiles


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("", "(no name)"),
        (
            "jit(step)/while/body/closed_call/jvp(Transformer.hidden)/Transformer._blocks/while/body/closed_call/blocks/"
            "self_attention/shard_map/vmap(static_sparsity_splash)/jit(_pad)/pad",
            "forward Transformer._blocks/blocks/self_attention/../pad",
        ),
        (
            "jit(step)/while/body/closed_call/transpose(jvp(Transformer.hidden))/Transformer._blocks/while/body/"
            "closed_call/checkpoint/blocks/mlp/dot_general",
            "backward Transformer._blocks/blocks/mlp/dot_general",
        ),
        ("jit(step)/transpose(jvp())/while/body/checkpoint/rematted_computation/mlp/reshape", "again mlp/reshape"),
        ("jit(step)/optimizer/sqrt", "outside optimizer/sqrt"),
    ],
)
def test_places(name, place):
    assert work.place_of(name) == place
