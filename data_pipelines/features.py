"""Features of a data set, computed once: the frozen tokenizer's encoder run ahead over all images.

A directory of features holds `source.npy` and `target.npy`, each float32 [examples, h, w, Z] in the order of the data
source, and `features.json`, which says what made them. It appears complete or not at all.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tqdm
from numpy.typing import ArrayLike, NDArray

from varedit_jax.errors import UserError

_MANIFEST = "features.json"
_SIDES = ("source", "target")
_PROBES = 8  # examples that stand for a whole data set in its hash


class Images(Protocol):
    """A random-access data source whose records hold images `source` and `target`, uint8 [H, W, 3]."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> Any:
        """Record of one example."""


class Features(NamedTuple):
    """Memory maps of the features of all examples; reading a row reads the disk, or the system's cache of it."""

    source: NDArray[np.float32]  # [examples, h, w, Z]
    target: NDArray[np.float32]  # [examples, h, w, Z]

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self.source)

    def rows(self, indices: Sequence[int]) -> dict[str, NDArray[Any]]:
        """Part of a batch: `source_features` and `target_features`, float32 [B, h, w, Z]."""
        return {f"{side}_features": np.asarray(array[indices]) for side, array in self._asdict().items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Manifest:
    weights_hash: str  # of the tokenizer that made the features
    data_hash: str  # of the images of some examples
    count: int  # examples
    shape: tuple[int, ...]  # of the features of one image: h, w, Z


def _data_hash(source: Images) -> str:
    digest = hashlib.sha256(str(len(source)).encode())
    for index in np.unique(np.linspace(0, len(source) - 1, _PROBES).astype(int)):
        record = source[int(index)]
        for side in _SIDES:
            digest.update(str(record[side].shape).encode() + record[side].tobytes())
    return digest.hexdigest()[:16]


def _read_manifest(directory: pathlib.Path) -> _Manifest:
    path = directory / _MANIFEST
    try:
        values = json.loads(path.read_text())
        return _Manifest(**values | {"shape": tuple(values["shape"])})
    except FileNotFoundError:
        raise UserError(
            f"{directory} holds no features: {_MANIFEST} is missing; compute them with precompute"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot read {path}: {error}; delete the directory and compute the features again") from error


def load(directory: str | os.PathLike[str], weights_hash: str) -> Features:
    """Memory maps of the features in `directory`, which a tokenizer of `weights_hash` must have made.

    Raises UserError if there are none, if another tokenizer made them, or if an array is not what the manifest says.
    """
    place = pathlib.Path(directory)
    manifest = _read_manifest(place)
    if manifest.weights_hash != weights_hash:
        raise UserError(
            f"the features in {place} were made by tokenizer weights {manifest.weights_hash}, not {weights_hash}; "
            f"delete the directory or give another one"
        )
    arrays = []
    for side in _SIDES:
        path = place / f"{side}.npy"
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read {path}: {error}; delete the directory and compute the features again"
            ) from error
        if array.shape != (manifest.count, *manifest.shape) or array.dtype != np.float32:
            raise UserError(
                f"{path} is {array.dtype} {list(array.shape)}, but {_MANIFEST} says float32 "
                f"{[manifest.count, *manifest.shape]}; delete the directory and compute the features again"
            )
        arrays.append(array)
    return Features(*arrays)


def _write(
    directory: pathlib.Path, source: Images, encode: Callable[[NDArray[np.uint8]], ArrayLike], batch_size: int
) -> tuple[int, ...]:
    """Write both arrays into `directory`; returns the shape of the features of one image."""
    arrays: dict[str, NDArray[np.float32]] = {}
    count = len(source)
    with tqdm.tqdm(total=count, desc="features", unit="example") as progress:
        for start in range(0, count, batch_size):
            indices = range(start, min(start + batch_size, count))
            records = [source[index] for index in indices]
            for side in _SIDES:
                images = np.stack([record[side] for record in records])
                # The last batch is filled up, so that a compiled `encode` sees a single shape.
                filled = np.pad(images, ((0, batch_size - len(images)), (0, 0), (0, 0), (0, 0)), mode="edge")
                values = np.asarray(encode(filled))[: len(images)]
                if values.dtype != np.float32 or values.ndim != 4:
                    raise ValueError(f"encode gave {values.dtype} {list(values.shape)}, not float32 [B, h, w, Z]")
                if not np.isfinite(values).all():
                    raise UserError(
                        f"the {side} features of examples {indices[0]} to {indices[-1]} are not finite; "
                        f"check the tokenizer's weights"
                    )
                if side not in arrays:
                    arrays[side] = np.lib.format.open_memmap(
                        directory / f"{side}.npy", mode="w+", dtype=np.float32, shape=(count, *values.shape[1:])
                    )
                arrays[side][indices.start : indices.stop] = values
            progress.update(len(records))
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]  # a memory map
    return arrays["source"].shape[1:]


def precompute(
    directory: str | os.PathLike[str],
    source: Images,
    weights_hash: str,
    encode: Callable[[NDArray[np.uint8]], ArrayLike],
    batch_size: int,
) -> Features:
    """Features of both images of every example of `source`, computed if `directory` does not hold them yet.

    `encode` maps images uint8 [batch_size, H, W, 3] to features float32 [batch_size, h, w, Z]; `weights_hash` names
    its weights. The directory is written beside its final place and renamed when complete, so an interrupted run leaves
    nothing that could be taken for features. Raises UserError if the directory holds features of other weights or of
    another data set, if `source` is empty, or if a feature is not finite.
    """
    place = pathlib.Path(directory)
    if not len(source):
        raise UserError(f"no examples to compute features of for {place}; prepare the data set first")
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}; it must be at least 1")
    data_hash = _data_hash(source)
    if place.exists():
        features = load(place, weights_hash)
        manifest = _read_manifest(place)
        if (manifest.count, manifest.data_hash) != (len(source), data_hash):
            raise UserError(
                f"the features in {place} are of another data set of {manifest.count} examples, not of this one of "
                f"{len(source)}; delete the directory or give another one"
            )
        return features
    place.parent.mkdir(parents=True, exist_ok=True)
    working = pathlib.Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        shape = _write(working, source, encode, batch_size)
        made = _Manifest(weights_hash=weights_hash, data_hash=data_hash, count=len(source), shape=shape)
        (working / _MANIFEST).write_text(json.dumps(dataclasses.asdict(made), indent=2) + "\n")
        working.chmod(0o755)  # mkdtemp makes a directory for its owner alone
        try:
            working.rename(place)
        except OSError:
            if not place.exists():  # else another process was faster, and its features are used
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return load(place, weights_hash)
