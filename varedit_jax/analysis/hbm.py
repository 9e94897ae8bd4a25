"""Bytes of HBM that each instruction of a scheduled step reads and writes, from its shapes: no estimate is asked.

Each instruction counts as if its operands came from HBM and its results went there, without padding, whatever the TPU's
compiler keeps in VMEM or copies there ahead; a GPU has no such memory.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from varedit_jax.analysis import compiled, hlo, work
from varedit_jax.analysis.hlo import Instruction, Module

# What runs nothing itself; kernels and collectives count by other formulas.
_NOTHING = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "custom-call", *compiled.KINDS}
_NOTHING |= {"while", "conditional", "call", "after-all", "optimization-barrier", "partition-id", "replica-id"}
_ASYNCHRONOUS = ("-start", "-update", "-done")  # collectives, and copies between HBM and VMEM
_PARTS = {"slice", "dynamic-slice", "gather"}  # read of their first operand what they give
_ONE_TO_ONE = {"bitcast", "bitcast-convert", "convert", "copy", "reduce-precision", "reshape", "transpose"}


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


def bytes_of(module: Module, instruction: Instruction, name: str) -> int:
    """Bytes that one run of an instruction of the computation `name` reads and writes.

    What is read through slices alone counts as the slices, and what is updated in place as the update.
    """
    if _is_silent(instruction):
        return 0
    body = module.computations[name]
    read = 0
    for operand in dict.fromkeys(instruction.operands):  # each once
        size = sum(array.size for array in body[operand].results)
        if size:
            share = min(1.0, _read_by(module, instruction, operand, body) / size)
            read += round(share * _bytes(body[operand]))
    return read + _written(module, instruction, body)


def _read_by(module: Module, user: Instruction, operand: str, body: dict[str, Instruction]) -> int:
    """Elements of an operand that its user reads; those that are read twice count twice."""
    if _is_silent(user) and user.opcode != "bitcast":
        return 0
    first = user.operands[0] == operand
    if user.opcode in _PARTS and first:
        return user.results[0].size
    if user.opcode == "dynamic-update-slice" and first:
        return 0
    if user.opcode == "fusion":
        (called,) = hlo.called(user)
        inner = list(module.computations[called].values())
        numbers = [number for number, name in enumerate(user.operands) if name == operand]
        inputs = [entry for entry in inner if entry.opcode == "parameter" and int(entry.text) in numbers]
        return sum(_read_in(module, entry, inner) for entry in inputs)
    return body[operand].results[0].size


def _read_in(module: Module, value: Instruction, inner: list[Instruction]) -> int:
    """Elements of a value of a fusion that the instructions of the fusion, `inner`, read."""
    body = {entry.name: entry for entry in inner}
    read = 0
    for user in inner:
        if value.name not in user.operands:
            continue
        if user.opcode in _ONE_TO_ONE and user is not inner[-1]:
            read += _read_in(module, user, inner)
        elif user.opcode == "dynamic-update-slice" and not _is_written(user, inner):
            read += value.results[0].size
        else:
            read += _read_by(module, user, value.name, body)
    return min(read, sum(array.size for array in value.results))


def _is_written(update: Instruction, inner: list[Instruction]) -> bool:
    """Returns True for an update that is the result of its fusion, or one of them, and nothing else reads."""
    users = [entry for entry in inner if update.name in entry.operands]
    return all(entry.opcode in ("bitcast", "tuple") and _is_written(entry, inner) for entry in users)


def _written(module: Module, instruction: Instruction, body: dict[str, Instruction]) -> int:
    """Bytes that an instruction writes as the result of its computation, `body`."""
    if instruction.opcode == "fusion":
        (called,) = hlo.called(instruction)
        inner = module.computations[called]
        return _written(module, list(inner.values())[-1], inner)
    if instruction.opcode == "get-tuple-element":
        return 0 if _is_silent(body[instruction.operands[0]]) else _bytes(instruction)
    if instruction.opcode in ("bitcast", "tuple"):
        return sum(_written(module, body[operand], body) for operand in instruction.operands)
    if instruction.opcode == "dynamic-update-slice":
        return _bytes(body[instruction.operands[1]])
    return 0 if _is_silent(instruction) else _bytes(instruction)


def _is_silent(instruction: Instruction) -> bool:
    return instruction.opcode in _NOTHING or instruction.opcode.endswith(_ASYNCHRONOUS)


def _bytes(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.results)
