"""The work of a TPU's cores in a compiled step: each instruction's kind, its place in the model, and its seconds.

The compiler estimates the cycles of its own instructions. The kernels of splash attention it does not know: their time
follows from the operations of the tiles that the mask makes them compute.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from varedit_jax import hardware
from varedit_jax.analysis import hlo
from varedit_jax.analysis.hlo import Instruction, Module, arrays

MATMUL, MOVE, ELEMENTWISE, KERNEL = "matmul", "move", "elementwise", "kernel"
KINDS = (MATMUL, MOVE, ELEMENTWISE, KERNEL)

# Operations that put numbers elsewhere, in another order or type, and compute none.
_MOVES = {"copy", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "pad", "concatenate", "reshape"}
_MOVES |= {"reverse", "convert", "bitcast-convert", "reduce-precision"}
# Operations that cost nothing, or fill, and choose between, what a move puts somewhere.
_NEUTRAL = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "broadcast", "iota", "partition-id"}
_NEUTRAL |= {"select", "fusion", "custom-call"}

# Matmuls over a tile of scores in each kernel of splash attention. The backward pass computes the scores again.
MATMULS = {"fwd": 2, "dq": 3, "dkv": 4, "dkv_fused": 5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A call of a kernel of splash attention."""

    name: str  # a key of MATMULS
    rows: int  # examples x heads
    queries: int  # with padding
    keys: int
    head_size: int
    q_block: int
    k_block: int

    @property
    def tiles(self) -> int:
        """Tiles of the scores of one row."""
        return self.queries // self.q_block * (self.keys // self.k_block)

    def computed(self, masks: Sequence[np.ndarray]) -> int:
        """Tiles in which the mask shows anything, which are those that the kernel computes.

        masks: of the model, bool [queries, keys] without padding; if none has this size, all tiles are computed.
        """
        blocks = np.array([self.q_block, self.k_block])
        for mask in masks:
            more_q, more_k = self.queries - mask.shape[0], self.keys - mask.shape[1]
            if 0 <= more_q < self.q_block and 0 <= more_k < self.k_block:
                padded = np.pad(mask, ((0, more_q), (0, more_k)))
                rows, columns = padded.shape // blocks
                return int(padded.reshape(rows, self.q_block, columns, self.k_block).any(axis=(1, 3)).sum())
        return self.tiles

    def flops(self, masks: Sequence[np.ndarray]) -> int:
        """Operations of one call, in whole tiles; `masks` as of `computed`."""
        tile = 2 * self.q_block * self.k_block * self.head_size
        return self.rows * self.computed(masks) * MATMULS[self.name] * tile


def kernel_of(instruction: Instruction) -> Kernel | None:
    """The kernel of splash attention that an instruction calls; None for any other."""
    if instruction.opcode != "custom-call" or 'custom_call_target="tpu_custom_call"' not in instruction.text:
        return None
    called = re.search(r"splash_\w*?_(fwd|dkv|dq)_", instruction.name + instruction.op_name)
    types = arrays(instruction.attribute(r"operand_layout_constraints=\{(.*?\})\}"))
    inputs = [array.shape for array in types if array.dtype[0] in "bf" and len(array.shape) >= 3]
    if not called or len(inputs) < 3:
        return None
    name = called[1]
    queries, keys = inputs[:2]
    # The fused kernel alone gives parts of dq as well, one for each block of keys: [..., blocks, H, L, D].
    if name == "dkv" and any(x.shape[-2:] == queries[-2:] and len(x.shape) > len(queries) for x in instruction.results):
        name = "dkv_fused"
    sizes = {key: int(size) for key, size in re.findall(r'(block_\w+)\\?": (\d+)', instruction.text)}
    which = {"fwd": "", "dq": "_dq"}.get(name, "_dkv")
    return Kernel(
        name=name,
        rows=math.prod(queries[:-2]),
        queries=queries[-2],
        keys=keys[-2],
        head_size=queries[-1],
        q_block=sizes.get(f"block_q{which}", queries[-2]),
        k_block=sizes.get(f"block_kv{which}", keys[-2]),
    )


def kind_of(module: Module, instruction: Instruction) -> str:
    """The kind of an instruction that has an estimate; collectives inside of it do not count."""
    inner = [entry for entry, _ in module.inside(instruction)] or [instruction]
    names = {entry.opcode for entry in inner}
    if names & {"convolution", "dot"}:
        return MATMUL
    computing = any(entry.opcode not in _MOVES | _NEUTRAL and not _is_position(entry) for entry in inner)
    return MOVE if names & _MOVES and not computing else ELEMENTWISE


def _is_position(instruction: Instruction) -> bool:
    """Returns True for arithmetic of positions, and of masks by position."""
    return all(array.dtype[0] in "sup" for array in instruction.results)


@dataclasses.dataclass(frozen=True)
class Piece:
    """An instruction of the schedule that takes the cores time."""

    instruction: Instruction
    kind: str
    each: float  # seconds of one run
    times: int  # per step
    flops: int = 0  # of the matmuls of one run
    kernel: Kernel | None = None

    @property
    def seconds(self) -> float:
        """Per step."""
        return self.each * self.times

    @property
    def operation(self) -> str:
        """Its opcode; of a fusion what the compiler named it after."""
        return (
            re.sub(r"[.\d]+$", "", self.instruction.name)
            if self.instruction.opcode == "fusion"
            else (self.instruction.opcode)
        )


def pieces(
    module: Module, chip: hardware.Chip, masks: Sequence[np.ndarray], efficiency: Mapping[str, float]
) -> dict[tuple[str, str], Piece]:
    """What takes the cores of one device time, by the names of its computation and its own.

    efficiency: share of peak that splash attention reaches in the tiles it computes, `forward` and `backward`.
    """
    found: dict[tuple[str, str], Piece] = {}
    for name, times in module.schedules().items():
        for instruction in module.computations[name].values():
            kernel = kernel_of(instruction)
            if kernel:
                share = efficiency["forward" if kernel.name == "fwd" else "backward"]
                each = kernel.flops(masks) / (share * chip.tflops * 1e12 / chip.devices)
                found[name, instruction.name] = Piece(instruction, KERNEL, each, times, kernel.flops(masks), kernel)
            elif instruction.cycles:
                kind = kind_of(module, instruction)
                inner = [(instruction, name), *module.inside(instruction)]
                flops = sum(hlo.flops(module, entry, body) for entry, body in inner)
                found[name, instruction.name] = Piece(instruction, kind, instruction.cycles / chip.clock, times, flops)
    return found


_TRANSFORMS = re.compile(r"^\w+\((.*)\)$")  # jit(step), transpose(jvp(loss))
_SILENT = {
    "while",
    "body",
    "cond",
    "closed_call",
    "checkpoint",
    "rematted_computation",
    "shard_map",
    "step",
    "pallas_call",
}


def place_of(op_name: str) -> str:
    """The place of an `op_name` of JAX: pass, modules and operation, as in "backward blocks/mlp/dot_general".

    "again" is what is rematerialized, "outside" what is not differentiated, such as the optimizer.
    """
    if not op_name:
        return "(no name)"
    when = "forward" if "jvp(" in op_name else "outside"
    if "rematted_computation" in op_name:
        when = "again"
    elif "transpose(" in op_name:
        when = "backward"
    parts: list[str] = []
    for part in op_name.split("/"):
        while match := _TRANSFORMS.match(part):
            part = match[1]
        if part and part not in (*_SILENT, *parts[-1:]):
            parts.append(part)
    methods = [index for index, part in enumerate(parts) if "." in part]  # of Flax modules: the innermost says enough
    parts = [part for index, part in enumerate(parts) if index not in methods[:-1]]
    return f"{when} {'/'.join(parts if len(parts) <= 5 else [*parts[:3], '..', parts[-1]])}"
