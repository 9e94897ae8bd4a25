"""The roll call: before JAX connects the processes of a run, process 0 sees that each is there, and there once.

JAX (0.10.2) aborts a process, without an exception or after minutes, where a port is taken, an index is given twice or
the counts differ. So process 0 first listens on the port itself. Whoever connects is greeted and says which process it
is; at the end all get the same answer, and the port is JAX's. Every line is `varedit_jax TEXT`.
"""

import contextlib
import errno
import os
import socket
import sys
import threading
import time

from varedit_jax.causes import told
from varedit_jax.errors import MISTAKE, TEMPORARY, TemporaryError, UserError

_NAME = "varedit_jax"  # begins every line
_LONGEST = 4096  # bytes of a line
_RETRY_SECONDS = 0.2
_GREETING_SECONDS = 10.0  # in which process 0 greets whoever connects; another program does not
_QUIET_SECONDS = 10.0  # after which a waiting process says for whom


def call_roll(coordinator: str, count: int, index: int, seconds: float) -> None:
    """Returns, in all processes, when all `count` of them have called it; `index` is that of this one.

    `coordinator` is "HOST:PORT", the address of process 0. Others wait for process 0, and it for them, for `seconds`.

    Raises UserError in all processes that came, if an index came twice or the counts differ, and a TemporaryError if
    some did not come. Process 0 also raises UserError if its port is taken or the address is not its own.
    """
    host, _, port = coordinator.rpartition(":")
    place = host.strip("[]"), int(port)
    if index == 0:
        with _listening(coordinator, place[1]) as listener:
            _reach_itself(coordinator, place, listener)
            _Roll(coordinator, count, listener).take(seconds)
    else:
        _call(coordinator, place, f"{index} {count}", seconds)


class _Roll:
    """Those who came to process 0."""

    def __init__(self, coordinator: str, count: int, listener: socket.socket) -> None:
        self._coordinator, self._count, self._listener = coordinator, count, listener
        self._present: dict[int, socket.socket] = {}
        self._mistake = ""
        self._news = threading.Condition()
        self._over = threading.Event()

    def take(self, seconds: float) -> None:
        """Returns when all are there; raises as `call_roll`. All who came get the answer."""
        welcome = threading.Thread(target=self._welcome, name="roll call", daemon=True)
        welcome.start()
        try:
            self._take(seconds)
        finally:
            self._over.set()
            welcome.join()  # or the port would still be taken when JAX listens there

    def _take(self, seconds: float) -> None:
        waiting = _Waiting(seconds)
        with self._news:
            while not self._mistake and len(self._present) < self._count - 1 and not waiting.over():
                self._news.wait(_RETRY_SECONDS)
                waiting.say(f"process {self._missing()} of {self._count}")
            code, sentence = MISTAKE, self._mistake
            if not sentence and len(self._present) < self._count - 1:
                code = TEMPORARY
                sentence = (
                    f"process {self._missing()} of {self._count} did not come to {self._coordinator} within "
                    f"{seconds:g} s; see that all of them were started and can reach process 0, or give "
                    f"--process_count=1 to run alone"
                )
            for connection in self._present.values():
                with contextlib.suppress(OSError), connection:
                    _send(connection, f"{code} {sentence}" if sentence else "")
            self._present = {}
        if sentence:
            raise told(code, sentence)

    def _missing(self) -> str:
        numbers = [str(index) for index in range(1, self._count) if index not in self._present]
        return ", ".join(numbers[:8]) + (f" and {len(numbers) - 8} others" if len(numbers) > 8 else "")

    def _welcome(self) -> None:
        self._listener.settimeout(_RETRY_SECONDS)
        while not self._over.is_set():
            try:
                connection = self._listener.accept()[0]
            except OSError:  # nobody came
                continue
            threading.Thread(target=self._enter, args=(connection,), name="roll call", daemon=True).start()

    def _enter(self, connection: socket.socket) -> None:
        """Adds whoever connected, if it is a process of a run, or finds a mistake."""
        try:
            connection.settimeout(_GREETING_SECONDS)
            _send(connection, "")
            index, count = map(int, _receive(connection).split())
        except (OSError, ValueError):  # somebody else
            connection.close()
            return
        with self._news:
            if count != self._count:
                self._mistake = (
                    f"process 0 was started with --process_count={self._count}, and process {index} with "
                    f"--process_count={count}; give all of them the same"
                )
            elif index in self._present:
                self._mistake = f"two processes were started with --process_index={index}; give each its own"
            if index in self._present:
                index = -1 - len(self._present)  # to be answered, too
            self._present[index] = connection
            self._news.notify()


def _call(coordinator: str, place: tuple[str, int], text: str, seconds: float) -> None:
    """Another process: connects to process 0 until it is there, and returns when it says that all are."""
    waiting = _Waiting(seconds)
    while True:
        try:
            with socket.create_connection(place, timeout=_GREETING_SECONDS) as connection:
                _receive(connection)
                _send(connection, text)
                connection.settimeout(None)
                answer = _receive(connection)
            break
        except (OSError, ValueError) as error:
            why = "another program answers" if isinstance(error, ValueError) else error.strerror or str(error)
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:
                raise _unknown_host(coordinator, error) from error
            if waiting.over():
                raise TemporaryError(
                    f"process 0 does not answer at --coordinator={coordinator} ({why}); start it, or give its address"
                ) from error
            waiting.say(f"process 0 at {coordinator} ({why})")
            time.sleep(_RETRY_SECONDS)
    if answer:
        code, _, sentence = answer.partition(" ")
        raise told(int(code), sentence)


class _Waiting:
    """For how long a process has waited, and a line that says so, once."""

    def __init__(self, seconds: float) -> None:
        self._begin, self._seconds, self._said = time.monotonic(), seconds, False

    def over(self) -> bool:
        return time.monotonic() - self._begin > self._seconds

    def say(self, whom: str) -> None:
        if not self._said and time.monotonic() - self._begin > _QUIET_SECONDS:
            self._said = True
            print(f"waiting for {whom}", file=sys.stderr, flush=True)


def _listening(coordinator: str, port: int) -> socket.socket:
    """Returns a socket that listens where JAX will. Raises UserError if it cannot."""
    host, _, own_port = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", "").rpartition(":")
    both = not host and socket.has_dualstack_ipv6()
    try:
        address = (host.strip("[]"), int(own_port or port))
        return socket.create_server(
            ("::" if both else address[0], address[1]),
            family=socket.AF_INET6 if both or ":" in address[0] else socket.AF_INET,
            backlog=1024,
            dualstack_ipv6=both,
        )
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        why = "another program uses that port" if taken else error.strerror or str(error)
        raise UserError(
            f"process 0 cannot listen at --coordinator={coordinator}: {why}; give another port to all processes"
        ) from error


def _reach_itself(coordinator: str, place: tuple[str, int], listener: socket.socket) -> None:
    """Raises UserError if whoever answers at the address is not this process: JAX would try for minutes."""
    listener.settimeout(_GREETING_SECONDS)
    try:
        with socket.create_connection(place, timeout=_GREETING_SECONDS) as there:
            while True:
                with listener.accept()[0] as here:  # others come again
                    if here.getpeername()[1] == there.getsockname()[1]:
                        return
    except socket.gaierror as error:
        raise _unknown_host(coordinator, error) from error
    except OSError as error:
        raise UserError(
            f"process 0 does not reach itself at --coordinator={coordinator} ({error.strerror or error}); give the "
            f"address of the machine that it runs on to all processes"
        ) from error


def _unknown_host(coordinator: str, error: socket.gaierror) -> UserError:
    return UserError(f"the host of --coordinator={coordinator} is not known ({error.strerror}); give its address")


def _send(connection: socket.socket, text: str) -> None:
    connection.sendall(f"{_NAME} {text}\n".encode())


def _receive(connection: socket.socket) -> str:
    """Returns the text of a line. Raises OSError if the connection ends, ValueError if another program speaks."""
    line = b""
    while not line.endswith(b"\n"):
        more = connection.recv(1)
        if not more:
            raise ConnectionError("the connection was closed")
        line += more
        if not line.startswith(f"{_NAME} ".encode()[: len(line)]) or len(line) > _LONGEST:
            raise ValueError(line)
    return line.decode().removeprefix(_NAME).strip()
