"""Measures what loading an editor takes: bytes on the device by part and type, memory of the host above them, time.

    python -m experiments.benchmarks.loading --make=2b --checkpoint=/tmp/loading --output=results/loading.md
    python -m experiments.benchmarks.loading --checkpoint=weights/varedit_8b_512 --dtype=bfloat16

With `--make` the directory of weights is made first: published files of random weights of all parts of a size,
converted as any others (2B: 14 GB, and while it is made as much again). It stays, for other programs.
"""

import dataclasses
from collections.abc import Iterator

import jax
from absl import flags

from experiments import program
from experiments.benchmarks import harness
from varedit_jax import command
from varedit_jax.config import PRESETS, ComputeType, preset
from varedit_jax.parameters import bytes_by_type, stored_params
from varedit_jax.sampling import loading
from varedit_jax.weights.directory import PARTS

_CHECKPOINT = command.DEFINE_path("checkpoint", None, "directory of weights or of a run to load", required=True)
_MAKE = flags.DEFINE_enum("make", "", ["", *PRESETS[1:]], "make it first, of this size, where nothing is yet")
_DTYPE = flags.DEFINE_string("dtype", None, "type to load it in; its own by default")
_OUTPUT = command.DEFINE_path("output", "", "Markdown file for the table")

_PROGRAM = "experiments.benchmarks.loading"


def _make() -> None:
    """Makes the directory of weights, and measures it in another process."""
    with harness.scratch_directory(f"{_CHECKPOINT.value}.published") as published:
        files = {part: published / f"{part}.pth" for part in PARTS}
        for part, path in files.items():
            harness.make_published(path, preset(_MAKE.value), part)
        given = [f"--{part}={path}" for part, path in files.items()]
        harness.run_program(
            "experiments.convert", *given, "--family=varedit", f"--output={_CHECKPOINT.value}", title="converted"
        )
    given = [f"--{flag.name}={flag.value}" for flag in (_CHECKPOINT, _DTYPE, _OUTPUT) if flag.value]
    harness.run_program(_PROGRAM, *given)


def _gb(size: int) -> str:
    return f"{size / 1e9:.3f}"


def _counted() -> Iterator[tuple[str, ...]]:
    """Size, type and GB of each part, and of all, of published editors, by counting."""
    types: tuple[ComputeType, ...] = ("bfloat16", "float32")
    for name in ("2b", "8b", "20b"):
        for dtype in types:
            config = preset(name)
            config = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, dtype=dtype))
            sizes = [sum(bytes_by_type(stored_params(config, part, dtype)).values()) for part in PARTS]
            yield (name, dtype, *map(_gb, sizes), _gb(sum(sizes)))


def main(argv: list[str]) -> None:
    """Makes, loads, reports."""
    del argv
    if _MAKE.value:
        _make()
        return
    jax.local_devices()
    before = harness.own_memory()
    seconds, loaded = harness.timed(loading.load, _CHECKPOINT.value, dtype=_DTYPE.value)
    after = harness.own_memory()
    arrays = jax.tree.leaves(loaded.params)
    held, largest = sum(leaf.nbytes for leaf in arrays), max(leaf.nbytes for leaf in arrays)
    on_device = [
        (part, dtype, _gb(size)) for part in PARTS for dtype, size in bytes_by_type(loaded.params[part]).items()
    ]
    measured = [
        ("arrays of parameters", _gb(held)),
        ("largest of them", _gb(largest)),
        ("resident before", _gb(before.now)),
        ("resident afterwards, above before", _gb(after.now - before.now)),
        ("peak of resident memory, above before", _gb(after.most - before.now)),
        ("peak less the arrays", _gb(after.most - before.now - held)),
        ("seconds", f"{seconds:.1f}"),
        ("GB/s", f"{held / 1e9 / seconds:.2f}"),
    ]
    text = harness.report(
        "Loading an editor",
        harness.command_line(_PROGRAM, _CHECKPOINT, _DTYPE),
        f"Device: {jax.devices()[0].device_kind}. On a CPU the arrays are themselves resident memory of the process, "
        "and what the host needs above them is the peak less the arrays; elsewhere it is the largest array more.",
        "Bytes on the device, by part and type (GB):",
        harness.table(["part", "type", "GB"], on_device),
        "Memory (GB) and time:",
        harness.table(["", ""], measured),
        "Counted, not loaded (GB): Flan-T5-XL, and matrices of the blocks, in the type; all else in float32.",
        harness.table(["editor", "type", *PARTS, "all"], list(_counted())),
    )
    harness.publish(text, _OUTPUT.value)


if __name__ == "__main__":
    program.run(main)
