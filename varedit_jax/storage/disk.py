"""Errors of the machine, such as full disks, which must never be taken for damaged data."""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import sqlite3
from collections.abc import Iterator

from varedit_jax.errors import UserError
from varedit_jax.storage.paths import is_remote

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_MACHINE = _FULL | {
    errno.EMFILE, errno.ENFILE, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.ESTALE, errno.EROFS,
    errno.EAGAIN, errno.EINTR, errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENOTCONN,
    errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.ENXIO, errno.ENODEV, errno.EBUSY,
}  # fmt: skip
_MACHINE_TYPES = (MemoryError, TimeoutError, ConnectionError, sqlite3.OperationalError)
# Libraries that read over a network raise their own errors, from these modules.
_NETWORK_MODULES = (
    "aiohttp.", "botocore.", "aiobotocore.", "google.api_core.", "google.auth.", "gcsfs.", "requests.", "urllib3.",
)  # fmt: skip
# TensorStore's errors about a store or the network begin with these codes.
_STATUS = re.compile(r"(ABORTED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED): ")


def error_number(error: BaseException) -> int | None:
    """Returns the system's error number of an error, or None.

    Orbax, TensorStore and ArrayRecord raise types of their own, with the number or the system's message in the text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if found := re.search(r"os_error_code='(\d+)'", text):
        return int(found.group(1))
    return next((number for number in _MACHINE if os.strerror(number) in text), None)


def is_full(error: BaseException) -> bool:
    """Returns True if an error says that the disk is full, or a quota or the largest file size is reached."""
    return error_number(error) in _FULL


def is_machine_error(error: BaseException | None) -> bool:
    """Returns True if an error, or one of its causes, is the machine's, not the data's.

    With too many open files, missing permissions, too little memory, or a failing disk or network, the data may be
    intact, and reading them later may work.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, _MACHINE_TYPES) or error_number(error) in _MACHINE:
            return True
        if f"{type(error).__module__}.".startswith(_NETWORK_MODULES) or _STATUS.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def reason(error: BaseException) -> str:
    """Returns the message of a system's error, in a few words."""
    number = error_number(error)
    return os.strerror(number) if number is not None else " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def explained(what: str, directory: os.PathLike[str] | str) -> Iterator[None]:
    """Turns a failure of the machine to write `what` in `directory` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_full(error):
            raise UserError(
                f"writing the {what} failed in {directory}: {reason(error)}; what was complete before is intact; make "
                f"room and run the same command again"
            ) from error
        if isinstance(error, OSError) or is_machine_error(error):
            raise UserError(
                f"writing the {what} failed in {directory}: {reason(error)}; put that right and run the same command "
                f"again"
            ) from error
        raise


@contextlib.contextmanager
def read_explained(what: str) -> Iterator[None]:
    """Turns an error of the machine while reading `what` into a UserError, which does not call the data damaged."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_machine_error(error):
            raise
        raise UserError(
            f"cannot read {what}: {reason(error)}; put that right and run the same command again"
        ) from error


def check_room(directory: pathlib.Path, needed: int, what: str, then: str = "") -> None:
    """Raises UserError, ending in `then`, if `directory` has no room for `needed` bytes of `what`.

    Object stores have room for everything.
    """
    if is_remote(directory):
        return
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UserError(
            f"{what} takes up to {size_text(needed)}, but only {size_text(free)} are free in {directory}; make room "
            f"and run the same command again{then}"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def size_text(count: float) -> str:
    """Returns bytes as text, in MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
