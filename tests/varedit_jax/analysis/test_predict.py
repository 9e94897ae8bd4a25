"""The prediction of a step: sums by kind, range, moves, bounds, and its lines for people, with sums by hand."""

import dataclasses
import pathlib

import numpy as np
import pytest
from jax.sharding import Mesh

from varedit_jax import hardware
from varedit_jax.analysis import hlo, predict
from varedit_jax.errors import UserError
from varedit_jax.parallel.topology import topology_devices

pytestmark = pytest.mark.tpu

DATA = pathlib.Path(__file__).parents[2] / "data" / "hlo"
# 1 cycle is 1 ns; a link's nominal speed is such that a gather of overlap.txt takes 900 ns on all four of them.
CHIP = hardware.Chip(
    name="test",
    tflops=100,
    hbm_bytes=1,
    hbm_bandwidth=1e9,
    link_bandwidth=2 * 0.75 * 2**20 / 900e-9,
    clock=1e9,
    links=4,
)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(topology_devices("v5e:2x2"), object), ("fsdp",))


def predicted(name, mesh, chip=CHIP):
    module = hlo.parse((DATA / name).read_text())
    return predict.predict(module, chip, mesh, model_tflop=0.001, transformer_tflop=0.0005)


@pytest.fixture(scope="module")
def work(mesh):
    return predicted("work.txt", mesh)


@pytest.fixture(scope="module")
def overlap(mesh):
    return predicted("overlap.txt", mesh)


def test_kinds_add_up(work):
    """The compiler's cycles, and the kernels' operations over the assumed share of peak."""
    kinds = work["seconds_by_kind"]
    assert kinds["matmul"] == pytest.approx(3000e-9) and kinds["elementwise"] == pytest.approx(1040e-9)
    assert kinds["move"] == pytest.approx((600 + 300 + 1200 + 450) * 1e-9) and kinds["exposed collectives"] == 0
    tile = 3 * 4 * 28 * 2 * 1024 * 1536 * 128 / 100e12  # all tiles, as no mask is given: seconds of a matmul at peak
    assert kinds["kernel"] == pytest.approx(tile * (2 / 0.6 + 7 / 0.5), rel=1e-3)
    assert work["seconds"] == pytest.approx(sum(kinds.values()), rel=1e-3)
    assert work["moves_share"] == pytest.approx(kinds["move"] / work["seconds"], rel=1e-3)
    assert [row["kernel"] for row in work["kernels"]] == ["dkv", "dq", "fwd"]


def test_range_and_mfu(work):
    """Best and worst share of peak in the kernels; MFU over the peak of four devices."""
    kernel = work["seconds_by_kind"]["kernel"] / (2 / 0.6 + 7 / 0.5)
    rest = work["seconds"] - work["seconds_by_kind"]["kernel"]
    low, high = work["seconds_range"]
    assert low == pytest.approx(rest + kernel * (2 / 0.7 + 7 / 0.65), rel=2e-3) and low < work["seconds"] < high
    assert high == pytest.approx(rest + kernel * (2 / 0.45 + 7 / 0.4), rel=2e-3)
    assert work["mfu_with_encoders"] == pytest.approx(0.001 / 400 / work["seconds"], rel=2e-3)
    assert work["mfu"] == pytest.approx(work["mfu_with_encoders"] / 2, rel=2e-3)
    assert work["mfu_with_encoders_range"] == pytest.approx([0.001 / 400 / high, 0.001 / 400 / low], rel=2e-3)


def test_moves_by_place(work):
    """Largest first, those of one place, operation and shape in one row."""
    first, second, *_ = work["worst_moves"]
    assert first == {
        "seconds": 1.65e-06,
        "seconds_at_peak": 0.0,
        "times": 6,
        "operation": "copy",
        "shape": "bf16[512,512]",
        "place": "backward Transformer._blocks/blocks/mlp/dot_general",
        "instruction": "copy.1",
    }
    assert (second["operation"], second["place"]) == (
        "padded_slice_fusion",
        "forward Transformer._blocks/blocks/mlp/_pad/pad",
    )
    assert work["moves_by_operation"] == {"copy": 1.65e-06, "padded_slice_fusion": 6e-07, "save_fusion": 3e-07}


def test_elementwise_by_place(work):
    """All that is neither moved nor multiplied, by the same rows."""
    rows = work["worst_elementwise"]
    assert sum(row["seconds"] for row in rows) == pytest.approx(work["seconds_by_kind"]["elementwise"], rel=1e-3)
    assert [row["seconds"] for row in rows] == sorted((row["seconds"] for row in rows), reverse=True)
    assert not {row["instruction"] for row in rows} & {row["instruction"] for row in work["worst_moves"]}


def test_matmuls(work):
    """How far the compiler thinks they are from peak."""
    at_peak = 3 * 2 * 512**3 / 100e12
    assert work["matmul_share_of_peak"] == pytest.approx(at_peak / 3000e-9, rel=1e-3)
    (row,) = work["worst_matmuls"]
    assert row["seconds_at_peak"] == pytest.approx(at_peak, rel=1e-3) and row["instruction"] == "matmul.1"


def test_collectives(overlap):
    """At nine tenths of the links' speed the gathers take 1000 ns: what test_timeline.py has exposed of them."""
    gathers, scatters = overlap["collectives"]["all-gather"], overlap["collectives"]["reduce-scatter"]
    assert gathers["count"] == 4 and gathers["exposed_seconds"] == pytest.approx(2600e-9)
    assert overlap["exposed_gathers_share"] == pytest.approx((0.5 + 0.6 + 1 + 0.25) / 4, rel=1e-3)
    # 1 MiB exposed of that, and a quarter of twice a quarter MiB.
    assert overlap["exposed_scatters_share"] == pytest.approx(1.125 / 1.5, rel=1e-3)
    exposed = gathers["exposed_seconds"] + scatters["exposed_seconds"]
    assert overlap["seconds_by_kind"]["exposed collectives"] == pytest.approx(exposed, rel=1e-3)
    assert overlap["seconds"] == pytest.approx(9700e-9 + exposed, rel=1e-3)


def test_worst_case_of_the_links(overlap, mesh):
    """A ring that sends one way takes twice as long."""
    slow = dataclasses.replace(CHIP, link_bandwidth=CHIP.link_bandwidth / 1e3)
    found = predicted("overlap.txt", mesh, slow)
    low, high = found["seconds_range"]
    scatter = 2000e-6
    others = found["seconds"] - scatter
    assert low == pytest.approx(found["seconds"] * 0.9 / 0.95, rel=0.01)
    assert high == pytest.approx((others + 2 * scatter) * 0.9 / 0.8, rel=0.01)
    assert overlap["seconds_range"][1] > overlap["seconds"] > overlap["seconds_range"][0]


def test_bounds(work, overlap):
    predict.check(work, max_moves=0.99, max_exposed_gathers=0.0)  # no gathers at all
    predict.check(overlap, max_moves=None, max_exposed_gathers=0.6)
    predict.check(overlap, max_moves=None, max_exposed_gathers=None)
    share = work["moves_share"]
    with pytest.raises(UserError, match=rf"moves take {share:.3f} of the predicted step, more than --max_moves=1e-09"):
        predict.check(work, max_moves=1e-9, max_exposed_gathers=None)
    with pytest.raises(UserError, match=r"0\.588 of the gathered bytes do not move under compute, .*=0\.1: 2\.6e-06 s"):
        predict.check(overlap, max_moves=None, max_exposed_gathers=0.1)


def test_lines(work, overlap):
    """Every assumption is named; the step, kinds, kernels and moves are there."""
    text = "\n".join(predict.lines(work))
    assert all(name in text for name in predict.ASSUMPTIONS) and "clock_ghz 1" in text
    assert text.startswith("predicted step: ") and "6 x copy bf16[512,512] in backward" in text
    assert "dkv         1024 x 1536     12 of 12" in text
    assert "all-gather            0.004 GiB      4 x" in "\n".join(predict.lines(overlap))


@pytest.mark.parametrize(
    ("chip", "units", "side"),
    [("TPU v4", 8, 128), ("TPU v5 lite", 4, 128), ("TPU v5", 8, 128), ("TPU v6 lite", 4, 256), ("TPU7x", 8, 256)],
)
def test_clocks_are_those_of_the_peak(chip, units, side):
    """To a hundredth: peak = matrix units x 2 x side^2 x clock."""
    found = hardware.chip(chip)
    assert units * 2 * side**2 * found.clock == pytest.approx(found.tflops * 1e12, rel=0.01)
