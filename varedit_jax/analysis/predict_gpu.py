"""The time of a step on GPUs, by formula alone: a GPU's compiler does not run without a GPU.

What is multiplied, sent, read and written is taken from the same step compiled for as many TPU chips, the stand-in, by
shapes and numbers of runs: no code and no estimate of the TPU's compiler is needed. How fast a GPU does it is assumed.
No program for a GPU has been asked; this says what a layout may cost, not what a compiler made.
"""

import collections
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from varedit_jax import hardware
from varedit_jax.analysis import compiled, hbm, work
from varedit_jax.analysis.hlo import Module
from varedit_jax.analysis.predict import CASES, Assumption, Prediction, described, in_case, rounded, step_figures

# Published for H100: FlashAttention-3 at 75 % of peak forward and, at most, 58 % backward (arXiv 2407.08608), for long
# sequences without a mask. The softmax of QuACK (2025), written for bandwidth, reaches 3.01 of 3.35 TB/s; the one that
# torch.compile generates, 2.0. A DGX H100 has a network adapter of 400 Gbit/s beside each of its eight GPUs.
ASSUMPTIONS = {
    "matmul_share": Assumption(0.75, 0.65, 0.55, "share of peak in matmuls that memory does not bound"),
    "attention_forward": Assumption(0.70, 0.55, 0.40, "share of peak in attention's visible tiles, forward"),
    "attention_backward": Assumption(
        0.55, 0.45, 0.30, "the same, backward: five matmuls to the two of the forward pass"
    ),
    "memory_share": Assumption(0.90, 0.75, 0.60, "share of HBM's bandwidth in what memory bounds"),
    "moves_kept": Assumption(0.0, 0.3, 0.6, "share of the stand-in's moves that a GPU's program has, too"),
    "network_share": Assumption(0.9, 0.8, 0.6, "share of the slower of NVLink and the node's network that rings reach"),
    "hidden": Assumption(0.95, 0.8, 0.5, "share of the collectives' time under compute"),
}
NODE = 8  # GPUs
ADAPTER = 50e9  # bytes/s of the network, one way, for each GPU


def predict(
    module: Module,
    chip: hardware.Chip,
    mesh: Mesh,
    model_tflop: float,
    transformer_tflop: float,
    masks: Sequence[np.ndarray],
    *,
    gpu: hardware.Chip,
) -> Prediction:
    """The prediction for as many GPUs as the mesh has devices; arguments as of `predict.predict`, for the stand-in."""
    found = hbm.accesses(module, masks)
    moved: dict[str, int] = collections.defaultdict(int)
    flops = {"forward": 0.0, "backward": 0.0}
    for entry in found:
        moved[entry.kind] += entry.times * entry.bytes
        if entry.kernel:
            called, here = entry.kernel.name, entry.times * entry.flops
            if called == "fwd":
                flops["forward"] += here
            else:  # five matmuls, in one kernel
                both = work.MATMULS["dq"] + work.MATMULS["dkv"] if called in ("dq", "dkv") else work.MATMULS[called]
                flops["backward"] += here * 5 / both
    sent = sum(collective.moved for collective in compiled.collectives(module, mesh))
    across = mesh.size > NODE
    speed = min(gpu.link_bandwidth / 2, NODE * ADAPTER) if across else gpu.link_bandwidth / 2
    peak = gpu.tflops * 1e12
    by_case: dict[str, dict[str, float]] = {}
    for case in CASES:
        assumed = in_case(ASSUMPTIONS, case)
        bandwidth = assumed["memory_share"] * gpu.hbm_bandwidth
        by_case[case] = {
            "matmul": sum(
                entry.times * max(entry.flops / (assumed["matmul_share"] * peak), entry.bytes / bandwidth)
                for entry in found
                if entry.kind == work.MATMUL
            ),
            "move": assumed["moves_kept"] * moved[work.MOVE] / bandwidth,
            "elementwise": moved[work.ELEMENTWISE] / bandwidth,
            "kernel": sum(value / (assumed[f"attention_{name}"] * peak) for name, value in flops.items()),
            "exposed collectives": (1 - assumed["hidden"]) * sent / (assumed["network_share"] * speed),
        }
    seconds = {case: sum(parts.values()) for case, parts in by_case.items()}
    expected = by_case["expected"]
    return {
        "method": f"by formula, for {mesh.size} {gpu.name}, from the program of as many devices of {chip.name}",
        **step_figures(seconds, model_tflop, transformer_tflop, gpu.tflops * mesh.size),
        "seconds_by_kind": {kind: rounded(value) for kind, value in expected.items()},
        "moves_share": rounded(expected["move"] / seconds["expected"]),
        "assumptions": {
            "gpus_a_node": NODE,
            "ring_gb_per_second": rounded(speed / 1e9),
            "sent_gib_by_each": rounded(sent / hardware.GIB),
            "elementwise_gib": rounded(moved[work.ELEMENTWISE] / hardware.GIB),
            "moves_gib": rounded(moved[work.MOVE] / hardware.GIB),
            **described(ASSUMPTIONS),
        },
        "not_counted": [
            "whatever a GPU's compiler does differently, such as elementwise work that is fused with matmuls here",
            "launches of kernels",
            "input, checkpoints and the host",
        ],
    }
