"""The time of a step, predicted from its compiled program: by kind of work, with what the collectives leave exposed.

Nothing runs. The TPU's compiler estimates the cycles of its own instructions; kernels (splash attention) it does not
know, nor the time of the links: these follow by formula from `Assumptions`, which every prediction prints. A prediction
is a range over them, and is as good as the compiler's estimate, for which there is no range.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from varedit_jax import hardware
from varedit_jax.analysis import links, timeline
from varedit_jax.analysis.hlo import Array, Instruction, Module, arrays
from varedit_jax.analysis.timeline import GATHERS, SCATTERS, Timeline

MATMUL, MOVE, ELEMENTWISE, KERNEL = "matmul", "move", "elementwise", "kernel"
KINDS = (MATMUL, MOVE, ELEMENTWISE, KERNEL)
WORST = 10  # moves that are printed

# Operations that put numbers elsewhere, in another order or type, and compute none.
_MOVES = {"copy", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "pad", "concatenate", "reshape"}
_MOVES |= {"reverse", "convert", "bitcast-convert", "reduce-precision"}
# Operations that cost nothing, or that fill, and choose between, what a move puts somewhere.
_NEUTRAL = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "broadcast", "iota", "partition-id"}
_NEUTRAL |= {"select", "fusion", "custom-call"}

# Matmuls of a tile of scores in each kernel of splash attention. The backward pass computes the scores again.
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4, "dkv_fused": 5}


@dataclasses.dataclass(frozen=True)
class Assumption:
    """A number that no program states; the best, the expected and the worst case."""

    best: float
    expected: float
    worst: float
    means: str


ASSUMPTIONS = {
    "splash_forward": Assumption(0.7, 0.6, 0.45, "share of peak in splash attention's computed tiles, forward"),
    "splash_backward": Assumption(0.65, 0.5, 0.4, "the same, backward: dq and dkv, scores computed again in both"),
    "link_share": Assumption(0.95, 0.9, 0.8, "share of the nominal one-way speed of a link that transfers reach"),
    "ring_directions": Assumption(2, 2, 1, "directions in which a color of a ring sends at once"),
}
CASES = ("best", "expected", "worst")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A call of a kernel of splash attention."""

    name: str  # a key of _SPLASH
    rows: int  # examples x heads
    queries: int  # padded
    keys: int
    head_size: int
    q_block: int
    k_block: int

    def flops(self, masks: Iterable[np.ndarray]) -> int:
        """Operations of the tiles that one call computes, masked scores in them included.

        `masks` [queries, keys] of the model; without one of this size all tiles count.
        """
        tiles = computed_tiles(self, masks)
        return self.rows * tiles * _SPLASH[self.name] * 2 * self.q_block * self.k_block * self.head_size


def computed_tiles(kernel: Kernel, masks: Iterable[np.ndarray]) -> int:
    """Tiles of scores in which the mask shows anything: those that the kernel computes for each head."""
    shape = kernel.queries // kernel.q_block, kernel.keys // kernel.k_block
    blocks = kernel.q_block, kernel.k_block
    for mask in sorted(masks, key=lambda mask: mask.size, reverse=True):
        padding = kernel.queries - mask.shape[0], kernel.keys - mask.shape[1]
        if all(0 <= more < block for more, block in zip(padding, blocks, strict=True)):
            queries = np.pad(mask, ((0, padding[0]), (0, 0)), mode="edge")  # as the kernel is called
            padded = np.pad(queries, ((0, 0), (0, padding[1])))
            return int(padded.reshape(shape[0], blocks[0], shape[1], blocks[1]).any(axis=(1, 3)).sum())
    return shape[0] * shape[1]


def kernel_of(instruction: Instruction) -> Kernel | None:
    """The kernel that a custom call is; None for other calls."""
    if instruction.attribute(r'custom_call_target="(\w+)"') != "tpu_custom_call":
        return None
    found = re.search(r"splash_\w*?_(fwd|dkv|dq)_", instruction.name + instruction.op_name)
    types = arrays(instruction.attribute(r"operand_layout_constraints=\{(.*?\})\}"))
    inputs = [array for array in types if array.dtype[0] in "bf" and len(array.shape) >= 3]
    sizes = {key: int(value) for key, value in re.findall(r'\\?"(block_\w+)\\?": (\d+)', instruction.text)}
    if not found or len(inputs) < 3:
        return None
    name = found[1]
    if name == "dkv" and re.search(r'use_fused_bwd_kernel\\?": true', instruction.text):
        name = "dkv_fused"
    suffix = {"fwd": "", "dq": "_dq"}.get(name, "_dkv")
    queries, keys = inputs[0].shape, inputs[1].shape
    return Kernel(
        name=name,
        rows=math.prod(queries[:-2]),
        queries=queries[-2],
        keys=keys[-2],
        head_size=queries[-1],
        q_block=sizes.get(f"block_q{suffix}") or queries[-2],
        k_block=sizes.get(f"block_kv{suffix}") or keys[-2],
    )


def kind_of(module: Module, instruction: Instruction) -> str:
    """The kind of work of an instruction that has an estimate; collectives inside of it do not count."""
    inner = [entry for entry, _ in module.inside(instruction)] or [instruction]
    names = {entry.opcode for entry in inner}
    if names & {"convolution", "dot"}:
        return MATMUL
    computing = [entry for entry in inner if entry.opcode not in _MOVES | _NEUTRAL and not _is_index(entry)]
    return MOVE if names & _MOVES and not computing else ELEMENTWISE


def _is_index(instruction: Instruction) -> bool:
    """Returns True for the arithmetic of positions and of masks by position."""
    return all(array.dtype[0] in "sup" for array in instruction.results)


@dataclasses.dataclass(frozen=True)
class Piece:
    """An instruction of the schedule that costs the cores time."""

    instruction: Instruction
    kind: str
    seconds: float  # of one run
    times: int


def pieces(module: Module, chip: hardware.Chip, masks: Iterable[np.ndarray], case: str) -> dict[tuple[str, str], Piece]:
    """What costs the cores time, by computation and name."""
    masks = list(masks)
    found: dict[tuple[str, str], Piece] = {}
    for name, times in schedules(module).items():
        for instruction in module.computations[name].values():
            kernel = kernel_of(instruction) if instruction.opcode == "custom-call" else None
            if kernel:
                share = _case("splash_forward" if kernel.name == "fwd" else "splash_backward", case)
                seconds = kernel.flops(masks) / (share * chip.tflops * 1e12 / chip.devices)
                found[name, instruction.name] = Piece(instruction, KERNEL, seconds, times)
            elif instruction.cycles:
                kind = kind_of(module, instruction)
                found[name, instruction.name] = Piece(instruction, kind, instruction.cycles / chip.clock, times)
    return found


def schedules(module: Module) -> dict[str, int]:
    """Runs per step of each computation whose instructions run one after the other."""
    times: collections.Counter[str] = collections.Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in module.computations[name].values():
            for body in module.scheduled(instruction):
                visit(body, count * module.rounds(instruction))

    visit(module.entry, 1)
    return dict(times)


def _case(name: str, case: str) -> float:
    return getattr(ASSUMPTIONS[name], case)


def predict(
    module: Module,
    chip: hardware.Chip,
    mesh: Mesh,
    model_tflop: float,
    transformer_tflop: float,
    masks: Iterable[np.ndarray] = (),
) -> dict[str, Any]:
    """The prediction, ready for JSON.

    Args:
      module: the scheduled program of one device.
      chip: that it is compiled for.
      mesh: of the devices that the program numbers.
      model_tflop: model operations of a step over all devices, with those of frozen encoders, 1e12.
      transformer_tflop: the same without the encoders.
      masks: of the model's self-attention, bool [queries, keys]; without them the kernel computes every tile.
    """
    masks = list(masks)
    runs: dict[str, Timeline] = {}
    work: dict[str, dict[tuple[str, str], Piece]] = {}
    for case in CASES:
        work[case] = found = pieces(module, chip, masks, case)
        model = links.of_chip(chip, _case("link_share", case), _case("ring_directions", case))

        def seconds(instruction: Instruction, name: str, found: dict[tuple[str, str], Piece] = found) -> float:
            piece = found.get((name, instruction.name))
            return piece.seconds if piece else 0.0

        runs[case] = timeline.walk(module, mesh, model, seconds)
    expected, found = runs["expected"], work["expected"]
    peak = chip.tflops / chip.devices * mesh.size
    kinds = {kind: sum(x.seconds * x.times for x in found.values() if x.kind == kind) for kind in KINDS}
    traffic = expected.traffic
    return {
        "seconds": _rounded(expected.seconds),
        "seconds_range": [_rounded(runs["best"].seconds), _rounded(runs["worst"].seconds)],
        "mfu_with_encoders": _rounded(model_tflop / peak / expected.seconds),
        "mfu_with_encoders_range": [_rounded(model_tflop / peak / runs[case].seconds) for case in ("worst", "best")],
        "mfu": _rounded(transformer_tflop / peak / expected.seconds),
        "seconds_by_kind": {kind: _rounded(value) for kind, value in kinds.items()}
        | {"exposed collectives": _rounded(expected.exposed)},
        "moves_share": _rounded(kinds[MOVE] / expected.seconds),
        "moves_by_operation": _sums((x for x in found.values() if x.kind == MOVE), lambda x: _operation(x.instruction)),
        "worst_moves": _worst(x for x in found.values() if x.kind == MOVE),
        "collectives": {
            kind: {
                "count": round(entry.count),
                "gib": _rounded(entry.bytes / hardware.GIB),
                "seconds": _rounded(entry.seconds),
                "exposed_seconds": _rounded(entry.exposed),
                "bytes_under_compute_share": _rounded(entry.covered_bytes / entry.bytes if entry.bytes else 1.0),
                "compute_before_use_seconds": _rounded(entry.before_use),
            }
            for kind, entry in sorted(traffic.items(), key=lambda item: -item[1].seconds)
        },
        "exposed_gathers_share": _exposed(traffic.get(GATHERS)),
        "exposed_scatters_share": _exposed(traffic.get(SCATTERS)),
        "kernels": _kernels(found.values(), masks),
        "assumptions": {
            "clock_ghz": _rounded(chip.clock / 1e9),
            "compiler_cycles": "as estimated, without a range",
            "link_gb_per_second_one_way": _rounded(chip.link_bandwidth / chip.devices / 2 / chip.links / 1e9),
            **{name: [getattr(entry, case) for case in CASES] for name, entry in ASSUMPTIONS.items()},
        },
    }


def _exposed(traffic: timeline.Traffic | None) -> float:
    """The share of the bytes of a kind of collective that do not move under compute."""
    return _rounded(1 - traffic.covered_bytes / traffic.bytes) if traffic and traffic.bytes else 0.0


def _kernels(found: Iterable[Piece], masks: list[np.ndarray]) -> list[dict[str, Any]]:
    rows = []
    for piece in found:
        kernel = kernel_of(piece.instruction) if piece.kind == KERNEL else None
        if kernel:
            tiles = kernel.queries // kernel.q_block * (kernel.keys // kernel.k_block)
            rows.append(
                {
                    "kernel": kernel.name,
                    "place": place_of(piece.instruction.op_name),
                    "queries": kernel.queries,
                    "keys": kernel.keys,
                    "tiles": f"{computed_tiles(kernel, masks)} of {tiles}",
                    "times": piece.times,
                    "tflop": _rounded(piece.times * kernel.flops(masks) / 1e12),
                    "seconds": _rounded(piece.times * piece.seconds),
                }
            )
    return sorted(rows, key=lambda row: -row["seconds"])


def _operation(instruction: Instruction) -> str:
    return "fusion" if instruction.opcode == "fusion" else instruction.opcode


def _sums(found: Iterable[Piece], key: Any) -> dict[str, float]:
    totals: collections.Counter[str] = collections.Counter()
    for piece in found:
        totals[key(piece)] += piece.seconds * piece.times  # type: ignore[assignment]
    return {name: _rounded(value) for name, value in totals.most_common()}


def _worst(moves: Iterable[Piece]) -> list[dict[str, Any]]:
    """The moves that cost most, those of one place, operation and shape together."""
    groups: dict[tuple[str, str, str], list[Piece]] = collections.defaultdict(list)
    for piece in moves:
        shape = _shape(piece.instruction.results)
        groups[place_of(piece.instruction.op_name), _operation(piece.instruction), shape].append(piece)
    rows = [
        {
            "seconds": _rounded(sum(x.seconds * x.times for x in group)),
            "times": sum(x.times for x in group),
            "operation": operation,
            "place": place,
            "shape": shape,
            "instruction": group[0].instruction.name,
        }
        for (place, operation, shape), group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])[:WORST]


def _shape(results: tuple[Array, ...]) -> str:
    largest = max(results, key=lambda array: array.bytes)
    return f"{largest.dtype}{list(largest.shape)}".replace(" ", "")


_WRAPPERS = re.compile(r"^(?:jit|jvp|transpose|vmap|remat|checkpoint|custom_vjp|custom_jvp)\((.*)\)$")
_SILENT = {"while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "shard_map", "step", "pjit"}


def place_of(op_name: str) -> str:
    """A place in the model of an `op_name` of JAX: which pass, the modules, the operation; "(no name)" for none."""
    if not op_name:
        return "(no name)"
    when = "forward"
    if "rematted_computation" in op_name:
        when = "again"
    elif "transpose(" in op_name:
        when = "backward"
    elif "jvp(" not in op_name:
        when = "outside"
    parts: list[str] = []
    for part in op_name.split("/"):
        while match := _WRAPPERS.match(part):
            part = match[1]
        if part and part not in _SILENT and part not in parts:
            parts.append(part)
    return f"{when} {'/'.join(parts[-4:])}"


def _rounded(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


def lines(predicted: dict[str, Any]) -> list[str]:
    """The prediction in lines for people."""
    low, high = predicted["seconds_range"]
    worst, best = predicted["mfu_with_encoders_range"]
    step = predicted["seconds"]
    rows = [
        f"predicted: {step:.2f} s a step ({low:.2f} .. {high:.2f}), MFU with encoders "
        f"{100 * predicted['mfu_with_encoders']:.1f} % ({100 * worst:.1f} .. {100 * best:.1f}), "
        f"without {100 * predicted['mfu']:.1f} %",
        "  by kind: "
        + ", ".join(
            f"{kind} {value:.2f} s ({100 * value / step:.1f} %)" for kind, value in predicted["seconds_by_kind"].items()
        ),
        "  moves by operation: "
        + ", ".join(f"{name} {value:.2f} s" for name, value in predicted["moves_by_operation"].items()),
    ]
    for kind, entry in predicted["collectives"].items():
        rows.append(
            f"  {kind}: {entry['gib']:.2f} GiB in {entry['count']}, {entry['seconds']:.3f} s of the links, exposed "
            f"{entry['exposed_seconds']:.3f} s; {100 * entry['bytes_under_compute_share']:.1f} % of the bytes under "
            f"compute; {entry['compute_before_use_seconds']:.3f} s of compute lie before first uses"
        )
    for row in predicted["kernels"]:
        rows.append(
            f"  kernel {row['kernel']} {row['queries']} x {row['keys']}, {row['tiles']} tiles: {row['seconds']:.3f} s, "
            f"{row['times']} times, {row['place']}"
        )
    rows.append("  worst moves:")
    for row in predicted["worst_moves"]:
        rows.append(
            f"    {row['seconds']:.3f} s, {row['times']} x {row['operation']} {row['shape']}, {row['place']} "
            f"({row['instruction']})"
        )
    rows.append("  assumed: " + ", ".join(f"{name} {value}" for name, value in predicted["assumptions"].items()))
    return rows
