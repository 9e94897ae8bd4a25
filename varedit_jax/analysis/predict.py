"""The time of a step, predicted from its compiled program: by kind of work, with what of the collectives is exposed.

Nothing runs. Work that the TPU's compiler estimates counts as estimated; splash attention and the links count by
formula, with the `ASSUMPTIONS` that every prediction prints. The range of a prediction is over these alone: how far
the compiler's own estimate is off, no program says.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from varedit_jax import hardware
from varedit_jax.analysis import links, timeline, work
from varedit_jax.analysis.hlo import Module
from varedit_jax.analysis.timeline import GATHERS, SCATTERS, Timeline, Traffic
from varedit_jax.analysis.work import ELEMENTWISE, MATMUL, MOVE, Piece
from varedit_jax.errors import UserError

Prediction = dict[str, Any]  # ready for JSON

WORST = 10  # moves, elementwise operations and matmuls that are listed
CASES = ("best", "expected", "worst")


@dataclasses.dataclass(frozen=True)
class Assumption:
    """A number that no program states."""

    best: float
    expected: float
    worst: float
    means: str


ASSUMPTIONS = {
    "splash_forward": Assumption(
        0.70, 0.60, 0.45, "share of peak in the tiles that splash attention computes, forward"
    ),
    "splash_backward": Assumption(
        0.65, 0.50, 0.40, "the same, backward, with the scores that dq and dkv compute again"
    ),
    "link_share": Assumption(0.95, 0.90, 0.80, "share of a link's nominal speed, one way, that transfers reach"),
    "ring_directions": Assumption(
        2, 2, 1, "ways around a ring that a color of StrategyRing or StrategyND sends at once"
    ),
}

NOT_COUNTED = (
    "latency of collectives",
    "DCN between slices",
    "copies between HBM and VMEM behind compute, which the compiler does not estimate",
    "input, checkpoints and the host",
)


def predict(
    module: Module,
    chip: hardware.Chip,
    mesh: Mesh,
    model_tflop: float,
    transformer_tflop: float,
    masks: Sequence[np.ndarray] = (),
) -> Prediction:
    """The prediction for a scheduled program.

    Args:
      module: of one device.
      chip: that it is compiled for; a TPU.
      mesh: of the devices that the program numbers.
      model_tflop: model operations of a step over all devices, with those of the frozen encoders, 1e12.
      transformer_tflop: the same without the encoders.
      masks: of the model's self-attention, as of `work.Kernel.computed`.
    """
    peak = chip.tflops / chip.devices * mesh.size
    runs: dict[str, Timeline] = {}
    for case in ("worst", "best", "expected"):  # the last one is described
        assumed = in_case(ASSUMPTIONS, case)
        efficiency = {"forward": assumed["splash_forward"], "backward": assumed["splash_backward"]}
        found = work.pieces(module, chip, masks, efficiency)
        model = links.of_chip(chip, assumed["link_share"], assumed["ring_directions"])
        runs[case] = timeline.walk(module, mesh, model, {key: piece.each for key, piece in found.items()})
    step = runs["expected"].seconds
    kinds = sums(found.values(), "kind") | {"exposed collectives": runs["expected"].exposed}
    moves, elementwise, matmuls = (
        [piece for piece in found.values() if piece.kind == kind] for kind in (MOVE, ELEMENTWISE, MATMUL)
    )
    speed = chip.tflops * 1e12 / chip.devices
    traffic = runs["expected"].traffic
    return {
        "method": "estimated cycles of the compiler; kernels and links by formula",
        **step_figures({case: run.seconds for case, run in runs.items()}, model_tflop, transformer_tflop, peak),
        "seconds_by_kind": {name: rounded(seconds) for name, seconds in kinds.items()},
        "moves_share": rounded(kinds.get(MOVE, 0.0) / step),
        "moves_by_operation": {name: rounded(seconds) for name, seconds in sums(moves, "operation").items()},
        "worst_moves": _worst(moves),
        "worst_elementwise": _worst(elementwise),
        "matmul_share_of_peak": rounded(sum(x.flops * x.times for x in matmuls) / speed / kinds.get(MATMUL, math.inf)),
        "worst_matmuls": _worst(matmuls, speed),
        "collectives": {kind: _traffic(entry) for kind, entry in traffic.items()},
        "exposed_gathers_share": _exposed_share(traffic.get(GATHERS)),
        "exposed_scatters_share": _exposed_share(traffic.get(SCATTERS)),
        "kernels": _kernels(found.values(), masks),
        "assumptions": {
            "clock_ghz": rounded(chip.clock / 1e9),
            "link_gb_per_second": rounded(links.nominal(chip) / 1e9),
            "links": chip.links,
            **described(ASSUMPTIONS),
        },
        "not_counted": list(NOT_COUNTED),
    }


def described(assumptions: Mapping[str, Assumption]) -> dict[str, Any]:
    """Assumptions, ready for JSON."""
    return {
        name: {**{case: getattr(entry, case) for case in CASES}, "means": entry.means}
        for name, entry in assumptions.items()
    }


def in_case(assumptions: Mapping[str, Assumption], case: str) -> dict[str, float]:
    """Their numbers in one of CASES."""
    return {name: getattr(entry, case) for name, entry in assumptions.items()}


def step_figures(seconds: Mapping[str, float], model_tflop: float, transformer_tflop: float, peak: float) -> Prediction:
    """The step's time and MFU; `seconds` by case, `peak` of all devices in 1e12 operations/s."""
    step = seconds["expected"]
    return {
        "seconds": rounded(step),
        "seconds_range": [rounded(seconds[case]) for case in ("best", "worst")],
        "mfu_with_encoders": rounded(model_tflop / peak / step),
        "mfu_with_encoders_range": [rounded(model_tflop / peak / seconds[case]) for case in ("worst", "best")],
        "mfu": rounded(transformer_tflop / peak / step),
    }


def check(predicted: Prediction, max_moves: float | None, max_exposed_gathers: float | None) -> None:
    """Raises UserError if moves take a larger share of the step, or more of the gathered bytes are exposed, than asked.

    Both bounds are shares, 0 to 1; None: any. A prediction for a GPU has no moves and collectives of its own to ask.
    """
    if max_moves is None and max_exposed_gathers is None:
        return
    if "collectives" not in predicted:
        raise UserError("--max_moves and --max_exposed_gathers ask a TPU's program; leave them out with --stand_in_for")
    share = predicted["moves_share"]
    if max_moves is not None and share > max_moves:
        first = predicted["worst_moves"][0]
        raise UserError(
            f"moves take {share:.3f} of the predicted step, more than --max_moves={max_moves:g}; the worst is "
            f"{first['operation']} {first['shape']} in {first['place']}: {first['seconds']:.3g} s"
        )
    share = predicted["exposed_gathers_share"]
    if max_exposed_gathers is not None and share > max_exposed_gathers:
        seconds = predicted["collectives"][GATHERS]["exposed_seconds"]
        raise UserError(
            f"{share:.3f} of the gathered bytes do not move under compute, more than "
            f"--max_exposed_gathers={max_exposed_gathers:g}: {seconds:.3g} s of the predicted step"
        )


def sums(found: Iterable[Piece], name: str) -> dict[str, float]:
    """Seconds by an attribute of the pieces, largest first."""
    totals: dict[str, float] = collections.defaultdict(float)
    for piece in found:
        totals[getattr(piece, name)] += piece.seconds
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def _traffic(entry: Traffic) -> dict[str, float]:
    return {
        "count": entry.count,
        "gib": rounded(entry.bytes / hardware.GIB),
        "seconds": rounded(entry.seconds),
        "exposed_seconds": rounded(entry.exposed),
        "exposed_share": _exposed_share(entry),
        "compute_before_use_seconds": rounded(entry.before_use),
    }


def _exposed_share(entry: Traffic | None) -> float:
    """The share of the bytes that do not move under compute."""
    return rounded(entry.exposed_bytes / entry.bytes) if entry and entry.bytes else 0.0


def _worst(found: Iterable[Piece], speed: float = math.inf) -> list[dict[str, Any]]:
    """What costs most beyond its operations at `speed`, operations/s; of one place, operation and shape together."""
    groups: dict[tuple[str, str, str], list[Piece]] = collections.defaultdict(list)
    for piece in found:
        largest = max(piece.instruction.results, key=lambda array: array.bytes)
        shape = f"{largest.dtype}{list(largest.shape)}".replace(" ", "")
        groups[work.place_of(piece.instruction.op_name), piece.operation, shape].append(piece)
    rows: list[dict[str, Any]] = [
        {
            "seconds": rounded(sum(piece.seconds for piece in group)),
            "seconds_at_peak": rounded(sum(piece.flops * piece.times for piece in group) / speed),
            "times": sum(piece.times for piece in group),
            "operation": operation,
            "shape": shape,
            "place": place,
            "instruction": max(group, key=lambda piece: piece.seconds).instruction.name,
        }
        for (place, operation, shape), group in groups.items()
    ]
    return sorted(rows, key=lambda row: row["seconds_at_peak"] - row["seconds"])[:WORST]


def _kernels(found: Iterable[Piece], masks: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Kernels, those of one size together."""
    groups: dict[work.Kernel, list[Piece]] = collections.defaultdict(list)
    for piece in found:
        if piece.kernel:
            groups[piece.kernel].append(piece)
    rows: list[dict[str, Any]] = [
        {
            "kernel": kernel.name,
            "queries": kernel.queries,
            "keys": kernel.keys,
            "computed_tiles": kernel.computed(masks),
            "tiles": kernel.tiles,
            "times": sum(piece.times for piece in group),
            "tflop": rounded(sum(piece.times for piece in group) * kernel.flops(masks) / 1e12),
            "seconds": rounded(sum(piece.seconds for piece in group)),
        }
        for kernel, group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["seconds"])


def rounded(value: float) -> float:
    """To four digits."""
    return float(f"{value:.4g}")


def lines(predicted: Prediction) -> list[str]:
    """The prediction for people."""
    step = predicted["seconds"]
    low, high = predicted["seconds_range"]
    worst, best = (100 * share for share in predicted["mfu_with_encoders_range"])
    rows = [
        f"predicted step: {step:.4g} s ({low:.4g} .. {high:.4g}); MFU with encoders "
        f"{100 * predicted['mfu_with_encoders']:.1f} % ({worst:.1f} .. {best:.1f}), MFU {100 * predicted['mfu']:.1f} %",
        predicted["method"],
        *_listed("by kind", predicted["seconds_by_kind"], step),
    ]
    if "collectives" in predicted:
        rows += _details(predicted)
    rows.append("assumed (best, expected, worst):")
    for name, value in predicted["assumptions"].items():
        if isinstance(value, dict):
            value = f"{value['best']:g}, {value['expected']:g}, {value['worst']:g}: {value['means']}"
        rows.append(f"  {name} {value}")
    return [*rows, f"not counted: {'; '.join(predicted['not_counted'])}"]


def _details(predicted: Prediction) -> list[str]:
    """What is known of a program for the machine itself."""
    rows = [
        *_listed("moves by operation", predicted["moves_by_operation"], predicted["seconds"]),
        "collectives: seconds of the links, of these exposed (share of the bytes), compute between them and first uses",
    ]
    rows += [
        f"  {kind:18s} {entry['gib']:8.3f} GiB {entry['count']:6d} x {entry['seconds']:9.4g} s "
        f"{entry['exposed_seconds']:9.4g} s ({100 * entry['exposed_share']:5.1f} %) "
        f"{entry['compute_before_use_seconds']:9.4g} s"
        for kind, entry in predicted["collectives"].items()
    ]
    rows.append("kernels, by formula: queries x keys, tiles computed")
    rows += [
        f"  {row['kernel']:9s} {row['queries']:6d} x {row['keys']:<6d} {row['computed_tiles']:4d} of {row['tiles']:<4d}"
        f"{row['times']:6d} x {row['seconds']:9.4g} s"
        for row in predicted["kernels"]
    ]
    for title, name in (("moves", "worst_moves"), ("elementwise operations", "worst_elementwise")):
        rows.append(f"the {WORST} worst {title}:")
        rows += [f"  {row['seconds']:9.4g} s {_what(row)}" for row in predicted[name]]
    rows.append(f"matmuls at {100 * predicted['matmul_share_of_peak']:.1f} % of peak; the {WORST} that lose most:")
    rows += [
        f"  {row['seconds']:9.4g} s, at peak {row['seconds_at_peak']:9.4g} s {_what(row)}"
        for row in predicted["worst_matmuls"]
    ]
    return rows


def _what(row: dict[str, Any]) -> str:
    return f"{row['times']:6d} x {row['operation']} {row['shape']} in {row['place']}"


def _listed(title: str, seconds: dict[str, float], step: float) -> list[str]:
    shares = {name: 100 * value / step for name, value in seconds.items()}
    seen = [name for name, share in shares.items() if share >= 0.05]
    return [f"{title}:", *(f"  {seconds[name]:9.4g} s {shares[name]:5.1f} % {name}" for name in seen)]
