"""Command lines: flags, one-line errors, exit codes."""

import logging
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags

from varedit_jax import starting
from varedit_jax.causes import exit_code
from varedit_jax.errors import MISTAKE, TEMPORARY, UserError
from varedit_jax.storage import paths

flags.disclaim_key_flags()  # flags that are defined here belong to the program that asks for them
_AGAIN_SECONDS = 0.05  # until Ctrl-C is repeated, where it could not be raised
_BROKEN_PIPE = 141  # exit code of a program whose output nobody reads any more, as shells have it


def run(main: Callable[[list[str]], Any], sentence: Callable[[str], str | None] = lambda text: None) -> NoReturn:
    """Parses the flags, calls `main(argv)` and exits.

    A UserError, from a flag or from `main`, is printed as one line `error: ...`, and the exit code is 1; so are
    mistaken flags, arguments that are no flags, and a missing extra. Any other exception keeps its stack trace, and the
    exit code is 70. Where the cause may pass by itself, it is 75 in both cases. Ctrl-C ends a program with exit code
    130; a pipe that nobody reads any more (`| head -1`) ends it without a word, with 141.

    `sentence` may give a better sentence for absl's words about a wrong flag.
    """

    def checked(argv: list[str]) -> Any:
        if len(argv) > 1:
            raise UserError(f"unexpected argument {argv[1]!r}; this program takes flags only, see --help")
        return main(argv)

    for library in ("fsspec", "gcsfs", "s3fs"):  # absl would print how they read and write
        logging.getLogger(library).setLevel(logging.WARNING)
    starting.release()
    sys.unraisablehook = unraisable
    try:
        try:
            app.run(checked, flags_parser=lambda argv: _parse_flags(argv, sentence))
        finally:
            if sys.stdout:
                sys.stdout.flush()  # what a pipe may refuse only now
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends what still takes time
        _fail("interrupted", starting.INTERRUPTED)
    except Exception as error:
        if _nobody_reads(error):
            _fall_silent()
        missing = starting.missing_extra(error)
        if missing:
            _fail(missing)
        code = exit_code(error)
        if isinstance(error, UserError):
            _fail(str(error), code)
        sys.excepthook(type(error), error, error.__traceback__)
        if code == TEMPORARY:
            print(f"this may pass by itself; try the same command again (exit code {code})", file=sys.stderr)
        sys.exit(code)
    raise AssertionError("app.run does not return")


def unraisable(report: "sys.UnraisableHookArgs") -> None:
    """Reports an exception where none can be raised, as in a callback of the garbage collector; repeats Ctrl-C."""
    if issubclass(report.exc_type, KeyboardInterrupt):
        threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), signal.SIGINT)).start()
    else:
        sys.__unraisablehook__(report)


def DEFINE_path(
    name: str, default: str | None, about: str, *, local: bool = False, required: bool = False
) -> flags.FlagHolder[str]:
    """Defines a flag for a path: local, gs:// or s3://, or `local` alone. Its value is the text, for `paths.resolve`.

    A path that cannot be used, for want of an extra, say, ends the program as any mistaken flag does.
    """
    serializer = flags.ArgumentSerializer[str]()
    return flags.DEFINE(_PathParser(name, local), name, default, about, serializer=serializer, required=required)


class _PathParser(flags.ArgumentParser[str]):
    def __init__(self, name: str, local: bool) -> None:
        super().__init__()
        self._name, self._local = name, local

    def parse(self, text: str) -> str:
        """Returns the text. Raises UserError if it is no path."""
        if text:
            paths.local(text, f"--{self._name}") if self._local else paths.resolve(text)
        return text


def _parse_flags(argv: list[str], sentence: Callable[[str], str | None]) -> list[str]:
    """Returns the arguments that are no flags; exits with one sentence if a flag is wrong."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # A parser's own error comes wrapped in one that says less.
        if isinstance(error.__context__, UserError):
            _fail(str(error.__context__))
        _fail(sentence(str(error)) or _plain(str(error)))
    except UserError as error:
        _fail(str(error))


def _plain(text: str) -> str:
    """Returns absl's words about a wrong flag as one sentence."""
    missing = re.fullmatch(r"flag --(\w+)=None: Flag --\w+ must have a value other than None\.", text)
    return f"--{missing.group(1)} is missing; see --help" if missing else " ".join(text.split())


def _nobody_reads(error: BaseException | None) -> bool:
    """Returns True if an error comes from printing to a pipe whose reader has gone."""
    while error and not isinstance(error, BrokenPipeError):  # it may have been explained as a failed write
        error = error.__cause__ or error.__context__
    return error is not None and bool(_broken_streams())


def _broken_streams() -> list[int]:
    """Returns the file descriptors of standard output and error that are pipes or sockets without a reader."""
    streams = select.poll()
    for stream in (1, 2):
        streams.register(stream, 0)  # of no interest but that
    return [stream for stream, event in streams.poll(0) if event & (select.POLLERR | select.POLLHUP)]


def _fall_silent() -> NoReturn:
    for stream in _broken_streams():
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.exit(_BROKEN_PIPE)


def _fail(sentence: str, code: int = MISTAKE) -> NoReturn:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(code)
