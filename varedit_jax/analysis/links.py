"""The time of collectives by a model of the links between chips, with the compiler's own choice of rings.

The compiler writes its strategy beside a collective. A "color" is a part of the array that goes around rings of its
own, so that more colors use more links:

  - `UniDirection...`, and the rings of a SparseCore: a color sends one way; in three dimensions there are six
  - `StrategyRing`, `StrategyND`: a color sends both ways, for in three dimensions there are three; but that is an
    assumption, `ring_directions`
  - `3DAllGatherOnMajorDim` states no colors; it is taken to use all links of three dimensions, `2D...` of two
"""

import dataclasses
import re

from varedit_jax import hardware
from varedit_jax.analysis.compiled import Collective
from varedit_jax.analysis.hlo import Instruction


@dataclasses.dataclass(frozen=True)
class Links:
    """Links of a device, and what is assumed of them."""

    count: int  # to neighbors
    bandwidth: float  # bytes/s of one link, one way, as achieved
    ring_directions: float  # in which a color of a ring sends, 1 or 2

    def used(self, collective: Collective, strategy: str) -> float:
        """The links that a collective sends on at once; `strategy` of `strategy_of`."""
        if collective.kind == "collective-permute":  # to one chip, by the shortest way, taken to be one link
            return 1
        colors = re.search(r"(\w*Strategy\w*)\{colors:(\d+)", strategy)
        dimensions = re.search(r'"emitter":"(\d)D', strategy)
        if colors:
            directions = 1 if colors[1].startswith("UniDirection") else self.ring_directions
            used = int(colors[2]) * directions
        elif '"phase_rings"' in strategy:
            used = strategy.count('"phase_rings"')
        elif dimensions:
            used = 2 * int(dimensions[1])
        else:
            used = self.count
        return min(used, self.count)

    def seconds(self, collective: Collective, strategy: str) -> float:
        """Of one run of one array of a collective, alone on the links."""
        each = collective.moved / collective.times
        if collective.kind == "all-to-all":  # in every dimension of a torus a quarter of its ring is passed, on average
            dimensions = self.count / 2
            each *= max(1.0, dimensions * collective.group ** (1 / dimensions) / 4)
        return each / (self.bandwidth * self.used(collective, strategy))


def of_chip(chip: hardware.Chip, share: float, ring_directions: float) -> Links:
    """The links of one JAX device of `chip`, which reach `share` of their nominal speed."""
    return Links(chip.links, share * nominal(chip), ring_directions)


def nominal(chip: hardware.Chip) -> float:
    """Bytes/s of one link of one JAX device, one way."""
    return chip.link_bandwidth / chip.devices / 2 / chip.links


def strategy_of(instruction: Instruction, holder: Instruction) -> str:
    """What the compiler printed on the rings of a collective that the scheduled instruction `holder` is or has."""
    for text in (instruction.text, holder.text):
        found = re.search(r'"collective_(?:algorithm|offload)_config":\{.*', text)
        if found:
            return found[0]
    return ""
