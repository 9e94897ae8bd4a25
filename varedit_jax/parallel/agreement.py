"""What the processes of a run agree on before they go on: all of them do, or all end with the same sentence.

Every function is called by all processes, equally often.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from varedit_jax.causes import exit_code, told
from varedit_jax.errors import UserError

STALE_SECONDS = 30.0  # that a shared file system may show a host what was there before; NFS keeps listings that long
_PAUSE_SECONDS = 1.0
_LEAST_BYTES = 1024  # texts are filled up to powers of two from here, so that few shapes are compiled


class Answer(NamedTuple):
    """What a process gives."""

    value: str
    host: str


def gather(text: str) -> list[str]:
    """Returns the text of every process, by its index."""
    if jax.process_count() == 1:
        return [text]
    data = text.encode()
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(data)))).reshape(-1)
    size = _LEAST_BYTES
    while size < lengths.max():
        size *= 2
    filled = np.zeros(size, np.uint8)
    filled[: len(data)] = np.frombuffer(data, np.uint8)
    found = np.asarray(multihost_utils.process_allgather(filled)).reshape(-1, size)
    return [row[:length].tobytes().decode() for row, length in zip(found, lengths, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises a UserError of the block in all processes, if any of them has one; the block meets no other process.

    All end with the exit code of its cause.
    """
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        own = error
    found = gather("" if own is None else f"{exit_code(own)} {own}")
    if own is not None:
        raise own
    for index, text in enumerate(found):
        if text:
            code, _, sentence = text.partition(" ")
            raise told(int(code), f"in process {index}: {sentence}")


def agreed(read: Callable[[], str], explain: Callable[[list[Answer]], str], seconds: float | None = None) -> str:
    """Returns what `read` gives in all processes.

    As long as they differ it is called again, for `seconds` (STALE_SECONDS by default). Raises UserError, in all
    processes, with the sentence that `explain` makes of the answers, if they still differ then.
    """
    end = time.monotonic() + (STALE_SECONDS if seconds is None else seconds)
    while True:
        late = time.monotonic() >= end
        found = [json.loads(text) for text in gather(json.dumps([read(), socket.gethostname(), late]))]
        answers = [Answer(value, host) for value, host, _ in found]
        if all(answer.value == answers[0].value for answer in answers):
            return answers[0].value
        if found[0][2]:
            raise UserError(explain(answers))
        time.sleep(_PAUSE_SECONDS)


def named(answers: list[Answer]) -> str:
    """Returns the processes, with their hosts, whose answers differ from that of process 0, in words."""
    others = [f"process {index} on {host}" for index, (value, host) in enumerate(answers) if value != answers[0].value]
    return ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
