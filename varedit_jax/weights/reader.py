"""Reads published state dicts without running code from a file, without PyTorch, and one tensor at a time.

`.pth` files (pth.py), safetensors, and shards of either, with or without an index. Tensors are views of a memory map.
"""

import collections
import contextlib
import json
import mmap
import pathlib
import re
import shlex
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from varedit_jax.errors import UserError
from varedit_jax.storage import disk, files
from varedit_jax.storage.paths import PathLike, child_names, children, is_remote, resolve, size
from varedit_jax.storage.pointers import HEAD_BYTES, what_instead
from varedit_jax.weights.pth import ZIP, Contents, LazyTensor, map_file, open_pth, view

StateDict = dict[str, np.ndarray]

SAFETENSORS_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
PTH = (".pth", ".pt", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")  # stem, number, count, suffix


class WeightsFile(Mapping[str, LazyTensor]):
    """The tensors of a file, or of several, by name; nothing is read before it is asked for."""

    def __init__(self, contents: Contents, maps: list[mmap.mmap], paths: list[pathlib.Path]) -> None:
        """Use `open_weights`."""
        self._tensors, self._maps = contents.tensors, maps
        self.texts = contents.texts  # strings beside the tensors, by the names that they have in the file
        self.unknown = contents.unknown  # values that only running code could make, likewise
        self.paths = paths

    def __getitem__(self, name: str) -> LazyTensor:
        """The tensor `name`."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Names, in the file's order."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._tensors)

    def release(self) -> None:
        """Gives the memory of what has been read back to the system; views stay valid, and are read again."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def under(self, prefix: str) -> "WeightsFile":
        """The tensors below `prefix`, without it; all of them if there are none."""
        found = {name.removeprefix(prefix): x for name, x in self._tensors.items() if name.startswith(prefix)}
        return self._with(found) if found else self

    def renamed(self, rename: Callable[[str], str]) -> "WeightsFile":
        """The same tensors by other names. Raises UserError if two get the same."""
        names = {name: rename(name) for name in self._tensors}
        twice = next((name for name, count in collections.Counter(names.values()).items() if count > 1), None)
        if twice is not None:
            same = ", ".join(name for name, renamed in names.items() if renamed == twice)
            raise UserError(f"{self.paths[0]} holds {twice} more than once ({same}); save the one that is meant alone")
        return self._with({names[name]: x for name, x in self._tensors.items()})

    def _with(self, tensors: dict[str, LazyTensor]) -> "WeightsFile":
        return WeightsFile(Contents(tensors, self.texts, self.unknown), self._maps, self.paths)


def open_weights(path: PathLike) -> WeightsFile:
    """Opens a `.pth` or `.safetensors` file, an index of shards, or a directory with one (Hugging Face's layout).

    The content says which of the two a file is. Names of nested dicts are joined by dots. Files in an object store are
    copied to the directory for temporary files, for as long as it is in use. Raises UserError for a missing or damaged
    file, one that is something else (such as a Git LFS pointer), an unknown suffix, a shard that is not there, a pickle
    without tensors, and errors of the machine.
    """
    path = resolve(path)
    with disk.read_explained(str(path)):
        if path.is_dir():
            return _open_directory(path)
        return _open(path)


def check_whole(path: PathLike) -> None:
    """Raises UserError for the name of one of several shards, which holds a part of a model."""
    path = resolve(path)
    shard = _SHARD.fullmatch(path.name)
    if shard and int(shard[3]) > 1:
        raise UserError(f"{path} is one of {int(shard[3])} shards; name its directory, {path.parent}")


def _open(path: pathlib.Path) -> WeightsFile:
    if not path.is_file():
        raise UserError(f"{path} {'is no regular file' if path.exists() else 'does not exist'}")
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if instead := what_instead(head):
        raise UserError(f"{path} {instead}")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if path.suffix not in (*PTH, SAFETENSORS):
        raise UserError(f"{path} ends in {path.suffix!r}; known are {', '.join(PTH)} and {SAFETENSORS}")
    is_safetensors = head[8:9] == b"{" or (path.suffix == SAFETENSORS and not head.startswith(ZIP))
    with _on_disk(path) as local:
        contents, mapped = (_open_safetensors if is_safetensors else open_pth)(path, local)
    return WeightsFile(contents, [mapped], [path])


@contextlib.contextmanager
def _on_disk(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a local file with the content of `path`: itself, or a copy whose name goes with the block.

    What is open or mapped by then lasts.
    """
    if not is_remote(path):
        yield path
        return
    directory = pathlib.Path(tempfile.gettempdir())
    disk.check_room(directory, size(path), f"a copy of {path}")
    with tempfile.NamedTemporaryFile(suffix=path.suffix) as copy:
        with disk.explained(f"copy of {path}", directory), path.open("rb") as source:
            shutil.copyfileobj(source, copy, 2**24)
            copy.flush()
        yield pathlib.Path(copy.name)


def read_state_dict(path: PathLike) -> StateDict:
    """All tensors of what `open_weights` opens, in memory. Raises UserError as it does."""
    return {name: np.array(tensor.load()) for name, tensor in open_weights(path).items()}


def _open_directory(directory: pathlib.Path) -> WeightsFile:
    files.check_complete(directory)
    for name in (*INDEXES, *SINGLE_FILES):
        if (directory / name).is_file():
            return _open(directory / name)
    found = [path for path in children(directory) if path.suffix in (*PTH, SAFETENSORS)]
    shards = [match for path in found if (match := _SHARD.fullmatch(path.name))]
    if found and len(shards) == len(found) and len({(match[1], match[3], match[4]) for match in shards}) == 1:
        numbers, count = [int(match[2]) for match in shards], int(shards[0][3])
        lost = [str(number) for number in range(1, count + 1) if number not in numbers]
        if lost:
            raise UserError(f"{directory} lacks {len(lost)} of {count} shards, number {', '.join(lost)}: get them")
        return _joined({path.name: _open(path) for path in found})
    if len(found) == 1:
        return _open(found[0])
    if any(name.endswith(".distcp") for name in child_names(directory)):
        raise UserError(
            f"{directory} is a checkpoint of torch.distributed, in parts; join them first: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {shlex.quote(str(directory))} "
            f"weights.pth"
        )
    raise UserError(
        f"{directory} holds {len(found)} files of weights and none of {', '.join((*INDEXES, *SINGLE_FILES))}; "
        f"name the file that is meant"
    )


def _open_index(path: pathlib.Path) -> WeightsFile:
    try:
        shard_of: dict[str, str] = files.read_json(path)["weight_map"]
        names = sorted({pathlib.PurePath(name).name for name in shard_of.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not an index of shards: {error!r}") from error
    shards = {name: _open(path.parent / name) for name in names}
    shard_of = {name: pathlib.PurePath(shard).name for name, shard in shard_of.items()}
    lost = [f"{name} (in {shard})" for name, shard in shard_of.items() if name not in shards[shard]]
    if lost:
        raise UserError(f"{path} lists tensors that its shards do not hold: {', '.join(lost)}")
    return _joined(shards, shard_of, [path])


def _joined(
    shards: Mapping[str, WeightsFile], shard_of: Mapping[str, str] | None = None, paths: Sequence[pathlib.Path] = ()
) -> WeightsFile:
    """The tensors of all `shards`, or those that `shard_of` (name -> shard) lists, as if of one file."""
    shard_of = shard_of or {name: shard for shard, file in shards.items() for name in file}
    contents = Contents({name: shards[shard][name] for name, shard in shard_of.items()}, {}, {})
    for file in shards.values():
        contents.unknown.update(file.unknown)
    maps = [mapped for file in shards.values() for mapped in file._maps]
    return WeightsFile(contents, maps, [*paths, *(path for file in shards.values() for path in file.paths)])


def _open_safetensors(path: pathlib.Path, local: pathlib.Path) -> tuple[Contents, mmap.mmap]:
    tensors: dict[str, LazyTensor] = {}
    try:
        mapped = map_file(local)
        with safetensors.safe_open(local, framework="numpy"):
            pass  # it checks the header against the file's size
        (length,) = struct.unpack_from("<Q", mapped)
        header: dict[str, Any] = json.loads(mapped[8 : 8 + length])
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        if disk.is_machine_error(error):
            raise
        if isinstance(error, FileNotFoundError):  # the library's word for whatever keeps it from opening a file
            raise UserError(f"{path} cannot be opened: {error}") from error
        raise UserError(f"{path} is damaged or not a safetensors file: {_cut_short(local) or error}") from error
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        if entry["dtype"] not in SAFETENSORS_TYPES:
            raise UserError(f"{path}: {name} is of type {entry['dtype']}; known are {', '.join(SAFETENSORS_TYPES)}")
        dtype, shape = np.dtype(SAFETENSORS_TYPES[entry["dtype"]]), tuple(entry["shape"])
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = LazyTensor(shape, dtype, view(mapped, dtype, shape, start), start)
    return Contents(tensors, {}, {}), mapped


def _cut_short(path: pathlib.Path) -> str:
    """Returns, in a few words, what a safetensors file lacks at its end; "" if nothing, or without a sound header."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
        whole = 8 + length + max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError, struct.error):
        return ""
    found = path.stat().st_size
    return f"it is cut short, {found} of {whole} bytes; download or copy it again" if found < whole else ""
