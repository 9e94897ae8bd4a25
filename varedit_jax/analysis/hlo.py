"""The text of a compiled program (XLA's HLO): computations, their numbers of runs, and operations of matmuls."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32}
_BITS |= {"u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64, "c64": 64, "f8e4m3fn": 8, "f8e5m2": 8}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?")
_BODIES = re.compile(r"\b(?:body|calls|to_apply|branch_computations|called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)\}?")


@dataclasses.dataclass(frozen=True)
class Array:
    """Type and shape of an array."""

    dtype: str
    shape: tuple[int, ...]
    memory: int = dataclasses.field(default=0, compare=False)  # 0: HBM; others are of the chip itself

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Without padding."""
        return math.ceil(self.size * _BITS.get(self.dtype, 32) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    results: tuple[Array, ...]  # one, or those of a tuple
    operands: tuple[str, ...]  # names
    text: str  # attributes, behind the operands

    def attribute(self, pattern: str) -> str:
        """The first group of a regular expression in the attributes; "" if there is none."""
        found = re.search(pattern, self.text)
        return found[1] if found else ""

    @property
    def op_name(self) -> str:
        """Its origin in the Python program, as JAX names it."""
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def cycles(self) -> int:
        """Cycles of a run, as the TPU's compiler estimates them; 0 where it does not."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program for one device."""

    computations: dict[str, dict[str, Instruction]]  # by name, in order
    entry: str

    def executions(self) -> dict[str, int]:
        """Runs of each computation per run of the program: loops by their length, all branches once.

        A loop of unknown length counts once (`loops_counted_once`).
        """
        return self._runs(called)

    def schedules(self) -> dict[str, int]:
        """The same of the computations alone whose instructions run one after the other: not those of fusions."""
        return self._runs(self.scheduled)

    def _runs(self, called: Callable[[Instruction], list[str]]) -> dict[str, int]:
        times: collections.Counter[str] = collections.Counter()

        def visit(name: str, count: int) -> None:
            times[name] += count
            for instruction in self.computations[name].values():
                for body in called(instruction):
                    visit(body, count * self.rounds(instruction))

        visit(self.entry, 1)
        return dict(times)

    def rounds(self, instruction: Instruction) -> int:
        """Runs of what an instruction calls, per run of its own: of a loop its length, 1 if that is unknown."""
        return (self._trips(instruction) or 1) if instruction.opcode == "while" else 1

    def scheduled(self, instruction: Instruction) -> list[str]:
        """Computations that an instruction runs one instruction after the other: of loops, calls and branches."""
        return called(instruction) if instruction.opcode in ("while", "call", "conditional") else []

    def inside(self, instruction: Instruction) -> Iterator[tuple[Instruction, str]]:
        """The instructions of a fusion or of an asynchronous call, those of nested ones too; their computations."""
        if instruction.opcode in ("fusion", "async-start", "call-start"):
            for body in called(instruction):
                for inner in self.computations[body].values():
                    yield inner, body
                    yield from self.inside(inner)

    def instructions(self) -> Iterator[tuple[Instruction, str, int]]:
        """Every instruction that runs, its computation, and the number of its runs."""
        for name, count in self.executions().items():
            for instruction in self.computations[name].values():
                yield instruction, name, count

    def loops_counted_once(self) -> list[str]:
        """Names of the loops of unknown length."""
        return [entry.name for entry, _, _ in self.instructions() if entry.opcode == "while" and not self._trips(entry)]

    def _trips(self, loop: Instruction) -> int | None:
        """Length of a loop: as XLA annotates it, or the bound that its counter, from 0, is compared with."""
        known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        if known:
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%([\w.\-]+)")]
        counters = Array("s32", ()), Array("u32", ())
        bounds = [
            int(instruction.text)
            for instruction in condition.values()
            if instruction.opcode == "constant" and instruction.results[0] in counters
        ]
        return bounds[0] if len(bounds) == 1 else None


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`. Raises ValueError for a text without an entry computation."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            lines = computations.setdefault(name, [])
            if line.startswith("ENTRY "):
                entry = name
        elif line == "}":
            lines = None
        elif lines is not None and line.startswith("  "):
            lines.append(line.strip())
        elif lines:
            lines[-1] += line  # attributes of kernels have line breaks
    if not entry:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    parsed = {name: [_instruction(line) for line in lines] for name, lines in computations.items()}
    return Module({name: {entry.name: entry for entry in found} for name, found in parsed.items()}, entry)


def _instruction(line: str) -> Instruction:
    name, _, rest = line.partition(" = ")
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    opcode, _, call = rest[end:].strip().partition("(")
    stop = _closing("(" + call) - 1
    inside, attributes = call[: stop - 1], call[stop:]
    return Instruction(
        name=name.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode,
        results=arrays(rest[:end]),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        text=inside if opcode in ("constant", "parameter") else attributes,
    )


def _closing(text: str) -> int:
    """End of the parenthesis that opens at the start of `text`."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, tuples flattened."""
    return tuple(
        Array(dtype, tuple(int(side) for side in sides.split(",") if side), _memory(layout))
        for dtype, sides, layout in _ARRAY.findall(text)
    )


def _memory(layout: str) -> int:
    found = re.search(r"S\((\d+)\)", layout)
    return int(found[1]) if found else 0


def called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs, without those of reductions and conditions of loops."""
    if instruction.opcode not in ("while", "fusion", "call", "conditional", "async-start", "call-start", "custom-call"):
        return []
    return [name for group in _BODIES.findall(instruction.text) for name in re.findall(r"%([\w.\-]+)", group)]


def matmul_flops(module: Module) -> int:
    """Operations of the matmuls and convolutions of one device; a multiply-add is two.

    Taps of windows on padding or on dilation zeros do not count; custom calls (kernels) are not counted.
    """
    return sum(count * flops(module, instruction, name) for instruction, name, count in module.instructions())


def flops(module: Module, instruction: Instruction, name: str) -> int:
    """Operations of one run of a matmul or convolution of the computation `name`; 0 for all else."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    left, right = (module.computations[name][operand].results[0].shape for operand in instruction.operands)
    if instruction.opcode == "convolution":
        return _convolution(instruction, left, right)
    axes = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2 * instruction.results[0].size * math.prod(left[int(axis)] for axis in axes.split(",") if axis)


def _convolution(instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    labels = re.findall(r"[0-9bfio]+", instruction.attribute(r"dim_labels=([\w>\-]+)"))
    sides = [dict(zip(names, shape, strict=True)) for names, shape in zip(labels, (left, right), strict=False)]
    output = dict(zip(labels[2], instruction.results[0].shape, strict=True))
    window = instruction.attribute(r"window=\{([^}]*)\}")
    total = 2 * output["b"] * output["f"] * sides[1]["i"]
    for axis in range(len(labels[0]) - 2):
        total *= _positions(sides[0][str(axis)], sides[1][str(axis)], output[str(axis)], window, axis)
    return total


def _positions(inputs: int, taps: int, outputs: int, window: str, axis: int) -> int:
    """Pairs of an output and a tap of the window that meet an input, along one axis."""

    def of_axis(name: str, default: str) -> str:
        found = re.search(rf"(?:^| ){name}=(\S+)", window)
        return found[1].split("x")[axis] if found else default

    stride, dilation = int(of_axis("stride", "1")), int(of_axis("rhs_dilate", "1"))
    zeros, start = int(of_axis("lhs_dilate", "1")), -int(of_axis("pad", "0_0").split("_")[0])
    last = (inputs - 1) * zeros
    return sum(
        0 <= position <= last and position % zeros == 0
        for output in range(outputs)
        for position in range(start + output * stride, start + output * stride + taps * dilation, dilation)
    )
