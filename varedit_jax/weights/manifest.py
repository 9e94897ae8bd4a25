"""Manifests: of a directory of weights, with its sources and a checksum for every tensor; checksums of files."""

import hashlib
import pathlib
from typing import Any

import numpy as np

from varedit_jax.errors import UserError
from varedit_jax.storage.disk import read_explained
from varedit_jax.storage.files import read_json
from varedit_jax.storage.paths import PathLike, resolve

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1


def sha256(tensor: np.ndarray) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(memoryview(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)).hexdigest()


def sha256_of_file(path: pathlib.Path) -> str:
    """SHA-256 of a file of any kind of storage, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**24))
    with path.open("rb") as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def check_float(dtype: np.dtype, name: str) -> None:
    """Raises UserError naming the tensor if it is not of floating-point numbers."""
    if dtype.kind not in "fV":  # bfloat16 is V
        raise UserError(f"{name} is of type {dtype}; weights are floating-point numbers")


def is_finite(tensor: np.ndarray) -> bool:
    """Returns True if no value is NaN or infinite."""
    return bool(np.isfinite(tensor).all())  # also of bfloat16, as ml_dtypes has it


def check_finite(tensor: np.ndarray, name: str) -> None:
    """Raises UserError naming the tensor if it holds NaN or infinite values."""
    finite = np.isfinite(tensor)
    if not finite.all():
        raise UserError(
            f"{name} holds {finite.size - int(finite.sum())} of {finite.size} values that are NaN or infinite; "
            f"the file is of a run that diverged, or damaged"
        )


def read_manifest(directory: PathLike) -> dict[str, Any] | None:
    """The manifest of a directory; None if it has none. Raises UserError if it is damaged, or of a newer version."""
    path = resolve(directory) / MANIFEST
    with read_explained(str(path)):
        if not path.is_file():
            return None
        try:
            manifest = dict(read_json(path))
            version = int(manifest["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
    if version > MANIFEST_VERSION:
        raise UserError(f"{path} is of version {version}; this package reads up to {MANIFEST_VERSION}, use a newer one")
    return manifest
