"""The process that `passes.run` starts: compiles one program of a run, for as long as its standard input is open.

That closes with the process that started this one, however it ended; what was written down for it is removed then.
"""

import json
import os
import shutil
import sys
import threading

import jax

from varedit_jax.analysis import passes
from varedit_jax.analysis.jobs import Job
from varedit_jax.errors import UserError


def main() -> None:
    """Compiles the job of the first line of standard input; says on standard output what a compilation raised."""
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, args=(job["options"].get(passes.DUMP),), daemon=True).start()
    jax.config.update("jax_enable_compilation_cache", False)  # a program from there would have no passes
    try:
        Job.from_dict(job).lower().compile(compiler_options=job["options"])
    except (UserError, jax.errors.JaxRuntimeError) as error:
        print(passes.failure(error), flush=True)


def _end_with_parent(directory: str | None) -> None:
    sys.stdin.read()
    if directory:
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
