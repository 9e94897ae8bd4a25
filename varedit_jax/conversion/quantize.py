"""Weights of ours in, the same with their large matrices in int8 out, one matrix of one layer at a time."""

import numpy as np

from varedit_jax.conversion import stream
from varedit_jax.conversion.convert import describe, export_job, indexed
from varedit_jax.errors import UserError
from varedit_jax.parameters import summed_axes
from varedit_jax.quantized import quantize
from varedit_jax.storage.paths import PathLike
from varedit_jax.weights import native
from varedit_jax.weights.export_source import ExportSource
from varedit_jax.weights.manifest import check_finite, sha256


def to_int8(source: ExportSource, output: PathLike, quiet: bool = False) -> int:
    """Writes parts as Orbax checkpoints, with config.json, vocabulary and a manifest; returns their bytes.

    The matrices of the transformer's blocks and of the text encoder's layers are int8 with float32 scales per output
    channel; all else keeps its type. Raises UserError for weights that are int8 already, values that are not finite,
    no room, and an output that exists.
    """
    with export_job(source, output, "int8", []) as job:
        tasks: list[stream.TensorTask] = []
        writers = []
        for part in source.parts:
            leaves = source.open(part)
            if any(isinstance(leaf.source, native.StoredInt8) for leaf in leaves.values()):
                raise UserError(
                    f"the {part} in {source.directory} is int8 already; give the weights that it was made of"
                )
            writers.append(native.OrbaxPart(job.staging / part, _stored(part, leaves)))
            tasks += [
                _task(part, path, leaf, index, writers[-1])
                for path, leaf in leaves.items()
                for index in (range(leaf.shape[0]) if native.is_stack(path) else (None,))
            ]
        size = sum(task.nbytes for task in tasks)
        job.run(tasks, size, [writer.create for writer in writers], quiet=quiet)
        describe(job.staging, source.config, source.sampling, source.editing)
        job.finish(tasks, {"form": "orbax"})
    return size


def _stored(part: str, leaves: dict[str, native.Leaf]) -> dict[str, native.Leaf]:
    """Shape and type of every array to store, by path."""
    stored = {}
    for path, leaf in leaves.items():
        summed = summed_axes(part, path)
        stored[path] = native.Leaf(leaf.shape, np.dtype(np.int8) if summed else leaf.dtype)
        if summed:
            scale = tuple(1 if axis in summed else size for axis, size in enumerate(leaf.shape))
            stored[path + native.SCALE] = native.Leaf(scale, np.dtype(np.float32))
    return stored


def _task(part: str, path: str, leaf: native.Leaf, index: int | None, writer: native.OrbaxPart) -> stream.TensorTask:
    summed = tuple(axis - (index is not None) for axis in summed_axes(part, path))
    shape = leaf.shape if index is None else leaf.shape[1:]

    def work() -> stream.ManifestEntry:
        tensor = np.asarray(leaf.read(index))
        check_finite(tensor, leaf.name)
        entry = {"part": part, "path": path, "index": index}
        if not summed:
            writer.write(path, index, tensor)
            return entry | {"ours": sha256(tensor)}
        kernel = quantize(tensor, summed)
        values, scale = np.asarray(kernel.values), np.asarray(kernel.scale)
        writer.write(path, index, values)
        writer.write(path + native.SCALE, index, scale)
        return entry | {"ours": sha256(values), "scale": sha256(scale)}

    scales = 4 * int(np.prod([size for axis, size in enumerate(shape) if axis not in summed]))
    values = int(np.prod(shape)) * (1 if summed else leaf.dtype.itemsize)
    return stream.TensorTask(f"{part}/{indexed(path, index)}", values + (scales if summed else 0), work)
