"""The time of collectives by a model of the links between chips, with the compiler's own choice of rings.

The compiler writes its strategy beside a collective. A "color" is a part of the array that goes around a ring of its
own. `StrategyRing` and `StrategyND` have colors that are taken to send both ways around (`ring_directions` of the
assumptions); a `UniDirection...` strategy says that its colors do not. Gathers with the emitter `3DAllGatherOnMajorDim`
state no colors: they are taken to use every link of the torus.
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

    def used(self, strategy: str) -> float:
        """The links that a collective sends on at once, of the attributes the compiler printed."""
        color = re.search(r"(\w*Strategy\w*)\{colors:(\d+)", strategy)
        if color:
            directions = 1 if color[1].startswith("UniDirection") else self.ring_directions
            return min(int(color[2]) * directions, self.count)
        return self.count

    def seconds(self, collective: Collective, strategy: str) -> float:
        """Of one run of one array of a collective, alone on the links."""
        each = collective.moved / collective.times
        if collective.kind == "collective-permute":  # to one chip, by the shortest way, taken to be one link
            return each / self.bandwidth
        if collective.kind == "all-to-all":  # in every dimension of a torus a quarter of its ring is passed, on average
            dimensions = self.count / 2
            each *= max(1.0, dimensions * collective.group ** (1 / dimensions) / 4)
        return each / (self.bandwidth * self.used(strategy))


def of_chip(chip: hardware.Chip, share: float, ring_directions: float) -> Links:
    """The links of one JAX device of `chip`, which reach `share` of their nominal speed."""
    one_way = chip.link_bandwidth / chip.devices / 2 / chip.links
    return Links(chip.links, one_way * share, ring_directions)


def strategy_of(instruction: Instruction, holder: Instruction) -> str:
    """What the compiler printed on the rings of a collective that the scheduled instruction `holder` is or has."""
    for text in (instruction.text, holder.text):
        found = re.search(r'"collective_algorithm_config":\{.*', text)
        if found:
            return found[0]
    return ""
