"""What of the collectives a schedule leaves exposed, on text as the TPU's compiler writes it, with times by hand.

The links are such that a gather of the 1 MiB array, of which a chip sends three quarters, takes 1000 ns on all four of
them, and a cycle is 1 ns.
"""

import pathlib

import numpy as np
import pytest
from jax.sharding import Mesh

from varedit_jax.analysis import hlo, timeline
from varedit_jax.analysis.links import Links
from varedit_jax.parallel.topology import topology_devices

pytestmark = pytest.mark.tpu

TEXT = (pathlib.Path(__file__).parents[2] / "data" / "hlo" / "overlap.txt").read_text()
NS = 1e-9
MIB = 2**20
LINKS = Links(count=4, bandwidth=0.75 * MIB / 4 / (1000 * NS), ring_directions=2)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(topology_devices("v5e:2x2"), object), ("fsdp",))


def walk(text, mesh, links=LINKS):
    module = hlo.parse(text)
    cycles = {(name, x.name): x.cycles * NS for name in module.schedules() for x in module.computations[name].values()}
    return timeline.walk(module, mesh, links, cycles)


def only(*names):
    """The program with these instructions of its entry alone, in this order, behind the parameters and a tuple."""
    head, entry = TEXT.split("ENTRY ")
    lines = {line.split(" = ")[0].strip(" %"): line for line in entry.splitlines()[1:-1]}
    chosen = [lines[name] for name in ("x", "w", "tuple.4", *names)]
    return "\n".join([head, f"ENTRY {entry.splitlines()[0]}", *chosen, "}"])


CHAIN = ("begin", "part", "whole", "step.1", "copy.1", "while.1", "end")


@pytest.mark.parametrize(
    ("names", "kind", "seconds", "exposed"),
    [
        # 300 ns in the fusion between, twice 100 in that of the loop; the copy of 5000 does not drive the links.
        (CHAIN, timeline.GATHERS, 1000, 500),
        ((*CHAIN[:4], "copy.1", "end"), timeline.GATHERS, 1000, 700),
        (("all-gather-start.1", "copy.2", "all-gather-done.1"), timeline.GATHERS, 1000, 600),
        (("all-gather.5", "copy.3", "bitcast.1", "copy.4"), timeline.GATHERS, 1000, 1000),
        # Two colors on a SparseCore, one way each: half of the links.
        (("all-gather.6.call-start", "copy.5", "all-gather.6.call-done"), timeline.GATHERS, 2000, 500),
        (
            ("all-gather.6.call-start", "copy.5", "copy.2", "copy.3", "all-gather.6.call-done"),
            timeline.GATHERS,
            2000,
            0,
        ),
        (("scatter.1",), timeline.SCATTERS, 2000, 2000),  # one color, both ways around
        # Two rounds of a permute of 256 KiB over one link, 1333.3 ns, behind 1000 ns.
        (("while.2",), timeline.SCATTERS, 2 * 4000 / 3, 2 * 1000 / 3),
    ],
)
def test_ways_of_overlap(mesh, names, kind, seconds, exposed):
    found = walk(only(*names), mesh)
    assert set(found.traffic) == {kind}
    assert found.traffic[kind].seconds == pytest.approx(seconds * NS)
    assert found.traffic[kind].exposed == pytest.approx(exposed * NS, abs=1e-12)
    share = found.traffic[kind].exposed_bytes / found.traffic[kind].bytes
    assert share == pytest.approx(exposed / seconds, abs=1e-6)
    assert found.seconds == pytest.approx(found.compute + exposed * NS)


def test_compute_before_the_first_use(mesh):
    """The gather that stops the cores has 250 ns of other work behind it before the copy of it."""
    found = walk(only("all-gather.5", "copy.3", "bitcast.1", "copy.4"), mesh)
    assert found.traffic[timeline.GATHERS].before_use == pytest.approx(250 * NS)
    assert found.compute == pytest.approx(300 * NS)


def test_a_whole_program(mesh):
    """All of these one after the other: times and bytes add up."""
    found = walk(TEXT, mesh)
    gathers, scatters = found.traffic[timeline.GATHERS], found.traffic[timeline.SCATTERS]
    assert (gathers.count, scatters.count) == (4, 3)
    assert gathers.bytes == 4 * MIB and scatters.bytes == MIB + 2 * MIB / 4
    assert gathers.exposed == pytest.approx((500 + 600 + 1000 + 500) * NS)
    assert scatters.exposed == pytest.approx((2000 + 2000 / 3) * NS)
    assert found.compute == pytest.approx((300 + 5000 + 200 + 400 + 250 + 50 + 1500 + 2000) * NS)


def test_transfers_share_the_links(mesh):
    """Two begun together: on half of the links each they take as long as one, on all of them they queue."""
    second = "  %all-gather.7.call-start = (bf16[1024,512]) call-start(%w, %x), to_apply=%on_sparse_core"
    done = "  %all-gather.7.call-done = bf16[1024,512] call-done(%all-gather.7.call-start)"
    names = ("all-gather.6.call-start", "copy.5", "copy.3", "copy.2", "all-gather.6.call-done")
    lines = only(*names).splitlines()
    start = next(index for index, line in enumerate(lines) if "call-start" in line)
    both = "\n".join([*lines[: start + 1], second, *lines[start + 1 : -1], done, "}"])
    assert walk(both, mesh).exposed == 0
    assert walk(both.replace('"1500"', '"500"'), mesh).exposed == pytest.approx(
        850 * NS
    )  # the second goes on meanwhile
    # On twice the colors each, 1000 ns, one after the other; 2150 ns of compute cover both, 1150 ns do not.
    rings = both.replace('"color_strategies":[', '"color_strategies":[{"phase_rings":[]},{"phase_rings":[]},')
    assert walk(rings, mesh).exposed == pytest.approx(0, abs=1e-12)
    assert walk(rings.replace('"1500"', '"500"'), mesh).exposed == pytest.approx(850 * NS)


@pytest.mark.parametrize(
    ("strategy", "used"),
    [
        ("StrategyRing{colors:1 phases:1", 2),
        ("StrategyND{colors:3 phases:3", 4),  # no more than there are
        ("UniDirectionNDRingStrategy{colors:3 phases:2", 3),
        ('"emitter":"2DAllGatherOnMajorDim"', 4),
        ('"emitter":"1DAllGatherOnMajorDim"', 2),
        ("", 4),
    ],
)
def test_links_by_strategy(mesh, strategy, used):
    module = hlo.parse(only("all-gather.5"))
    gather = module.computations[module.entry]["all-gather.5"]
    (part,) = timeline.compiled.parts(module, gather, module.entry, mesh)
    assert LINKS.used(part, strategy) == used
    one_way = Links(4, LINKS.bandwidth, 1)
    assert one_way.used(part, "StrategyRing{colors:1") == 1 and one_way.used(part, "UniDirectionRing") == 4
