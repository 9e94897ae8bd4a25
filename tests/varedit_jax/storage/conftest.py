"""A directory on every kind of storage."""

import pathlib

import pytest

from tests.emulators import gs_bucket, gs_server, s3_bucket, s3_server
from varedit_jax.storage.paths import resolve

__all__ = ["gs_bucket", "gs_server", "s3_bucket", "s3_server"]


@pytest.fixture(params=["local", "gs", "s3"])
def directory(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """An empty directory that need not exist yet."""
    if request.param == "local":
        return tmp_path / "directory"
    return resolve(f"{request.getfixturevalue(f'{request.param}_bucket')}/directory")
