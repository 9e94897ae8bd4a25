"""The schedule of a compiled step walked in order: compute, collectives behind it, and what of them is exposed.

The compiler's order is kept. There are two resources, the cores and the links. How a program for a TPU (libtpu 0.0.42)
says that a collective runs behind compute:

  - `all-gather-start` ... `all-gather-done`, and the same of other kinds, of `async` and of `call` (to a SparseCore):
    what is scheduled between the two covers it
  - an asynchronous collective fusion: the collective is printed in several fusions, with one `chain_id` and channel.
    The first holds `AsyncCollectiveStart`, the last `AsyncCollectiveDone`; the links are driven by the cores inside of
    the fusions between these, also of a loop between them, so that the compute of these fusions alone covers it
  - everything else stops the cores: it is exposed. `async_collective_name` alone makes nothing asynchronous.

A "windowed" product has its gather or scatter as permutes in a loop over parts of the product; they count as what they
replace.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from jax.sharding import Mesh

from varedit_jax.analysis import compiled
from varedit_jax.analysis.hlo import Instruction, Module
from varedit_jax.analysis.links import Links, strategy_of

GATHERS, SCATTERS = "all-gather", "reduce-scatter"
_WINDOWED = {"windowed_dot_general_body_ag": GATHERS, "windowed_dot_general_body_rs": SCATTERS}


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind, per step."""

    count: int = 0
    bytes: float = 0  # of the whole arrays
    seconds: float = 0  # of the links
    exposed: float = 0  # seconds in which the cores wait for them
    exposed_bytes: float = 0  # that move in this time
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


def walk(module: Module, mesh: Mesh, links: Links, seconds: Mapping[tuple[str, str], float]) -> Timeline:
    """The timeline of a scheduled program.

    seconds: on the cores, of one run of an instruction, by the names of its computation and its own.
    """
    state = _Walk(module, mesh, links, seconds)
    compute, _ = state.computation(module.entry, 1)
    return Timeline(compute, dict(state.traffic))


@dataclasses.dataclass(kw_only=True)
class _Transfer:
    kind: str
    bytes: float
    seconds: float  # alone on its links
    left: float  # of these
    links: float
    driver: str  # the channel whose fusions alone drive it; "": all compute


_Flight = dict[str, list[_Transfer]]  # by the name of what began them, or by the channel
_Driven = dict[str, float]  # seconds of the fusions that drive a channel


class _Walk:
    def __init__(self, module: Module, mesh: Mesh, links: Links, seconds: Mapping[tuple[str, str], float]) -> None:
        self.module, self.mesh, self.links, self.seconds = module, mesh, links, seconds
        self.traffic: dict[str, Traffic] = collections.defaultdict(Traffic)

    def computation(self, name: str, times: int) -> tuple[float, _Driven]:
        """Walks a computation that runs `times` times a step.

        Returns the compute of one run, in seconds, and that of the fusions which drive a channel.
        """
        flight: _Flight = {}
        driven: _Driven = collections.defaultdict(float)
        compute = 0.0
        entries = list(self.module.computations[name].values())
        costs = [self._cost(entry, name, times) for entry in entries]
        for place, (entry, (cost, drives)) in enumerate(zip(entries, costs, strict=True)):
            begun, channel, ends = self._begun(entry, name)
            self._count(begun, times)
            if begun and (channel or entry.opcode.endswith("-start")):
                flight[channel or entry.name] = begun
            elif begun:
                self._wait(begun, flight, times)
                between = _until_use(entry, entries[place + 1 :], (cost for cost, _ in costs[place + 1 :]))
                for transfer in begun:
                    self.traffic[transfer.kind].before_use += times * min(between, transfer.seconds)
            if channel:
                drives = {**drives, channel: cost}
            _advance(cost, flight, drives, self.links.count)
            compute += cost
            for driver, seconds in drives.items():
                driven[driver] += seconds
            done = channel if ends else entry.operands[0] if entry.opcode.endswith("-done") else ""
            if done in flight:
                self._wait(flight.pop(done), flight, times)
        for transfers in flight.values():
            self._wait(transfers, {}, times)
        return compute, driven

    def _cost(self, entry: Instruction, name: str, times: int) -> tuple[float, _Driven]:
        compute = self.seconds.get((name, entry.name), 0.0)
        driven: _Driven = {}
        rounds = self.module.rounds(entry)
        for body in self.module.scheduled(entry):
            inner, drives = self.computation(body, times * rounds)
            compute += rounds * inner
            driven |= {channel: rounds * seconds for channel, seconds in drives.items()}
        return compute, driven

    def _begun(self, entry: Instruction, name: str) -> tuple[list[_Transfer], str, bool]:
        """Collectives that begin with an instruction, the channel of a chain that it drives, and if it ends that."""
        inner = [(entry, name), *self.module.inside(entry)]
        targets = {
            instruction.attribute(r'custom_call_target="AsyncCollective(Start|Done)"')
            for instruction, _ in inner
            if instruction.opcode == "custom-call"
        }
        begun: list[_Transfer] = []
        driven = ""
        for instruction, computation in inner:
            channel = compiled.chain(instruction)
            driven = channel or driven
            if channel and "Start" not in targets:
                continue
            strategy = strategy_of(instruction, entry)
            for part in compiled.parts(self.module, instruction, computation, self.mesh):
                seconds = self.links.seconds(part, strategy)
                begun.append(
                    _Transfer(
                        kind=next((_WINDOWED[key] for key in _WINDOWED if key in name), part.kind),
                        bytes=part.bytes,
                        seconds=seconds,
                        left=seconds,
                        links=self.links.used(part, strategy),
                        driver=channel,
                    )
                )
        return begun, driven, "Done" in targets

    def _count(self, begun: list[_Transfer], times: int) -> None:
        for kind in {transfer.kind for transfer in begun}:
            self.traffic[kind].count += times
        for transfer in begun:
            self.traffic[transfer.kind].bytes += times * transfer.bytes
            self.traffic[transfer.kind].seconds += times * transfer.seconds

    def _wait(self, ending: list[_Transfer], flight: _Flight, times: int) -> None:
        """Waits until transfers have ended, one after the other, while those in flight go on."""
        for transfer in ending:
            sums = self.traffic[transfer.kind]
            sums.exposed += times * transfer.left
            if transfer.seconds:
                sums.exposed_bytes += times * transfer.bytes * transfer.left / transfer.seconds
            _advance(transfer.left, flight, {}, self.links.count - transfer.links)


def _advance(seconds: float, flight: _Flight, driven: Mapping[str, float], links: float) -> None:
    """Lets transfers go on for some time, in the order in which they began, in parallel where free links allow it."""
    room = dict(driven)  # seconds in which a channel is driven
    while seconds > 0:
        active: list[_Transfer] = []
        free = links
        for transfer in (entry for transfers in flight.values() for entry in transfers):
            moves = transfer.left > 0 and (not transfer.driver or room.get(transfer.driver, 0.0) > 0)
            if moves and transfer.links <= free:
                free -= transfer.links
                active.append(transfer)
        if not active:
            return
        drivers = {transfer.driver for transfer in active if transfer.driver}
        passed = min(seconds, *(transfer.left for transfer in active), *(room[driver] for driver in drivers))
        for transfer in active:
            transfer.left -= passed
        for driver in drivers:
            room[driver] -= passed
        seconds -= passed


def _until_use(entry: Instruction, later: Iterable[Instruction], costs: Iterable[float]) -> float:
    """Seconds of compute behind an instruction, up to the first that needs its result."""
    names, between = {entry.name}, 0.0
    for instruction, cost in zip(later, costs, strict=True):
        if names & set(instruction.operands):
            if instruction.opcode not in ("bitcast", "get-tuple-element", "copy-start", "copy-done"):
                break
            names.add(instruction.name)
        between += cost
    return between
