"""Files of tensors written one tensor at a time: `.pth` and safetensors, without PyTorch.

Both are laid out before the first tensor is known, so that tensors can be written in any order, from several threads,
and by a second process where a first one was killed. `finish` makes the file readable.
"""

import json
import math
import os
import pathlib
import pickle
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from varedit_jax.errors import UserError
from varedit_jax.storage import files, paths
from varedit_jax.storage.paths import is_remote
from varedit_jax.weights.pth import STORAGES, ZIP
from varedit_jax.weights.reader import SAFETENSORS_TYPES

_STORAGE_NAMES = {np.dtype(dtype): name for name, dtype in STORAGES.items()}
_SAFETENSORS_NAMES = {np.dtype(dtype): name for name, dtype in SAFETENSORS_TYPES.items()}
_ALIGNMENT = 64  # bytes, of storages, as PyTorch aligns them for memory maps
_ZIP32 = 2**32 - 1  # largest number of a field of four bytes; larger ones go into zip64 records
_ROOT = "archive"  # directory inside a .pth file


class Planned(NamedTuple):
    """A tensor that is going to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """Writes a file of tensors; all offsets are known ahead.

    Objects of an object store cannot be written in part: there each piece is an object of its own, named by its offset
    in bytes, until `finish` joins them.
    """

    def __init__(self, path: pathlib.Path, tensors: Sequence[Planned]) -> None:
        """Lays the file out; nothing is written before `create`."""
        self.path, self.tensors = path, tensors
        self._pieces = path.with_name(f".{path.name}.pieces")
        self._starts: dict[str, int] = {}
        self.size = self._lay_out()

    def _lay_out(self) -> int:
        """Sets `_starts`; returns the size of the file."""
        raise NotImplementedError

    def _frame(self, checksums: Mapping[str, int]) -> Iterable[tuple[int, bytes]]:
        """The bytes between and around the tensors, (offset, bytes); needs the CRC-32 of each tensor."""
        raise NotImplementedError

    def create(self) -> None:
        """Creates the file at its full size."""
        files.make_directory(self.path.parent)
        if not is_remote(self.path):
            with self.path.open("wb") as file:
                file.truncate(self.size)

    def write(self, name: str, data: np.ndarray, start: int = 0) -> int:
        """Writes the bytes of a tensor (or of a part that begins at byte `start`) durably; returns their CRC-32."""
        view = memoryview(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
        offset = self._starts[name] + start
        if not is_remote(self.path):
            with self.path.open("r+b", buffering=0) as file:
                _write_at(file.fileno(), offset, view)
                os.fdatasync(file.fileno())
        elif view:
            files.write_bytes(self._pieces / str(offset), view)
        return zlib.crc32(view)

    def finish(self, checksums: Mapping[str, int]) -> None:
        """Makes the file readable, and durable; `checksums` are what `write` returned for each tensor."""
        if is_remote(self.path):
            self._join(dict(self._frame(checksums)))
            return
        with self.path.open("r+b", buffering=0) as file:
            for offset, data in self._frame(checksums):
                _write_at(file.fileno(), offset, memoryview(data))
            files.make_durable(file)

    def _join(self, frame: Mapping[int, bytes]) -> None:
        """Writes the object that the pieces and `frame` are, unless an earlier attempt did, and removes the pieces."""
        if not self.path.exists() or paths.size(self.path) != self.size:
            parts: dict[int, bytes | pathlib.Path] = {int(piece.name): piece for piece in paths.children(self._pieces)}
            parts |= frame
            offset = 0
            with self.path.open("wb") as file:
                for start, part in sorted(parts.items()):
                    if start != offset:
                        raise UserError(f"{self._pieces} lacks the piece at byte {offset}; convert again")
                    data = part if isinstance(part, bytes) else part.read_bytes()
                    file.write(data)
                    offset += len(data)
        files.remove_directory(self._pieces)


def _write_at(descriptor: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


class SafetensorsFile(TensorFile):
    """One safetensors file."""

    def _lay_out(self) -> int:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # PyTorch's libraries require it
        offset = 0
        for tensor in self.tensors:
            end = offset + tensor.nbytes
            kind = _SAFETENSORS_NAMES[tensor.dtype]
            header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
            self._starts[tensor.name] = offset
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._header = struct.pack("<Q", len(text)) + text
        self._starts = {name: start + len(self._header) for name, start in self._starts.items()}
        return offset + len(self._header)

    def _frame(self, checksums: Mapping[str, int]) -> Iterable[tuple[int, bytes]]:
        yield 0, self._header


class PthFile(TensorFile):
    """A `.pth` file as torch.save writes it: a zip of a pickle and one stored file per tensor.

    `under` wraps the state dict: {under: state dict}, as published tokenizers have it.
    """

    def __init__(self, path: pathlib.Path, tensors: Sequence[Planned], under: str = "") -> None:
        """Lays the file out. Raises UserError for a tensor of 4 GiB or more."""
        for tensor in tensors:
            if tensor.nbytes >= _ZIP32:
                raise UserError(f"{tensor.name} has {tensor.nbytes} bytes, too many for a .pth file; use safetensors")
        self._under = under
        super().__init__(path, tensors)

    def _lay_out(self) -> int:
        fixed = {
            "data.pkl": _pickled(self.tensors, self._under),
            "byteorder": b"little",
            "version": b"3\n",
        }
        self._sizes = {tensor.name: tensor.nbytes for tensor in self.tensors}
        self._entries: list[tuple[str, str, int, int, bytes]] = []  # name, tensor, local header, size, fixed content
        offset = 0
        contents = [(name, "", len(data), data) for name, data in fixed.items()]
        contents += [(f"data/{key}", tensor.name, tensor.nbytes, b"") for key, tensor in enumerate(self.tensors)]
        for name, tensor_name, size, data in contents:
            entry = f"{_ROOT}/{name}"
            start = -(-(offset + 30 + len(entry) + 4) // _ALIGNMENT) * _ALIGNMENT
            self._entries.append((entry, tensor_name, offset, start, data))
            if tensor_name:
                self._starts[tensor_name] = start
            offset = start + size
        self._end = offset
        return offset + sum(len(part) for part in self._directory(dict.fromkeys(self._starts, 0)))

    def _frame(self, checksums: Mapping[str, int]) -> Iterable[tuple[int, bytes]]:
        for entry, tensor, offset, start, data in self._entries:
            fields = self._fields(tensor, data, checksums)
            padding = start - offset - 30 - len(entry) - 4
            extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB", PyTorch's own kind of padding
            header = struct.pack("<4sHHHHHIIIHH", ZIP, 20, 0, 0, 0, 0x21, *fields, len(entry), len(extra))
            yield offset, header + entry.encode() + extra
            if data:
                yield start, data
        yield self._end, b"".join(self._directory(checksums))

    def _fields(self, tensor: str, data: bytes, checksums: Mapping[str, int]) -> tuple[int, int, int]:
        """CRC-32, compressed size and size of an entry."""
        if not tensor:
            return zlib.crc32(data), len(data), len(data)
        return checksums[tensor], self._sizes[tensor], self._sizes[tensor]

    def _directory(self, checksums: Mapping[str, int]) -> list[bytes]:
        """The zip's central directory and its end, with 64-bit offsets where 32 bits do not hold them."""
        parts = []
        for entry, tensor, offset, _, data in self._entries:
            extra = struct.pack("<HHQ", 1, 8, offset) if offset >= _ZIP32 else b""
            lengths = (len(entry), len(extra), 0, 0, 0, 0, min(offset, _ZIP32))
            fixed = (b"PK\x01\x02", 45 if extra else 20, 20, 0, 0, 0, 0x21, *self._fields(tensor, data, checksums))
            parts.append(struct.pack("<4sHHHHHHIIIHHHHHII", *fixed, *lengths) + entry.encode() + extra)
        length, count, end = sum(map(len, parts)), len(parts), self._end
        if end >= _ZIP32 or count >= 2**16 - 1:
            parts.append(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, end))
            parts.append(struct.pack("<4sIQI", b"PK\x06\x07", 0, end + length, 1))
        counts = [min(count, 2**16 - 1)] * 2
        parts.append(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, *counts, min(length, _ZIP32), min(end, _ZIP32), 0))
        return parts


def _pickled(tensors: Sequence[Planned], under: str) -> bytes:
    """The pickle of an OrderedDict of tensors, by name, in the opcodes of protocol 2."""
    ordered = b"ccollections\nOrderedDict\n)R"
    parts = [pickle.PROTO, b"\x02"]
    if under:
        parts += [pickle.EMPTY_DICT, _text(under)]
    parts += [ordered, pickle.MARK]
    for key, tensor in enumerate(tensors):
        strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        storage = f"ctorch\n{_STORAGE_NAMES[tensor.dtype]}\n".encode()
        parts += [_text(tensor.name), b"ctorch._utils\n_rebuild_tensor_v2\n", pickle.MARK, pickle.MARK]
        parts += [_text("storage"), storage, _text(str(key)), _text("cpu"), _number(math.prod(tensor.shape))]
        parts += [pickle.TUPLE, pickle.BINPERSID, _number(0), _tuple(tensor.shape), _tuple(strides)]
        parts += [pickle.NEWFALSE, ordered, pickle.TUPLE, pickle.REDUCE]
    parts += [pickle.SETITEMS, pickle.SETITEM if under else b"", pickle.STOP]
    return b"".join(parts)


def _text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data


def _tuple(values: Iterable[int]) -> bytes:
    return pickle.MARK + b"".join(map(_number, values)) + pickle.TUPLE


def safetensors_shards(directory: pathlib.Path, tensors: Sequence[Planned], shard_bytes: int) -> list[SafetensorsFile]:
    """Shards of at most `shard_bytes` (or of one tensor), named as the transformers library expects them."""
    groups: list[list[Planned]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(t.nbytes for t in groups[-1]) + tensor.nbytes > shard_bytes:
            groups.append([])
        groups[-1].append(tensor)
    if len(groups) == 1:
        return [SafetensorsFile(directory / "model.safetensors", tensors)]
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return [SafetensorsFile(directory / name, group) for name, group in zip(names, groups, strict=True)]


def shard_index(files: Sequence[TensorFile]) -> dict[str, object]:
    """Content of model.safetensors.index.json: the shard of each tensor."""
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    shard_of = {tensor.name: file.path.name for file in files for tensor in file.tensors}
    return {"metadata": {"total_size": total}, "weight_map": shard_of}
