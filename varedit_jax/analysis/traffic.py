"""What a compiled program moves between HBM and its cores, and the large arrays that it should not make.

Bytes are those of HBM alone that hbm.py counts of the instructions of the schedule, and those of kernels.
"""

import dataclasses
import math
from collections.abc import Iterator

from varedit_jax.analysis import hbm
from varedit_jax.analysis.hlo import Array, Instruction, Module
from varedit_jax.analysis.work import kernel_of
from varedit_jax.transformer.kernels import cached


def hbm_bytes(module: Module) -> int:
    """Bytes that one device reads from and writes to HBM in a run of the program."""
    return sum(times * moved(module, name, instruction) for name, instruction, times in scheduled(module))


def scheduled(module: Module) -> Iterator[tuple[str, Instruction, int]]:
    """Instructions that run one after the other, with their computation before and their number of runs behind."""
    for name, times in module.schedules().items():
        for instruction in module.computations[name].values():
            yield name, instruction, times


def moved(module: Module, name: str, instruction: Instruction) -> int:
    """Bytes of HBM that one run of an instruction of the computation `name` reads and writes."""
    if instruction.opcode != "custom-call":
        return hbm.bytes_of(module, instruction, name, alone=True)
    operands = [array for operand in instruction.operands for array in module.computations[name][operand].results]
    return 0 if _is_place(instruction) else _kernel_bytes(instruction, operands)


def _is_place(instruction: Instruction) -> bool:
    """Returns True for a call that only gives memory a name."""
    names = ("ConcatBitcast", "AllocateBuffer")
    return instruction.opcode == "custom-call" and any(f'custom_call_target="{x}"' in instruction.text for x in names)


def is_kernel(instruction: Instruction) -> bool:
    """Returns True for a call of a kernel that is written for TPUs."""
    return instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.text


def _in_hbm(array: Array) -> int:
    return array.bytes if array.memory == 0 else 0


def kernel_calls(module: Module) -> int:
    """Calls of kernels in a run of the program."""
    return sum(times for instruction, _, times in module.instructions() if is_kernel(instruction))


def kernel_flops(module: Module) -> int:
    """Operations of the kernels of attention in a run of the program: as each states them, or all of its tiles."""
    total = 0
    for _, instruction, times in scheduled(module):
        splash = kernel_of(instruction)
        total += times * (splash.flops(()) if splash else _stated(instruction, "flops"))
    return total


def _stated(kernel: Instruction, what: str) -> int:
    """A number of a kernel's cost estimate; 0 if it has none."""
    return int(kernel.attribute(rf'"{what}":"?(\d+)') or 0) if is_kernel(kernel) else 0


def _kernel_bytes(instruction: Instruction, operands: list[Array]) -> int:
    """Bytes of a call of a kernel: as it states them, or keys and values once for each block of queries."""
    stated = _stated(instruction, "bytes_accessed")
    if stated:
        on_chip = sum(x.bytes for x in (*operands, *instruction.results) if x.memory)
        return max(stated - on_chip, 0)
    splash = kernel_of(instruction)
    arrays = [array for array in operands if array.dtype[0] in "bf" and len(array.shape) >= 3]
    again = (splash.queries // splash.q_block - 1) * sum(map(_in_hbm, arrays[1:3])) if splash else 0
    return again + sum(map(_in_hbm, (*operands, *instruction.results)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """What arrays of a stage are recognized by, on one device."""

    layers: int  # of the scanned stack
    stacks: frozenset[tuple[int, ...]]  # shapes of the stacks of matrices
    heads: int
    head_size: int
    queries: int
    keys: int  # that a query sees at most, its own scale's included
    samples: int
    cache_tokens: int


def scores(module: Module, shapes: Shapes) -> list[str]:
    """Float32 arrays of queries x keys for all heads, wherever they are made, other than inside of kernels.

    Of most of the keys, and of a block of queries at least; other arrays with such sides are smaller.
    """
    least = shapes.samples * shapes.heads * min(shapes.queries, cached.BLOCK) * shapes.keys // 2
    sizes = {shapes.keys, shapes.keys - shapes.queries, shapes.queries, shapes.cache_tokens}
    sizes = {-(-size // unit) * unit for size in sizes for unit in (1, 128, cached.BLOCK) if size > 0}
    columns = sizes - {shapes.head_size}
    rows = {-(-shapes.queries // unit) * unit for unit in (1, 16, min(shapes.queries, cached.QUERIES))}
    found = {}
    for instruction, _, _ in module.instructions():
        for array in instruction.results:
            rest = [size for size in array.shape if size != 1]
            if (
                array.dtype == "f32"
                and array.size >= least
                and _has(rest, rows, columns, shapes.samples * shapes.heads)
            ):
                found[f"f32{list(array.shape)} {instruction.op_name}"] = True
    return list(found)


def _has(sizes: list[int], rows: set[int], columns: set[int], count: int) -> bool:
    """Returns True if two of the sizes are a row and a column of scores, and the others have all `count` heads."""
    for place, row in enumerate(sizes):
        for other, column in enumerate(sizes):
            rest = math.prod(size for index, size in enumerate(sizes) if index not in (place, other))
            if place != other and row in rows and column in columns and rest % count == 0:
                return True
    return False


def whole_stacks(module: Module, shapes: Shapes) -> list[str]:
    """Instructions that make weights of all layers at once anew: conversions and copies, with their bytes."""
    found = []
    for _, instruction, times in scheduled(module):
        if instruction.opcode in hbm.NOTHING or instruction.opcode.endswith("-done") or shapes.layers == 1:
            continue
        results = instruction.results[:1] if instruction.opcode.endswith("-start") else instruction.results
        for array in results:
            if array.shape in shapes.stacks:
                kind = instruction.opcode.removesuffix("-start")
                found.append(
                    f"{kind} {array.dtype}{list(array.shape)} {array.bytes * times:,} bytes {instruction.op_name}"
                )
    return found


def cache_copies(module: Module, shapes: Shapes) -> list[str]:
    """Copies of a layer's cache, or of all layers', inside of loops or outside, that no update in place is."""
    layer = shapes.samples * shapes.heads * shapes.cache_tokens * shapes.head_size
    found = []
    for name, instruction, times in scheduled(module):
        if instruction.opcode in hbm.NOTHING or instruction.opcode.endswith("-done") or is_kernel(instruction):
            continue
        results = instruction.results[:1] if instruction.opcode.endswith("-start") else instruction.results
        for array in results:
            if array.size not in (layer, layer * shapes.layers) or shapes.cache_tokens not in array.shape:
                continue
            if moved(module, name, instruction) >= array.bytes:
                found.append(f"{times} x {instruction.opcode} {array.dtype}{list(array.shape)} {instruction.op_name}")
    return found
