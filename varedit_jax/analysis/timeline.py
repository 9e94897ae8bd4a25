"""The schedule of a compiled step walked in order: compute, collectives behind it, and what of them is exposed.

The compiler's order is kept. There are two resources, the cores and the links. How a program for a TPU (libtpu 0.0.42)
says that a collective runs behind compute:

  - `all-gather-start` ... `all-gather-done`, `collective-permute-start`, `async-start` (SparseCore): what is scheduled
    between them covers it
  - an asynchronous collective fusion: the collective is printed in several fusions, with one `chain_id` and channel. The
    first holds `AsyncCollectiveStart`, the last `AsyncCollectiveDone`; the links are driven by the cores inside of the
    fusions between them, so that only the compute of these covers it
  - everything else stops the cores: it is exposed. `async_collective_name` on a gather does not make it asynchronous.

Gathers and scatters of a "windowed" product are permutes in a loop of parts of the product; they count as what they
replace.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping

from jax.sharding import Mesh

from varedit_jax.analysis import compiled
from varedit_jax.analysis.hlo import Instruction, Module
from varedit_jax.analysis.links import Links, strategy_of

GATHERS, SCATTERS = "all-gather", "reduce-scatter"
_WINDOWED = {"windowed_dot_general_body_ag": GATHERS, "windowed_dot_general_body_rs": SCATTERS}


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind, per step."""

    count: float = 0
    bytes: float = 0  # of the whole arrays
    seconds: float = 0  # of the links
    exposed: float = 0  # seconds in which the cores wait for them
    covered_bytes: float = 0  # bytes that move under compute
    before_use: float = 0  # seconds of compute between an exposed one and its first use, up to its own


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A step."""

    compute: float  # seconds of the cores
    traffic: dict[str, Traffic]  # by kind

    @property
    def exposed(self) -> float:
        """Seconds in which the cores wait for the links."""
        return sum(entry.exposed for entry in self.traffic.values())

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.compute + self.exposed


@dataclasses.dataclass(kw_only=True)
class _Transfer:
    kind: str
    bytes: float
    total: float  # seconds, alone on its links
    left: float
    links: float
    only: str = ""  # the channel whose fusions alone drive it; "": any compute


class _Walk:
    def __init__(self, module: Module, mesh: Mesh, links: Links, seconds: Callable[[Instruction, str], float]):
        self.module, self.mesh, self.links, self.seconds = module, mesh, links, seconds
        self.traffic: dict[str, Traffic] = collections.defaultdict(Traffic)
        self.compute = 0.0

    def computation(self, name: str, times: int) -> float:
        """Seconds of one run of a computation, which runs `times` times a step; adds to the sums."""
        flight: dict[str, list[_Transfer]] = {}  # by what ends it: the starting instruction, or the channel
        took = 0.0
        entries = list(self.module.computations[name].values())
        costs = [self._cost(entry, name, times) for entry in entries]
        for place, (entry, cost) in enumerate(zip(entries, costs, strict=True)):
            begun, channel, ends = self._found(entry, name)
            self._count(begun, times)
            asynchronous = entry.opcode.endswith("-start") or channel
            if begun and asynchronous:
                flight[channel or entry.name] = begun
            elif begun:
                took += self._wait(begun, flight, times)
                self._before_use(entry, entries, costs, place, begun, times)
            self._advance(cost, flight, channel)
            took += cost
            key = channel if ends else entry.operands[0] if entry.opcode.endswith("-done") and entry.operands else ""
            if key in flight:
                took += self._wait(flight.pop(key), flight, times)
        for left in list(flight.values()):  # ends in another computation
            took += self._wait(left, {}, times)
        return took

    def _cost(self, entry: Instruction, name: str, times: int) -> float:
        bodies = self.module.scheduled(entry)
        if bodies:
            rounds = self.module.rounds(entry)
            return sum(rounds * self.computation(body, times * rounds) for body in bodies)
        cost = self.seconds(entry, name)
        self.compute += times * cost
        return cost

    def _found(self, entry: Instruction, name: str) -> tuple[list[_Transfer], str, bool]:
        """The collectives that begin with an instruction, the channel of a chain it drives, and if it ends that."""
        begun: list[_Transfer] = []
        inner = [(entry, name), *self.module.inside(entry)]
        target = {
            instruction.attribute(r'custom_call_target="(AsyncCollective\w+)"')
            for instruction, _ in inner
            if instruction.opcode == "custom-call"
        }
        driven = ""
        for instruction, computation in inner:
            channel = compiled.chain(instruction)
            if channel:
                driven = channel
                if "AsyncCollectiveStart" not in target:
                    continue
            strategy = strategy_of(instruction, entry)
            for part in compiled.parts(self.module, instruction, computation, self.mesh):
                total = self.links.seconds(part, strategy)
                kind = next((_WINDOWED[key] for key in _WINDOWED if key in name), part.kind)
                used = 1 if part.kind == "collective-permute" else self.links.used(strategy)
                begun.append(_Transfer(kind=kind, bytes=part.bytes, total=total, left=total, links=used, only=channel))
        return begun, driven, "AsyncCollectiveDone" in target

    def _count(self, begun: list[_Transfer], times: int) -> None:
        for kind in {transfer.kind for transfer in begun}:
            self.traffic[kind].count += times
        for transfer in begun:
            sums = self.traffic[transfer.kind]
            sums.bytes += times * transfer.bytes
            sums.seconds += times * transfer.total
            sums.covered_bytes += times * transfer.bytes  # until it is waited for

    def _advance(self, seconds: float, flight: Mapping[str, list[_Transfer]], channel: str) -> None:
        """Lets the links work for some time, in the order in which the transfers began, in parallel where they fit."""
        free = float(self.links.count)
        for transfer in (entry for group in flight.values() for entry in group):
            if transfer.left and transfer.only in ("", channel) and transfer.links <= free:
                free -= transfer.links
                transfer.left = max(0.0, transfer.left - seconds)

    def _wait(self, ending: list[_Transfer], flight: Mapping[str, list[_Transfer]], times: int) -> float:
        """Seconds until transfers have ended, one after the other; they are exposed. Others go on."""
        waited = 0.0
        for transfer in ending:
            sums = self.traffic[transfer.kind]
            sums.exposed += times * transfer.left
            if transfer.total:
                sums.covered_bytes -= times * transfer.bytes * transfer.left / transfer.total
            waited += transfer.left
            self._advance(transfer.left, flight, "")
        return waited

    def _before_use(
        self,
        entry: Instruction,
        entries: list[Instruction],
        costs: list[float],
        place: int,
        begun: list[_Transfer],
        times: int,
    ) -> None:
        """Compute between a synchronous collective and the first instruction that needs it."""
        names, between = {entry.name}, 0.0
        for later, cost in zip(entries[place + 1 :], costs[place + 1 :], strict=True):
            if names & set(later.operands):
                if later.opcode not in ("bitcast", "get-tuple-element", "tuple"):
                    break
                names.add(later.name)
            between += cost
        for transfer in begun:
            self.traffic[transfer.kind].before_use += times * min(between, transfer.total)


def walk(module: Module, mesh: Mesh, links: Links, seconds: Callable[[Instruction, str], float]) -> Timeline:
    """The timeline of a scheduled program; `seconds` of one run of an instruction of a computation, on the cores."""
    state = _Walk(module, mesh, links, seconds)
    state.computation(module.entry, 1)
    return Timeline(state.compute, dict(state.traffic))
