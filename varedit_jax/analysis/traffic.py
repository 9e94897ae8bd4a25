"""What a compiled program moves between HBM and its cores, and the large arrays that it should not make.

Bytes are those that the instructions of the schedule read and write, without padding: arrays in a chip's own memory do
not count, an instruction that slices an array reads the slice, and one that updates it in place writes the update.
"""

import dataclasses
import math
from collections.abc import Iterator

from varedit_jax.analysis import compiled
from varedit_jax.analysis.hlo import Array, Instruction, Module
from varedit_jax.analysis.work import kernel_of
from varedit_jax.transformer.kernels import cached

# Instructions that move nothing by themselves: what they contain, or begin, is counted there.
_SILENT = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while", "call", "conditional"}
_SILENT |= {"after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_SAME = {"bitcast", "reshape"}  # the same bytes
_ONE_TO_ONE = {*_SAME, "convert", "copy", "transpose"}  # in a fusion: of what is not used nothing is computed


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
    opcode = instruction.opcode
    if opcode in _SILENT or opcode.endswith("-done") or _is_place(instruction):
        return 0
    operands = [module.computations[name][operand].results for operand in instruction.operands]
    if opcode.endswith("-start") and opcode.removesuffix("-start") not in compiled.KINDS:  # of a copy or a slice
        part = min((x for x in instruction.results[:2]), key=lambda x: x.size)
        return sum(part.bytes for x in instruction.results[:2] if x.memory == 0)
    if is_kernel(instruction):
        return _kernel_bytes(instruction, [array for found in operands for array in found])
    if opcode == "fusion":
        body = module.computations[_fused(instruction)]
        reads = sum(_read(module, body, index, found) for index, found in enumerate(operands))
        return reads + _written(module, body, instruction.results)
    written = sum(_in_hbm(x) for x in instruction.results)
    if opcode in _SLICES:
        return written + sum(x.bytes for x in instruction.results if operands[0][0].memory == 0)
    if opcode == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1][0]) if instruction.results[0].memory == 0 else _in_hbm(operands[1][0])
    return written + sum(_in_hbm(x) for found in operands for x in found)


def _is_place(instruction: Instruction) -> bool:
    """Returns True for a call that only gives memory a name."""
    names = ("ConcatBitcast", "AllocateBuffer")
    return instruction.opcode == "custom-call" and any(f'custom_call_target="{x}"' in instruction.text for x in names)


def is_kernel(instruction: Instruction) -> bool:
    """Returns True for a call of a kernel that is written for TPUs."""
    return instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.text


def _in_hbm(array: Array) -> int:
    return array.bytes if array.memory == 0 else 0


def _fused(fusion: Instruction) -> str:
    return fusion.attribute(r"calls=%([\w.\-]+)")


def _read(module: Module, body: dict[str, Instruction], index: int, found: tuple[Array, ...]) -> int:
    """Bytes of an operand of a fusion that it reads: all, or where it only slices or updates it, that part."""
    whole = sum(_in_hbm(x) for x in found)
    parameter = next(x for x in body.values() if x.opcode == "parameter" and x.text == str(index))
    part = _part(module, body, parameter.name)
    return whole if part is None else min(whole, part * whole // max(sum(x.size for x in found), 1))


def _part(module: Module, body: dict[str, Instruction], name: str) -> int | None:
    """Elements of the slices of an instruction's result that are used; None if all of it is, or may be."""
    if name == next(reversed(body)):  # the result
        return None
    total = 0
    for user in body.values():
        if name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == name:
            part: int | None = user.results[0].size
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            part = 0
        elif user.opcode in _ONE_TO_ONE:
            part = _part(module, body, user.name)
        elif user.opcode == "fusion":
            part = _part_of_fusion(module, body, user, name)
        else:
            part = None
        if part is None:
            return None
        total += part
    return total


def _part_of_fusion(module: Module, body: dict[str, Instruction], fusion: Instruction, name: str) -> int | None:
    """The same of an operand of a fusion in a fusion, which may hand it on as it is."""
    inner = module.computations[_fused(fusion)]
    total = 0
    for parameter in inner.values():
        if parameter.opcode == "parameter" and fusion.operands[int(parameter.text)] == name:
            made = parameter.name
            while (user := _only_user(inner, made)) and user.opcode in _ONE_TO_ONE:
                made = user.name
            whole = made == next(reversed(inner))
            part = _part(module, body, fusion.name) if whole else _part(module, inner, parameter.name)
            if part is None:
                return None
            total += part
    return total


def _only_user(body: dict[str, Instruction], name: str) -> Instruction | None:
    users = [user for user in body.values() if name in user.operands]
    return users[0] if len(users) == 1 else None


def _written(module: Module, body: dict[str, Instruction], results: tuple[Array, ...]) -> int:
    """Bytes that a fusion writes: its results, or where one is an operand with an update, that."""
    root = list(body.values())[-1]
    roots = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(roots) != len(results):
        return sum(_in_hbm(x) for x in results)
    total = 0
    for made, array in zip(roots, results, strict=True):
        update = _update(module, body, made)
        total += _in_hbm(array) if update is None else (update.bytes if array.memory == 0 else 0)
    return total


def _update(module: Module, body: dict[str, Instruction], made: Instruction) -> Array | None:
    """The array that a result of a fusion is an operand's update by; None if it is another one."""
    while made.opcode in _SAME:
        made = body[made.operands[0]]
    if made.opcode == "dynamic-update-slice":
        return body[made.operands[1]].results[0]
    if made.opcode == "fusion":
        inner = module.computations[_fused(made)]
        return _update(module, inner, list(inner.values())[-1])
    return None


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
        if instruction.opcode in _SILENT or instruction.opcode.endswith("-done") or shapes.layers == 1:
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
        if instruction.opcode in _SILENT or instruction.opcode.endswith("-done") or is_kernel(instruction):
            continue
        results = instruction.results[:1] if instruction.opcode.endswith("-start") else instruction.results
        for array in results:
            if array.size not in (layer, layer * shapes.layers) or shapes.cache_tokens not in array.shape:
                continue
            if moved(module, name, instruction) >= array.bytes:
                found.append(f"{times} x {instruction.opcode} {array.dtype}{list(array.shape)} {instruction.op_name}")
    return found
