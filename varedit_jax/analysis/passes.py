"""A compilation for a TPU up to the assignment of memory, in a process that ends there.

What libtpu does until then (passes over the program, schedule, memory of each array) is quick; the code that it then
generates takes most of the time, and neither memory nor collectives change by it. libtpu writes down what it has by
then, if the options of `OPTIONS` ask for it (0.0.42.1).
"""

import contextlib
import dataclasses
import glob
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax

from varedit_jax.errors import UserError

COMMAND = (sys.executable, "-m", "varedit_jax.analysis.compile_child")
DUMP = "xla_dump_to"  # the option that names the directory
OPTIONS = {"xla_dump_hlo_as_text": True}
# The program, scheduled and with its memory assigned, is the last that is written; the assignment is there before it.
_PROGRAM = ".after_optimizations_after_buffer_assignment.txt"
_ASSIGNMENT = ".after_optimizations-buffer-assignment.txt"
_SECONDS = 0.3  # between looks at the directory


@dataclasses.dataclass(frozen=True)
class Assigned:
    """A program whose memory is assigned, and that has no code yet."""

    text: str  # as of `compiled.as_text()`, without the estimated cycles
    arguments: int  # bytes of HBM of one device, as the next ones
    outputs: int
    donated: int  # of the outputs: in the place of arguments
    total: int  # arguments, outputs, temporaries and constants


def run(job: dict[str, Any], command: Sequence[str] = COMMAND) -> Assigned:
    """Returns what the compiler has when it begins to generate code: `command` compiles the job and is ended then.

    The job goes to its standard input as a line of JSON, with `options` for the compiler; standard input stays open for
    as long as the process should live. What it raises comes as `failure`, a line of JSON on its standard output.

    Raises:
      UserError: as the process does, or if the compiler wrote down nothing.
      jax.errors.JaxRuntimeError: as the process does, for a program that is too large, too.
      RuntimeError: if the process ends in another way.
    """
    with tempfile.TemporaryDirectory(prefix="varedit-passes-") as directory, tempfile.TemporaryFile("w+") as errors:
        job = job | {"options": {**OPTIONS, DUMP: directory}}
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert child.stdin and child.stdout
        try:
            child.stdin.write(json.dumps(job) + "\n")
            child.stdin.flush()
            assigned = _wait(child, directory)
            if assigned:
                return assigned
            said = child.stdout.read().splitlines()
        except BrokenPipeError:  # it ended before it read
            child.wait()
            said = []
        finally:
            child.kill()  # of no effect if it has ended
            child.wait()
            child.stdout.close()
            _close(child.stdin)
        if said:
            _raise(json.loads(said[-1]))
        if child.returncode:
            errors.seek(0)
            raise RuntimeError(f"the compiling process ended with {child.returncode}: {errors.read().strip()[-2000:]}")
        raise UserError(
            "this libtpu did not write down the program and its memory before it generated code (0.0.42.1 does, by "
            f"{DUMP}); compile the whole program, without --memory_only"
        )


def _close(stream: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # by what was still to be written
        stream.close()


def _raise(failure: dict[str, str]) -> None:
    kinds = {"UserError": UserError, "JaxRuntimeError": jax.errors.JaxRuntimeError}
    raise kinds[failure["kind"]](failure["message"])


def failure(error: UserError | jax.errors.JaxRuntimeError) -> str:
    """Returns the line by which a compiling process says what it raised."""
    return json.dumps(
        {"kind": "UserError" if isinstance(error, UserError) else "JaxRuntimeError", "message": str(error)}
    )


def _wait(child: "subprocess.Popen[str]", directory: str) -> Assigned | None:
    """What the process has written down, as soon as it is complete; None if it ends without."""
    size = -1
    while True:
        ended = child.poll() is not None
        # One program may be tried several times, each under a number of its own; the last one counts.
        found = max(glob.glob(os.path.join(glob.escape(directory), f"*{_PROGRAM}")), default="")
        before, size = size, os.path.getsize(found) if found else -1
        if found and (ended or size == before):
            with open(found) as file:
                text = file.read()
            if complete(text):
                with open(found.removesuffix(_PROGRAM) + _ASSIGNMENT) as file:
                    return Assigned(text, *assigned_bytes(file.read()))
        if ended:
            return None
        time.sleep(_SECONDS)


def complete(text: str) -> bool:
    """Returns True for a program's text as a whole: its entry computation, the last one, has an end."""
    return "\nENTRY " in text and text.rstrip().endswith("\n}")


def assigned_bytes(text: str) -> tuple[int, int, int, int]:
    """Bytes of HBM of an assignment of memory: of arguments, outputs, outputs in the place of arguments, and all.

    Each allocation has a line; those of other memories (VMEM, SMEM, ...) have a color.
    """
    arguments = outputs = donated = total = 0
    for size, about in re.findall(r"^allocation \d+: size (\d+)(.*)$", text, re.MULTILINE):
        if ", color " in about:
            continue
        is_argument, is_output = ", parameter " in about, "maybe-live-out" in about
        arguments += is_argument * int(size)
        outputs += is_output * int(size)
        donated += (is_argument and is_output) * int(size)
        total += int(size)
    return arguments, outputs, donated, total
