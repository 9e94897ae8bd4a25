"""Measures the conversion of a full-size transformer on this machine (time, memory), and checks that no byte changes.

    python -m experiments.benchmarks.conversion --preset=2b --directory=/tmp/conversion --output=results/conversion.md

Makes a file of random weights with the published names and shapes, converts it to our format, back to .pth and to
safetensors shards, each in its own process whose peak memory is sampled; kills one conversion halfway and resumes it.
The directory needs three times the size of the file (2B: 8.8 GB) and is removed at the end.
"""

import pathlib
import shutil

from absl import flags

from experiments import program
from experiments.benchmarks import harness
from varedit_jax import command
from varedit_jax.config import preset
from varedit_jax.conversion import convert
from varedit_jax.errors import UserError
from varedit_jax.weights.manifest import read_manifest

_PRESET = flags.DEFINE_string("preset", "2b", "size of the transformer")
_DIRECTORY = command.DEFINE_path("directory", None, "new directory to work in", local=True, required=True)
_ZEROS = flags.DEFINE_bool("zeros", False, "weights of zeros, in a sparse file")
_BRIEF = flags.DEFINE_bool("brief", False, "without the killed conversion and safetensors")
_OUTPUT = command.DEFINE_path("output", "", "Markdown file for the table")

_CONVERT = "experiments.convert"


def _kill_half_way(output: pathlib.Path, tensors: int, *arguments: str) -> int:
    """Kills a conversion when half of the tensors are done; returns their number."""
    print("\n=== the same, killed halfway", flush=True)
    journal = output.with_name(f".{output.name}.partial") / "journal.jsonl"

    def lines() -> int:
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    harness.kill_program(
        lambda: lines() > tensors // 2, "a larger --preset", _CONVERT, *arguments, f"--output={output}"
    )
    return lines() - 1


def _identical(one: pathlib.Path, other: pathlib.Path) -> int:
    """Returns the number of tensors of two outputs. Raises UserError naming those with other bytes or types."""
    sums = [
        {entry["name"]: (entry["dtype"], entry["sha256"]) for entry in (read_manifest(directory) or {})["tensors"]}
        for directory in (one, other)
    ]
    different = [name for name in sums[0] | sums[1] if sums[0].get(name) != sums[1].get(name)]
    if different:
        raise UserError(f"{len(different)} tensors changed on the way: {', '.join(different[:5])}")
    return len(sums[0])


def _report(size: int, measured: dict[str, harness.Measured], tensors: int, killed: int) -> str:
    rows = [
        (title, f"{seconds:.1f}", f"{size / 1e6 / seconds:.0f}", f"{peak / 1e9:.2f}")
        for title, (seconds, peak) in measured.items()
    ]
    return harness.report(
        f"Conversion of a full-size transformer: {_PRESET.value}",
        harness.command_line("experiments.benchmarks.conversion", _PRESET, _DIRECTORY, _ZEROS, _BRIEF, _OUTPUT),
        f"float32 {'zeros' if _ZEROS.value else 'random weights'}, {tensors} tensors, {size / 1e9:.2f} GB. Peak "
        "memory: resident, of the whole process, sampled. Seconds are of the whole program.",
        harness.table(["", "seconds", "MB/s", "peak memory, GB"], rows),
        f"All {tensors} tensors come back with the same type and bytes (SHA-256)."
        + (f" The killed conversion (SIGKILL) had {killed} tensors done, and did not repeat them." if killed else ""),
    )


def main(argv: list[str]) -> None:
    """Makes, converts, kills, compares."""
    del argv
    measured: dict[str, harness.Measured] = {}

    def convert_and_measure(title: str, *arguments: str) -> None:
        measured[title] = harness.run_program(_CONVERT, *arguments, title=title)

    with harness.scratch_directory(_DIRECTORY.value) as directory:
        source, ours, back = directory / "varedit.pth", directory / "ours", directory / "published"
        size = harness.make_published(source, preset(_PRESET.value), "transformer", zeros=_ZEROS.value)
        tensors, killed = len(convert.mapping_of(preset(_PRESET.value), ["transformer"])), 0
        inwards = [f"--transformer={source}"]
        convert_and_measure("published .pth to ours", *inwards, f"--output={ours}")
        if not _BRIEF.value:
            shutil.rmtree(ours)
            killed = _kill_half_way(ours, tensors, *inwards)
            convert_and_measure("the same, resumed", *inwards, f"--output={ours}")
        convert_and_measure("checksums of ours verified", f"--verify={ours}")
        for form in ("pth",) if _BRIEF.value else ("pth", "safetensors"):
            title = {"pth": "ours to .pth", "safetensors": "ours to safetensors shards of 5 GB"}[form]
            convert_and_measure(title, "--to=torch", f"--input={ours}", f"--output={back}", f"--format={form}")
            tensors = _identical(ours, back)
            convert_and_measure(f"checksums of the {form} verified", f"--verify={back}")
            shutil.rmtree(back)
    harness.publish(_report(size, measured, tensors, killed), _OUTPUT.value)


if __name__ == "__main__":
    program.run(main)
