"""Processes that do not go together learn it, in one sentence, before JAX connects them."""

import concurrent.futures
import contextlib
import socket
import time

import pytest

from varedit_jax.errors import TemporaryError, UserError
from varedit_jax.parallel.roll_call import call_roll


def free_address() -> str:
    """Returns an address of this machine with a port that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def answers(calls: list[tuple[int, int]], seconds: float = 30.0, address: str = "") -> list[UserError | None]:
    """Returns what each of the processes (count, index) of one address gets."""
    address = address or free_address()

    def call(count: int, index: int) -> UserError | None:
        try:
            call_roll(address, count, index, seconds)
        except UserError as error:
            return error
        return None

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, *zip(*calls, strict=True)))


def test_all_are_there_and_the_port_is_free_again() -> None:
    address = free_address()
    for _ in range(3):
        assert answers([(4, 2), (4, 0), (4, 1), (4, 3)], address=address) == [None] * 4
        with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
            pass


@pytest.mark.parametrize(
    ("calls", "sentence"),
    [
        ([(3, 0), (3, 1), (3, 1)], "two processes were started with --process_index=1; give each its own"),
        (
            [(2, 0), (3, 2)],
            "process 0 was started with --process_count=2, and process 2 with --process_count=3; "
            "give all of them the same",
        ),
    ],
)
def test_mistakes_are_told_to_all(calls: list[tuple[int, int]], sentence: str) -> None:
    begin = time.monotonic()
    found = answers(calls)
    assert [str(error) for error in found] == [sentence] * len(calls)
    assert not any(isinstance(error, TemporaryError) for error in found)
    assert time.monotonic() - begin < 10


def test_who_did_not_come_is_named() -> None:
    found = answers([(4, 0), (4, 2)], seconds=0.5)
    assert all(isinstance(error, TemporaryError) for error in found)
    assert all(str(error).startswith("process 1, 3 of 4 did not come to 127.0.0.1:") for error in found)


def test_a_port_in_use() -> None:
    address = free_address()
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        expected = pytest.raises(UserError, match=f"cannot listen at --coordinator={address}: another program uses")
        with expected:
            call_roll(address, 2, 0, 30.0)


def test_an_address_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refused)
    with pytest.raises(UserError, match=r"process 0 does not reach itself at .* \(Connection refused\)"):
        call_roll(free_address(), 2, 0, 30.0)


@pytest.mark.parametrize("index", [0, 1])
def test_a_host_that_is_not_known(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    address = free_address().replace("127.0.0.1", "nowhere")
    monkeypatch.setattr(socket, "create_connection", unknown)
    with pytest.raises(UserError, match=r"the host of --coordinator=nowhere:\d+ is not known \(Name or service"):
        call_roll(address, 2, index, 30.0)


def test_another_program_that_answers_is_not_process_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def greet() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as connection:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

        pool.submit(greet)
        with pytest.raises(TemporaryError, match=r"does not answer at .* \(another program answers\)"):
            call_roll(address, 2, 1, 0.5)
        server.shutdown(socket.SHUT_RDWR)
