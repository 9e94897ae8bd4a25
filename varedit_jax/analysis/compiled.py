"""Collectives of a step compiled for a mesh, by kind and purpose, and a lower bound on the time of the links.

Every figure is of one chip and one step. The bytes of a collective are those of the whole array: the result of a gather
on each chip, the operand of a reduction on each chip.
"""

import collections
import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from varedit_jax import hardware
from varedit_jax.analysis.hlo import Array, Instruction, Module

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

# Purposes of a collective.
PARAMETERS = "parameter all-gathers"
GRADIENTS = "gradient reduce-scatters"
SUMS = "gradient all-reduces"  # of replicated parameters, and of sums that the compiler does not scatter
TOKENS = "tensor axis"  # activations between chips that share their examples (sequence and tensor parallelism)
OTHER = "other"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One array of one collective operation."""

    kind: str
    array: Array
    times: int  # per step
    axes: tuple[str, ...]  # of the mesh, over which the participating chips differ
    group: int  # participating chips
    operation: int  # arrays of the same operation share it
    op_name: str
    summed: bool = False  # a gather as a sum with zeros, which moves twice as much

    @property
    def bytes(self) -> int:
        """Per step."""
        return self.times * self.array.bytes

    @property
    def moved(self) -> float:
        """Lower bound on the bytes that a chip sends per step."""
        share = (self.group - 1) / self.group
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * share * (2 if self.kind == "all-reduce" or self.summed else 1)


def collectives(module: Module, mesh: Mesh) -> list[Collective]:
    """All collectives of a step compiled for `mesh`; the program refers to devices by their index in it."""
    found: list[Collective] = []
    chained: set[str] = set()
    for instruction, name, times in module.instructions():
        channel = chain(instruction)
        if channel in chained:
            continue
        if channel:
            chained.add(channel)
        found += parts(module, instruction, name, mesh, times=times, operation=len(found))
    return found


def chain(instruction: Instruction) -> str:
    """The channel of a collective that several fusions overlap with and each name, as one operation; "" of others."""
    return instruction.attribute(r"channel_id=(\d+)") if "chain_id=" in instruction.text else ""


def parts(
    module: Module, instruction: Instruction, name: str, mesh: Mesh, times: int = 1, operation: int = 0
) -> list[Collective]:
    """The arrays of an instruction of the computation `name`, if it is a collective or starts one; or none."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return []
    computation = module.computations[name]
    results = instruction.results
    summed = False
    if kind == "reduce-scatter":
        results = tuple(array for operand in instruction.operands for array in computation[operand].results)
    elif kind == "all-reduce" and _scatters(name):
        kind = "reduce-scatter"  # its result is sliced in the same fusion
    elif kind == "all-reduce" and any(_is_placed(computation[operand]) for operand in instruction.operands):
        kind, summed = "all-gather", True
    elif instruction.opcode == "all-gather-start":
        results = results[len(results) // 2 :]
    elif instruction.opcode == "collective-permute-start":
        results = results[1:2]
    axes, group = _group(instruction, mesh)
    return [
        Collective(
            kind=kind,
            array=array,
            times=times,
            axes=axes,
            group=group,
            operation=operation,
            op_name=instruction.op_name,
            summed=summed,
        )
        for array in results
    ]


def _scatters(computation: str) -> bool:
    return computation.startswith("all-reduce-scatter")


def _is_placed(operand: Instruction) -> bool:
    """Returns True if an array is a part written into zeros."""
    return "dynamic-update-slice" in operand.name


def _group(instruction: Instruction, mesh: Mesh) -> tuple[tuple[str, ...], int]:
    """The axes of the mesh over which the devices of one group differ, and their number."""
    if instruction.opcode.startswith("collective-permute"):
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute(r"source_target_pairs=(\{\{.*?\}\})"))
        members = np.array(pairs, int)
        group = 2
    else:
        members = _replica_groups(instruction.attribute(r"replica_groups=(.*)"), mesh.size)
        group = members.shape[1]
    positions = np.stack(np.unravel_index(members, mesh.devices.shape), axis=-1)
    differ = (positions != positions[:, :1]).any(axis=(0, 1))
    return tuple(axis for axis, used in zip(mesh.axis_names, differ, strict=True) if used), group


def _replica_groups(text: str, devices: int) -> np.ndarray:
    """[groups, members] of the three forms that XLA prints; all devices where the list is empty."""
    named = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", text)
    if named:
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = _iota(named[2]) if named[2] else np.arange(devices)
        shape, used = _split_axes(sizes, re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[3]))
        rest = [axis for axis in range(len(shape)) if axis not in used]
        return order.reshape(shape).transpose(*rest, *used).reshape(-1, math.prod(shape[axis] for axis in used))
    iota = re.match(r"\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        return _iota(iota[3]).reshape(int(iota[1]), int(iota[2]))
    listed = re.match(r"\{(\{[\d,{}]*\})\}", text)
    if listed:
        return np.array([[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    if text.startswith("{}"):
        return np.arange(devices)[None]
    raise ValueError(f"replica groups of an unknown form: {text[:80]}")


def _iota(text: str) -> np.ndarray:
    """The numbers of "[64,4]T(1,0)": an iota of the shape, transposed; or of a plain list."""
    shape, _, axes = text.partition("T")
    numbers = [int(number) for number in re.findall(r"\d+", shape)]
    if not text.startswith("["):
        return np.array(numbers)
    order = [int(axis) for axis in re.findall(r"\d+", axes)] or range(len(numbers))
    return np.arange(math.prod(numbers)).reshape(numbers).transpose(*order).reshape(-1)


def _split_axes(sizes: dict[str, int], used: list[tuple[str, str, str]]) -> tuple[list[int], list[int]]:
    """A mesh's shape with every axis that is used in part, as in 'axis':(before)size, split; and the axes used."""
    shape: list[int] = []
    members: list[int] = []
    for axis, size in sizes.items():
        parts = [(int(before or 1), int(part or size)) for name, before, part in used if name == axis]
        done = 1
        for before, part in sorted(parts):
            if before > done:
                shape.append(before // done)
            members.append(len(shape))
            shape.append(part)
            done = before * part
        if done < size:
            shape.append(size // done)
    return shape, members


def parameter_sizes(params: Any) -> set[int]:
    """Elements per device of each parameter that is whole over fsdp: of a stack, and of one of its layers.

    params: an abstract tree with shardings.
    """
    sizes = set()
    for leaf in jax.tree.leaves(params):
        split = [axis for axis in leaf.sharding.spec if axis is not None]
        if not split:
            continue
        mesh = leaf.sharding.mesh
        whole = leaf.size // math.prod(mesh.shape[axis] for axis in split if axis != "fsdp")
        sizes |= {whole, whole // leaf.shape[0]}
    return sizes


def purpose(collective: Collective, sizes: set[int]) -> str:
    """The purpose of a collective; `sizes` of `parameter_sizes`."""
    if collective.axes == ("tensor",):
        return TOKENS
    if collective.kind == "reduce-scatter":  # nothing else is, over examples; padded, it need not have a known size
        return GRADIENTS
    if collective.kind == "all-gather" and collective.array.size in sizes:
        return PARAMETERS
    return SUMS if collective.kind == "all-reduce" and "transpose(" in collective.op_name else OTHER


def summary(found: list[Collective], sizes: set[int], activation: int) -> dict[str, Any]:
    """Collectives by kind and by purpose, with count and GiB per step; gathers as large as an activation one by one.

    Args:
      found: of `collectives`.
      sizes: of `parameter_sizes`.
      activation: elements of the smallest activation that should not be gathered: the tokens of one example.
    """

    def total(chosen: list[Collective]) -> dict[str, float]:
        operations = {entry.operation: entry.times for entry in chosen}
        return {
            "count": sum(operations.values()),
            "gib": round(sum(entry.bytes for entry in chosen) / hardware.GIB, 3),
        }

    by_kind, by_purpose = collections.defaultdict(list), collections.defaultdict(list)
    for entry in found:
        by_kind[entry.kind].append(entry)
        by_purpose[purpose(entry, sizes)].append(entry)
    gathers = [entry for entry in by_purpose[OTHER] if entry.kind in ("all-gather", "all-to-all")]
    large = [entry for entry in gathers if entry.array.size >= activation]
    return {
        "by_kind": {kind: total(by_kind[kind]) for kind in KINDS if by_kind[kind]},
        "by_purpose": {
            name: total(by_purpose[name]) for name in (PARAMETERS, GRADIENTS, SUMS, TOKENS, OTHER) if by_purpose[name]
        },
        "activation_sized_all_gathers": sum(entry.times for entry in large),
        "activation_sized": [f"{entry.array.dtype}{list(entry.array.shape)} {entry.op_name}" for entry in large],
    }


def link_seconds(found: list[Collective], chip: hardware.Chip) -> float:
    """Lower bound on the seconds of a step's collectives, with every link of a chip sending all the time."""
    return sum(entry.moved for entry in found) / (chip.link_bandwidth / chip.devices / 2)
