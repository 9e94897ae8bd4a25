"""The prediction for GPUs by formula, from a program for TPUs, with sums by hand."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest
from jax.sharding import Mesh

from varedit_jax import hardware
from varedit_jax.analysis import hlo, predict, predict_gpu
from varedit_jax.errors import UserError
from varedit_jax.parallel.topology import topology_devices

pytestmark = pytest.mark.tpu

DATA = pathlib.Path(__file__).parents[2] / "data" / "hlo"
CHIP = hardware.Chip(name="test", tflops=100, hbm_bytes=1, hbm_bandwidth=1e12, link_bandwidth=8e11, clock=1e9, links=4)
GPU = hardware.Chip(name="GPU", tflops=200, hbm_bytes=1, hbm_bandwidth=2e12, link_bandwidth=6e11)


def predicted(name, devices="v5e:2x2"):
    devices = np.array(topology_devices(devices), object)
    module = hlo.parse((DATA / name).read_text())
    return predict_gpu.predict(module, CHIP, Mesh(devices, ("fsdp",)), 0.001, 0.0005, [], gpu=GPU)


def test_work():
    """Matmuls and attention by operations; elementwise work and a share of the moves by the bytes of memory."""
    found = predicted("work.txt")
    kinds = found["seconds_by_kind"]
    assert kinds["matmul"] == pytest.approx(3 * 2 * 512**3 / (0.65 * 200e12), rel=1e-3)
    rows, cut, matrix = 2 * 4 * 512, 2 * 4 * 384, 2 * 512 * 512  # bytes
    moves = 3 * (2 * cut + (2 * rows + 4) + 2 * 2 * matrix)  # a slice, a saved row, two copies
    elementwise = 3 * (3 * cut + rows) + 2 * matrix  # a residual sum of a slice, zeros; a logarithm
    assert kinds["move"] == pytest.approx(0.3 * moves / (0.75 * 2e12), rel=1e-3)
    assert kinds["elementwise"] == pytest.approx(elementwise / (0.75 * 2e12), rel=1e-3)
    tile = 3 * 4 * 28 * 2 * 1024 * 1536 * 128 / 200e12  # seconds of a matmul of all tiles at peak
    # dq and dkv have seven matmuls on the TPU, five on a GPU, in one kernel.
    assert kinds["kernel"] == pytest.approx(tile * (2 / 0.55 + 5 / 0.45), rel=1e-3)
    assert found["seconds"] == pytest.approx(sum(kinds.values()), rel=1e-3)
    assert found["mfu_with_encoders"] == pytest.approx(0.001 / 800 / found["seconds"], rel=1e-3)
    low, high = found["seconds_range"]
    assert low < found["seconds"] < high and found["moves_share"] == pytest.approx(
        kinds["move"] / found["seconds"], rel=1e-2
    )


def test_nothing_is_asked_of_the_tpus_compiler():
    """Without its cycles, and on a stand-in of another speed, the prediction is the same."""
    text = (DATA / "work.txt").read_text()
    bare = re.sub(r'"estimated_cycles":"\d+"', '"estimated_cycles":"0"', text)
    mesh = Mesh(np.array(topology_devices("v5e:2x2"), object), ("fsdp",))
    slow = dataclasses.replace(CHIP, hbm_bandwidth=1e9, tflops=1, clock=1.0)
    found = predict_gpu.predict(hlo.parse(bare), slow, mesh, 0.001, 0.0005, [], gpu=GPU)
    assert bare != text and found == predicted("work.txt")


def test_a_matmul_that_memory_bounds():
    """Two products of 512 x 512 with one column each: their bytes take longer than their operations."""
    text = """HloModule jit_step

ENTRY %main (a: bf16[512,512], b: bf16[512,1]) -> bf16[512,1] {
  %a = bf16[512,512]{1,0} parameter(0)
  %b = bf16[512,1]{1,0} parameter(1)
  %c = bf16[512,1]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %d = bf16[512,1]{1,0} dot(%a, %c), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    mesh = Mesh(np.array(topology_devices("v5e:2x2"), object), ("fsdp",))
    found = predict_gpu.predict(hlo.parse(text), CHIP, mesh, 0.001, 0.0005, [], gpu=GPU)
    moved = 2 * (2 * 512 * 512 + 2 * 2 * 512)
    assert found["seconds_by_kind"]["matmul"] == pytest.approx(moved / (0.75 * 2e12), rel=1e-3)


@pytest.mark.parametrize(("devices", "speed"), [("v5e:2x2", 3e11), ("v5e:4x4", 4e11 * 0.75)])
def test_collectives(devices, speed, monkeypatch):
    """Over NVLink within a node; over the node's network, where that is slower, beyond it; a fifth is exposed."""
    monkeypatch.setattr(predict_gpu, "ADAPTER", 0.75 * 50e9 if devices == "v5e:4x4" else 1.0)
    group = 4 if devices == "v5e:2x2" else None
    if group:
        found = predicted("overlap.txt", devices)
        sent = 0.75 * 5 * 2**20 + 2 * 2**18  # four gathers and a scatter of 1 MiB, a permute of 256 KiB twice
        assert found["seconds_by_kind"]["exposed collectives"] == pytest.approx(0.2 * sent / (0.8 * speed), rel=1e-3)
    found = predicted("work.txt", devices)
    assert found["assumptions"]["ring_gb_per_second"] == pytest.approx(speed / 1e9)


def test_it_says_what_it_is():
    found = predicted("work.txt")
    lines = predict.lines(found)
    assert lines[1] == "by formula, for 4 GPU, from the program of as many devices of test"
    assert all(any(name in line for line in lines) for name in predict_gpu.ASSUMPTIONS)
    predict.check(found, None, None)
    with pytest.raises(UserError, match="leave them out with --stand_in_for"):
        predict.check(found, 0.5, None)
