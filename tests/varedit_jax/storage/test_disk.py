"""Errors are told apart: full disks, the machine's, the data's."""

import errno
import os
import pathlib
import sqlite3

import pytest

from varedit_jax.errors import UserError
from varedit_jax.storage import disk


def wrapped(cause: BaseException) -> BaseException:
    try:
        try:
            raise cause
        except BaseException as error:
            raise ValueError("a decoder's own words") from error
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, os.strerror(number)) for number in (errno.EMFILE, errno.EIO, errno.EACCES, errno.ENOSPC)),
        TimeoutError(),
        ConnectionResetError(),
        MemoryError(),
        ValueError("Error reading: [os_error_code='24']"),
        RuntimeError("UNKNOWN: Too many open files; path"),
        RuntimeError("open() failed: Input/output error; reading /x"),
        sqlite3.OperationalError("disk I/O error"),
        wrapped(OSError(errno.EIO, "I/O error")),
    ],
)
def test_errors_of_the_machine(error: BaseException) -> None:
    assert disk.is_machine_error(error)
    says = "cannot read the shard: .*; put that right and run the same command again"
    with pytest.raises(UserError, match=says), disk.read_explained("the shard"):
        raise error


@pytest.mark.parametrize(
    "error",
    [ValueError("bad magic"), KeyError("x"), EOFError(), FileNotFoundError(2, "No such file"), OSError("cut short")],
)
def test_errors_of_the_data(error: BaseException) -> None:
    assert not disk.is_machine_error(error)
    with pytest.raises(type(error)), disk.read_explained("the shard"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "quota"),
        ValueError("writing /x: [os_error_code='28'] failed"),
        RuntimeError("write: No space left on device"),
    ],
)
def test_a_full_disk_in_any_words(error: BaseException) -> None:
    assert disk.is_full(error)
    says = "writing the state failed in /d: .*; make room and run the same command again"
    with pytest.raises(UserError, match=says), disk.explained("state", "/d"):
        raise error


def test_room(tmp_path: pathlib.Path) -> None:
    disk.check_room(tmp_path, 1, "a file")
    with pytest.raises(
        UserError, match=r"a checkpoint takes up to 1000000000.0 GB, but only .* are free in .*; make room"
    ):
        disk.check_room(tmp_path, 10**18, "a checkpoint")
    disk.check_room(pathlib.PurePosixPath("gs://b/x"), 10**18, "a checkpoint")  # type: ignore[arg-type]
    assert [disk.size_text(size) for size in (1, 2.34e6, 5.67e10)] == ["0.0 MB", "2.3 MB", "56.7 GB"]
