"""Bytes of HBM that each instruction of a scheduled program reads and writes, from its shapes: no estimate is asked.

Without padding; what is read through slices alone counts as the slices, and what is updated in place as the update. In
one of two ways: as if all operands came from HBM and all results went there, whatever the TPU's compiler keeps in VMEM
or copies there ahead, as a GPU has no such memory, and collectives left to the links; or of HBM alone, where arrays in
a chip's own memory do not count, and copies to it and from it, and collectives, do.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import numpy as np

from varedit_jax.analysis import compiled, hlo, work
from varedit_jax.analysis.hlo import Array, Instruction, Module

# What moves nothing itself: what it contains, or begins, is counted there.
NOTHING = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while", "conditional", "call"}
NOTHING |= {"after-all", "opt-barrier", "add-dependency", "partition-id", "replica-id"}
_PARTS = {"slice", "dynamic-slice", "gather"}  # read of their first operand what they give
_ARRAYS = {"dynamic-slice": 1, "dynamic-update-slice": 2}  # operands; the numbers behind say where
_VIEWS = {"bitcast", "reshape"}  # in a fusion: the same bytes
_ONE_TO_ONE = {*_VIEWS, "bitcast-convert", "convert", "copy", "reduce-precision", "transpose"}  # nothing unused is made


@dataclasses.dataclass(frozen=True)
class Access:
    """An instruction of the schedule that reads or writes arrays, or is a kernel."""

    instruction: Instruction
    kind: str  # of work.KINDS
    bytes: int  # of one run; 0 of a kernel
    times: int  # per step
    flops: int = 0  # of the matmuls of one run
    kernel: work.Kernel | None = None


def accesses(module: Module, masks: Sequence[np.ndarray]) -> list[Access]:
    """All of one device and step; `masks` as of `work.Kernel.computed`."""
    return list(_accesses(module, masks))


def _accesses(module: Module, masks: Sequence[np.ndarray]) -> Iterator[Access]:
    for name, times in module.schedules().items():
        for instruction in module.computations[name].values():
            kernel = work.kernel_of(instruction)
            if kernel:
                yield Access(instruction, work.KERNEL, 0, times, kernel.flops(masks), kernel)
                continue
            moved = bytes_of(module, instruction, name)
            if moved:
                inner = [(instruction, name), *module.inside(instruction)]
                flops = sum(hlo.flops(module, entry, body) for entry, body in inner)
                yield Access(instruction, work.kind_of(module, instruction), moved, times, flops)


def bytes_of(module: Module, instruction: Instruction, name: str, *, alone: bool = False) -> int:
    """Bytes that one run of an instruction of the computation `name` reads and writes; 0 of custom calls.

    alone: of HBM alone, see above; positions that a slice or an update outside of fusions is given do not count then.
    """
    opcode = instruction.opcode
    if opcode in NOTHING or opcode == "custom-call" or opcode.endswith(("-update", "-done")):
        return 0
    if (opcode.endswith("-start") or opcode in compiled.KINDS) and not alone:
        return 0
    body = module.computations[name]
    if opcode.endswith("-start"):
        return _started(instruction, body)
    operands = instruction.operands[: _ARRAYS.get(opcode)] if alone else instruction.operands
    read = 0
    for operand in dict.fromkeys(operands):  # each once
        size = sum(array.size for array in body[operand].results)
        if size:
            share = min(1.0, _read_by(module, instruction, operand, body, alone) / size)
            read += round(share * sum(_bytes(array, alone) for array in body[operand].results))
    return read + _written(module, instruction, body, alone)


def _bytes(array: Array, alone: bool) -> int:
    return 0 if alone and array.memory else array.bytes


def _started(instruction: Instruction, body: dict[str, Instruction]) -> int:
    """Bytes of HBM that a collective moves, or a copy or slice to a chip's own memory or from it."""
    results = instruction.results
    if instruction.opcode.removesuffix("-start") not in compiled.KINDS:
        part = min(results[:2], key=lambda array: array.size)
        return sum(part.bytes for array in results[:2] if array.memory == 0)
    operands = [array for operand in instruction.operands for array in body[operand].results]
    made = results[len(operands) :] or results  # most name their operands first
    return sum(_bytes(array, True) for array in (*operands, *made))


def _read_by(
    module: Module, user: Instruction, operand: str, body: dict[str, Instruction], alone: bool, used: int | None = None
) -> int:
    """Elements of an operand that its user reads; those that are read twice count twice.

    used: elements of the user's result that are read in turn; None outside of fusions, for all.
    """
    first = user.operands[0] == operand
    if user.opcode in _PARTS and first:
        return user.results[0].size
    if user.opcode == "dynamic-update-slice" and first:
        return 0
    if user.opcode == "fusion":
        inner = _fused(module, user)
        aliased = {operand for _, operand in _aliases(user)}
        read = 0
        for entry in inner:
            if entry.opcode == "parameter" and user.operands[int(entry.text)] == operand:
                kept = used is None and int(entry.text) in aliased  # where it is the result, it stays where it is
                read += _read_in(module, entry, inner, alone, 0 if kept else used)
        return read
    if user.opcode == "custom-call" or (user.opcode in compiled.KINDS and (not alone or compiled.chain(user))):
        return 0  # of a gather in steps, the result alone counts, where it starts
    return body[operand].results[0].size


def _read_in(module: Module, value: Instruction, inner: list[Instruction], alone: bool, used: int | None) -> int:
    """Elements of a value of a fusion that the instructions of the fusion, `inner`, read.

    used: elements of the fusion's result that are read in turn; None for all.
    """
    body = {entry.name: entry for entry in inner}
    size = sum(array.size for array in value.results)
    handed = size if used is None else used
    read = handed if value is inner[-1] else 0
    for user in inner:
        if value.name not in user.operands:
            continue
        if user.opcode in ("tuple", "get-tuple-element"):
            read += handed if user is inner[-1] else _read_in(module, user, inner, alone, used)
        elif _is_one_to_one(user):
            read += _read_in(module, user, inner, alone, used)
        elif user.opcode == "dynamic-update-slice" and not _is_written(user, inner):
            read += size
        else:
            of_user = _read_in(module, user, inner, alone, used) if user.opcode == "fusion" else None
            read += _read_by(module, user, value.name, body, alone, of_user)
    return min(read, size)


def _is_one_to_one(instruction: Instruction) -> bool:
    return instruction.opcode in _ONE_TO_ONE or "AssumeGatherIndicesInBound" in instruction.text


def _is_written(update: Instruction, inner: list[Instruction]) -> bool:
    """Returns True for an update that is the result of its fusion, or one of them, and nothing else reads."""
    users = [entry for entry in inner if update.name in entry.operands]
    return all(entry.opcode in (*_VIEWS, "tuple") and _is_written(entry, inner) for entry in users)


def _written(module: Module, instruction: Instruction, body: dict[str, Instruction], alone: bool) -> int:
    """Bytes that an instruction writes."""
    results = instruction.results
    if instruction.opcode == "dynamic-update-slice":
        return _bytes(results[0], alone) and body[instruction.operands[1]].results[0].bytes
    if instruction.opcode != "fusion":
        return sum(_bytes(array, alone) for array in results)
    inner = _fused(module, instruction)
    body = {entry.name: entry for entry in inner}
    root = inner[-1]
    made = [body[name] for name in root.operands] if root.opcode == "tuple" else [root] * len(results)
    aliased = {result for result, _ in _aliases(instruction)}
    total = 0
    for number, (value, array) in enumerate(zip(made, results, strict=True)):
        part = _part(module, value, body, alone, number in aliased)
        total += _bytes(array, alone) if part is None else min(part, _bytes(array, alone))
    return total


def _part(
    module: Module, made: Instruction, body: dict[str, Instruction], alone: bool, aliased: bool = False
) -> int | None:
    """Bytes of a value of a fusion that are written where it is a result; None for all.

    aliased: it lies where an operand of the fusion lies.
    """
    while made.opcode in (*_VIEWS, "get-tuple-element"):
        made = body[made.operands[0]]
    if made.opcode == "dynamic-update-slice":
        return body[made.operands[1]].results[0].bytes
    if made.opcode == "fusion":
        inner = _fused(module, made)
        return _part(module, inner[-1], {entry.name: entry for entry in inner}, alone)
    if made.opcode in compiled.KINDS or (made.opcode == "custom-call" and not _is_one_to_one(made)):
        return None if alone and not aliased else 0
    return 0 if made.opcode == "parameter" and aliased else None


def _fused(module: Module, fusion: Instruction) -> list[Instruction]:
    (called,) = hlo.called(fusion)
    return list(module.computations[called].values())


def _aliases(fusion: Instruction) -> list[tuple[int, int]]:
    """Numbers of results of a fusion, and of the operands whose memory they share."""
    text = fusion.attribute(r"output_to_operand_aliasing=\{(.*?\))\}")
    return [(int(result or 0), int(operand)) for result, operand in re.findall(r"\{(\d*)\}: \((\d+),", text)]
