"""Errors sorted by cause: the exit code of a program that ends with one, for whoever may start it again."""

import errno
import re
import socket
from collections.abc import Iterator

from varedit_jax.errors import DEFECT, MISTAKE, TEMPORARY, TemporaryError, UserError
from varedit_jax.storage.disk import error_number

# Of a disk, a network or another machine that may be back in a moment. EBUSY and EREMOTEIO are what s3fs makes of
# "slow down" and of a failure inside of the store.
_NUMBERS = frozenset({
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN,
    errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EREMOTEIO, socket.EAI_AGAIN,
})  # fmt: skip
_TYPES = (TimeoutError, ConnectionError)
# Libraries that read over a network derive their own, which are not imported here: they are extras.
NETWORK_TYPES = frozenset({
    "aiohttp.client_exceptions.ClientConnectionError", "aiohttp.client_exceptions.ClientPayloadError",
    "botocore.exceptions.ConnectionError", "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError", "gcsfs.retry.ChecksumError", "google.api_core.exceptions.RetryError",
    "google.auth.exceptions.TransportError", "requests.exceptions.ChunkedEncodingError",
    "requests.exceptions.ConnectionError", "requests.exceptions.Timeout", "urllib3.exceptions.ProtocolError",
    "urllib3.exceptions.TimeoutError",
})  # fmt: skip
_JAX = "jax.errors.JaxRuntimeError"
# TensorStore's errors begin with a status; ABORTED is what it says after its last try.
_STORE = re.compile(r"(ABORTED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED): ")
# What JAX (0.10.2), Gloo and NCCL say where another process of the run is gone; Gloo's come as a ValueError.
_STATUS = re.compile(r"[A-Z_]+: ")
_LOST = re.compile(
    r"UNAVAILABLE|DEADLINE_EXCEEDED|heartbeat|coordination service|connection (closed|reset) by"
    r"|remote process exited|Gloo \S+ failed",
    re.IGNORECASE,
)


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a program that ends with an error: 75, 1 after a UserError, or 70 after a defect."""
    if is_temporary(error):
        return TEMPORARY
    return MISTAKE if isinstance(error, UserError) else DEFECT


def told(code: int, sentence: str) -> UserError:
    """Returns the error of another process, which has told its sentence and its exit code."""
    return TemporaryError(sentence) if code == TEMPORARY else UserError(sentence)


def is_temporary(error: BaseException) -> bool:
    """Returns True if an error, or one of its causes, may be gone when the same command is run again.

    So may a failing disk, network or object store, a lost process of the run, and a lock that another process holds.
    A full disk, missing permissions and memory that does not suffice stay.
    """
    causes = list(_causes(error))
    if any(isinstance(cause, TemporaryError) for cause in causes):
        return True
    # What a store answered says more than what a library makes of it: s3fs makes EIO of a code that it does not know.
    statuses = [status for cause in causes if (status := _http_status(cause))]
    return any(map(_may_change, statuses)) if statuses else any(map(_is_temporary, causes))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and its causes; what else was being handled counts unless it was raised `from None`."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        context = None if following.__suppress_context__ else following.__context__
        reason = getattr(following, "reason", None)  # of a urllib.error.URLError
        following = following.__cause__ or context or (reason if isinstance(reason, BaseException) else None)


def _is_temporary(error: BaseException) -> bool:
    if isinstance(error, UserError):  # its words are not the system's; its cause decides
        return False
    if isinstance(error, _TYPES) or error_number(error) in _NUMBERS:
        return True
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    text = str(error)
    if _JAX in names:  # where RESOURCE_EXHAUSTED is the memory of a device
        return bool(_LOST.search(text))
    return bool(names & NETWORK_TYPES or _STORE.match(text) or (_STATUS.match(text) and _LOST.search(text)))


def _http_status(error: BaseException) -> int | None:
    """Returns the status, 400 to 599, with which a server refused; None if an error has none.

    It is `code` in gcsfs (maybe as text), google.api_core and urllib, `status` in aiohttp, and in `response` of
    botocore and requests.
    """
    response = getattr(error, "response", None)
    metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    found = (
        error.status if hasattr(error, "status") else getattr(error, "code", None),  # aiohttp deprecates its `code`
        getattr(response, "status_code", None),
        metadata.get("HTTPStatusCode"),
    )
    texts = (f"{status:d}" if isinstance(status, int) else str(status) for status in found)
    return next((int(text) for text in texts if re.fullmatch(r"[45]\d\d", text)), None)


def _may_change(status: int) -> bool:
    """Returns True for "time-out", "too many requests", and errors of the server."""
    return status in (408, 429) or status >= 500
