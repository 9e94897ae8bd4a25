"""TPU topologies for ahead-of-time compilation: libtpu describes their devices on any CPU."""

import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from varedit_jax.errors import UserError

# Chips along each side of the largest slice that is sold, and the rule by which a side wraps around: "cube" if every
# side is a multiple of 4 (the switches join cubes of 4 x 4 x 4), "full" if a side is as long as the largest slice.
_VERSIONS: dict[str, tuple[tuple[int, ...], str]] = {
    "v4": ((16, 16, 16), "cube"),
    "v5p": ((16, 16, 24), "cube"),
    "v5e": ((16, 16), "full"),
    "v6e": ((16, 16), "full"),
    "tpu7x": ((16, 16, 36), "cube"),
}
# libtpu looks for a TPU host when it loads, and (0.0.42) waits for a metadata server that a CPU machine does not have.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs, so there is no conflict
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def topology_devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a TPU topology, to make a mesh of and to compile for; nothing can run on them.

    Args:
      topology: version and chips along each side, as in "v5p:4x4x4", "v5e:16x16" or "v6e:16x16".
      slices: number of such slices, joined by DCN.

    Raises:
      UserError: if libtpu is not installed or does not know the topology.
    """
    version, sides = parse_topology(topology)
    if slices < 1:
        raise UserError(f"{slices} slices; give at least 1")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU takes libtpu, which is not installed: pip install 'varedit-jax[tpu]'")
    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    # Two chips and one chip have machines of their own size.
    hosts = tuple(min(side, most) for side, most in zip((*sides, 1)[:3], (2, 2, 1), strict=True))
    more = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(
            f"{version}:{'x'.join(map(str, sides))}",
            "tpu",
            wrap=_wraps(version, sides),
            chips_per_host_bounds=hosts,
            **more,
        )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise UserError(f"topology {topology!r}: {reason.splitlines()[0]}") from error
    return list(found.devices)


def parse_topology(topology: str) -> tuple[str, tuple[int, ...]]:
    """("v5p", (4, 4, 4)) of "v5p:4x4x4". Raises UserError for another form, version, or size."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    if not match or match[1] not in _VERSIONS:
        raise UserError(
            f"topology {topology!r} is unknown; give VERSION:SIDES with a version of {', '.join(_VERSIONS)}, "
            f"as in v5p:4x4x4, v5e:16x16 or v6e:16x16"
        )
    version, sides = match[1], tuple(map(int, match[2].split("x")))
    largest = _VERSIONS[version][0]
    if len(sides) != len(largest) or not all(1 <= side <= most for side, most in zip(sides, largest, strict=True)):
        raise UserError(
            f"topology {topology!r}: a slice of {version} has {len(largest)} sides of at most "
            f"{'x'.join(map(str, largest))} chips"
        )
    return version, sides


def chips(topology: str, slices: int = 1) -> int:
    """Number of chips. Raises UserError as `parse_topology`."""
    return slices * math.prod(parse_topology(topology)[1])


def _wraps(version: str, sides: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """True for each side whose links close a ring; the compiler's choice of collectives depends on it."""
    largest, rule = _VERSIONS[version]
    if rule == "cube":
        closed = [all(side % 4 == 0 for side in sides)] * 3
    else:
        closed = [*(side == most for side, most in zip(sides, largest, strict=True)), False]
    return closed[0], closed[1], closed[2]
