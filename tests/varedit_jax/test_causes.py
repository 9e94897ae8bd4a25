"""Errors as systems and libraries raise them end a program with the code of their cause."""

import errno
import importlib
import os
import pathlib
import socket
import urllib.error
import urllib.request
from collections.abc import Callable

import jax
import pytest
import tensorstore

from varedit_jax import causes
from varedit_jax.causes import exit_code
from varedit_jax.errors import DEFECT, MISTAKE, TEMPORARY, TemporaryError, UserError
from varedit_jax.storage import disk
from varedit_jax.storage.lock import Lock


def raised(function: Callable[[], object]) -> BaseException:
    """Returns what a function raises."""
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("it raises nothing")


@pytest.fixture
def closed() -> str:
    """An address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTUNREACH])
def test_a_failing_disk_or_network_may_pass(number: int) -> None:
    error = OSError(number, os.strerror(number))
    assert exit_code(error) == TEMPORARY

    def write() -> None:
        with disk.explained("checkpoint", "/disk"):
            raise error

    explained = raised(write)
    assert isinstance(explained, UserError) and exit_code(explained) == TEMPORARY


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT, errno.EMFILE])
def test_a_full_or_forbidden_disk_does_not_pass(number: int) -> None:
    error = OSError(number, os.strerror(number))
    assert exit_code(error) == DEFECT

    def write() -> None:
        with disk.explained("checkpoint", "/disk"):
            raise error

    assert exit_code(raised(write)) == MISTAKE


def test_mistakes_and_defects() -> None:
    assert exit_code(UserError("no such file; connection reset by peer, said the user")) == MISTAKE
    assert exit_code(TemporaryError("process 3 did not come")) == TEMPORARY
    for error in (KeyError("loss"), MemoryError(), AssertionError(), ValueError("shapes (503,) and (429,)")):
        assert exit_code(error) == DEFECT


def test_what_was_being_handled_counts_as_a_cause() -> None:
    def fail(suppressed: bool) -> None:
        try:
            raise ConnectionResetError
        except ConnectionResetError:
            if suppressed:
                raise UserError("a mistake") from None
            raise UserError("cannot read") from RuntimeError("wrapped")

    assert exit_code(raised(lambda: fail(True))) == MISTAKE
    assert exit_code(raised(lambda: fail(False))) == MISTAKE  # the cause that is given has none itself
    error = RuntimeError("a circle")
    error.__cause__ = error
    assert exit_code(error) == DEFECT


@pytest.mark.parametrize(
    ("status", "code"), [(429, 75), (500, 75), (502, 75), (503, 75), (401, 70), (403, 70), (404, 70)]
)
def test_an_object_store_that_refuses_for_now(status: int, code: int) -> None:
    """As gcsfs, botocore, s3fs and aiohttp say it."""
    import aiohttp
    import botocore.exceptions
    import gcsfs.retry
    import s3fs.errors

    response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": str(status)}}
    client_error = botocore.exceptions.ClientError(response, "PutObject")
    translated = s3fs.errors.translate_boto_error(client_error)
    info = aiohttp.RequestInfo("http://store", "GET", {}, "http://store")  # type: ignore[arg-type]
    errors = [
        raised(lambda: gcsfs.retry.validate_response(status, b"{}", "bucket/x")),
        client_error,
        translated,
        aiohttp.ClientResponseError(info, (), status=status),
        urllib.error.HTTPError("http://store", status, "", {}, None),  # type: ignore[arg-type]
    ]
    assert [exit_code(error) for error in errors] == [code] * len(errors)


def test_nobody_listens(closed: str) -> None:
    """As requests, urllib, aiohttp and TensorStore say it."""
    import asyncio

    import aiohttp
    import requests

    async def ask() -> None:
        async with aiohttp.ClientSession() as session:
            await session.get(closed)

    store = {
        "driver": "http", "base_url": closed, "path": "/x", "context": {"http_request_retries": {"max_retries": 1}},
    }  # fmt: skip
    for call in (
        lambda: requests.get(closed, timeout=5),
        lambda: urllib.request.urlopen(closed, timeout=5),
        lambda: asyncio.run(ask()),
        lambda: tensorstore.KvStore.open(store).result().read("").result(),
    ):
        error = raised(call)
        assert exit_code(error) == TEMPORARY, repr(error)


def test_types_of_networks_exist() -> None:
    for name in causes.NETWORK_TYPES:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), kind), Exception)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("UNAVAILABLE: failed to connect to all addresses", 75),
        ("DEADLINE_EXCEEDED: Barrier timed out. Id: varedit_jax/3/the others::0", 75),
        ("INTERNAL: The tasks have crashed: heartbeat timeout of /job:jax_worker/task:3", 75),
        ("INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network error", 75),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes", 70),
        ("INVALID_ARGUMENT: Executable expected shape f32[4]", 70),
        ("INTERNAL: Mosaic failed to compile TPU kernel", 70),
    ],
)
def test_errors_of_jax(text: str, code: int) -> None:
    assert exit_code(jax.errors.JaxRuntimeError(text)) == code


def test_errors_of_gloo_and_tensorstore() -> None:
    gloo = "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"
    assert exit_code(ValueError(gloo)) == TEMPORARY
    assert exit_code(ValueError("RESOURCE_EXHAUSTED: HTTP response code: 429")) == TEMPORARY
    assert exit_code(ValueError("PERMISSION_DENIED: HTTP response code: 403")) == DEFECT
    assert exit_code(ValueError("the heartbeat of the config is not a number")) == DEFECT


def test_a_lock_that_another_process_holds_may_pass(tmp_path: pathlib.Path) -> None:
    with Lock(tmp_path):
        assert exit_code(raised(lambda: Lock(tmp_path).__enter__())) == TEMPORARY
