"""The first seconds of a program, in which it imports: Ctrl-C and a missing extra end it without a stack trace."""

import os
import signal
import sys
import types
from typing import NoReturn

INTERRUPTED = 130  # exit code of a program that Ctrl-C ended, as shells have it
# Packages that an extra installs, by module.
EXTRAS = {
    "apache_beam": "prepare",
    "pyarrow": "prepare",
    "zstandard": "prepare",
    "dask": "dask",
    "distributed": "dask",
    "gcsfs": "gcs",
    "s3fs": "s3",
    "torch": "torch",
    "libtpu": "tpu",
}


def guard_imports() -> None:
    """Guards the imports of the program that is being started, if one is; `command.run` takes over from here.

    For the `__init__.py` of a package with programs: `python -m PACKAGE.PROGRAM` imports it first, with sys.argv[0]
    still "-m". A package that is imported by others is left alone.
    """
    if sys.argv[:1] != ["-m"]:
        return
    sys.excepthook = _report
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell lets jobs in the background ignore it
        # At once: an exception would be caught, or printed, by whatever is being imported.
        signal.signal(signal.SIGINT, _interrupted)


def release() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def missing_extra(error: BaseException) -> str | None:
    """Returns a sentence about the extra to install if that is why an import failed."""
    module = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if module not in EXTRAS:
        return None
    return needs("this", module, EXTRAS[module])


def needs(what: str, module: str, extra: str) -> str:
    """Returns the sentence that `what` needs a package, and how to install it."""
    return f"{what} needs the package {module}; install it with pip install 'varedit-jax[{extra}]'"


def _interrupted(number: int, frame: types.FrameType | None) -> NoReturn:
    del number, frame
    os.write(2, b"error: interrupted\n")
    os._exit(INTERRUPTED)


def _report(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    if sentence := missing_extra(error):
        print(f"error: {sentence}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
