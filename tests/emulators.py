"""Emulators of object stores on this machine: Google's by gcp-storage-emulator, Amazon's by moto."""

import contextlib
import http.server
import logging
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

GS_VARIABLES = ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL")


class _Server(http.server.ThreadingHTTPServer):
    """Serves connections side by side: clients keep some open that others would wait for."""

    daemon_threads = True
    request_queue_size = 128  # clients open dozens at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Passes over clients that leave before an answer is complete."""


@contextlib.contextmanager
def google() -> Iterator[dict[str, str]]:
    """Runs the emulator of Google's store; yields the environment of programs that use it."""
    from gcp_storage_emulator import server as emulator

    handle, download, one_at_a_time = emulator.Router.handle, emulator.objects.download, threading.Lock()

    def handle_alone(router: Any, method: str) -> None:
        with one_at_a_time:  # the emulator loses uploads that come side by side
            handle(router, method)

    def download_with_generation(request: Any, response: Any, storage: Any, *rest: Any) -> None:
        """Answers with the header that TensorStore reads again and writes on condition by."""
        download(request, response, storage, *rest)
        if response.status.value < 300:
            place = request.params["bucket_name"], request.params["object_id"]
            response["x-goog-generation"] = storage.get_file_obj(*place)["generation"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emulator.Router, "handle", handle_alone)
        patch.setattr(emulator.objects, "download", download_with_generation)
        with pytest.MonkeyPatch.context() as starting:
            starting.setattr(emulator.server, "HTTPServer", _Server)
            server = emulator.create_server("127.0.0.1", 0, in_memory=True)
            server.start()
        try:
            host, port = server._api._httpd.server_address[:2]
            yield dict.fromkeys(GS_VARIABLES, f"http://{host}:{port}")
        finally:
            server.stop()


@contextlib.contextmanager
def amazon() -> Iterator[dict[str, str]]:
    """Runs the emulator of Amazon's store; yields the environment of programs that use it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


def create_bucket(scheme: str) -> str:
    """Creates a bucket of its own; returns its URL."""
    import fsspec

    name = f"test-{uuid.uuid4().hex[:12]}"
    options = {"project": "test"} if scheme == "gs" else {}
    fsspec.filesystem(scheme, **options).mkdir(name)
    return f"{scheme}://{name}"


@pytest.fixture(scope="session")
def gs_server() -> Iterator[None]:
    with google() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[None]:
    with amazon() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def gs_bucket(gs_server: None) -> str:
    """URL of an empty bucket on the emulator of Google's store."""
    return create_bucket("gs")


@pytest.fixture
def s3_bucket(s3_server: None) -> str:
    """URL of an empty bucket on the emulator of Amazon's store."""
    return create_bucket("s3")
