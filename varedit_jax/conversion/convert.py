"""Published weights in, published weights out, one tensor at a time.

    to_jax       published files -> an Orbax checkpoint per part, config.json, vocabulary: what `Editor` and runs load
    to_torch     a directory of weights or a run -> files that the published code loads
    to_directory    a directory of weights or a run -> safetensors with our own names, and a model card
    quantize.to_int8    a directory of weights or a run -> the first form, with large matrices in int8

Memory does not grow with the model: a tensor is a view of a memory map until it is written. Each output has a manifest
with the SHA-256 of every tensor, on both sides.
"""

import dataclasses
import importlib.resources
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np

import varedit_jax
from varedit_jax.config import EditingConfig, EditorConfig, PixelBudget, RopeLayout, SamplingConfig
from varedit_jax.conversion import infer_config, locate, stream
from varedit_jax.conversion.model_card import model_card
from varedit_jax.conversion.writer import Planned, PthFile, SafetensorsFile, TensorFile, safetensors_shards, shard_index
from varedit_jax.errors import UserError
from varedit_jax.parameters import abstract_params
from varedit_jax.storage import files as storage_files
from varedit_jax.storage.disk import is_machine_error
from varedit_jax.storage.paths import PathLike, resolve, stamp
from varedit_jax.weights import names, native
from varedit_jax.weights.directory import CONFIG, VOCABULARY, read_editor_config, write_editor_config
from varedit_jax.weights.export_source import ExportSource
from varedit_jax.weights.manifest import MANIFEST, check_finite, check_float, read_manifest, sha256
from varedit_jax.weights.pth import unread_weights
from varedit_jax.weights.reader import WeightsFile, open_weights

FORMATS = ("pth", "safetensors")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """Published files to convert."""

    files: Mapping[str, str]  # part -> file or directory
    weights: str = "model"  # or "ema", which a trainer's checkpoint may hold besides
    tokenizer_weights: str = "model"  # likewise, of a tokenizer's file
    family: str = ""  # varedit or infinity; "": from the name of the transformer's file or directory
    rope_layout: str = ""  # released or paper; "": by the family
    pixel_budget: PixelBudget | Literal[""] = ""  # "": from the transformer's file, or its name, or 0.25M


class _Opened(NamedTuple):
    """Published files, with the config inferred from them."""

    files: dict[str, WeightsFile]
    config: EditorConfig
    family: str
    taken: list[str]  # sentences about files that hold more than a part

    def release(self) -> None:
        for file in self.files.values():
            file.release()

    def __str__(self) -> str:
        """The parts that were found, with their configs, a line each."""
        config, found = self.config, []
        if "transformer" in self.files:
            transformer = config.transformer
            found.append(
                f"transformer of {self.family}: {transformer.depth} blocks, width {transformer.width}, "
                f"{transformer.token_bits} bits per token, {config.pixel_budget} pixels, "
                f"rope_layout={transformer.rope_layout}"
            )
        if "tokenizer" in self.files:
            found.append(f"tokenizer: {config.tokenizer.bits} bits, stride {config.tokenizer.stride}")
        if "text" in self.files:
            found.append(f"text encoder: {config.text.layers} layers, width {config.text.width}")
        return "\n".join([*self.taken, *found])


class Mapped(NamedTuple):
    """A published tensor and its path in our tree: a line of a dry run."""

    part: str
    link: names.Link
    dtype: np.dtype

    def __str__(self) -> str:
        """`published name [shape] type <-> our path[index]`."""
        link = self.link
        ours = f"{self.part}/{indexed(link.path, link.index)} ({link.layout})"
        return f"{link.name} {list(link.shape)} {self.dtype} <-> {f'made: {link.layout}' if link.is_buffer else ours}"


def indexed(path: str, index: int | None) -> str:
    """The path of an array, or of one entry of a stack."""
    return path if index is None else f"{path}[{index}]"


def _open(request: Published, quiet: bool = False) -> _Opened:
    chosen = {part: _select(request, part, path) for part, path in request.files.items()}
    files = {part: file for part, (file, _) in chosen.items()}
    family = request.family or infer_config.family_of(request.files.get("transformer", ""))
    if "transformer" in files and not family:
        raise UserError(
            f"{request.files['transformer']} does not say in its name whose weights it holds; give --family=varedit or "
            f"--family=infinity (their positions differ)"
        )
    layout = cast(RopeLayout, request.rope_layout or infer_config.FAMILIES[family or "varedit"])
    budget: PixelBudget = request.pixel_budget or "0.25M"
    guesses: list[str] = []
    if path := request.files.get("transformer"):
        texts = files["transformer"].texts
        budget, guesses = infer_config.budget_and_guesses(path, texts, request.family, request.pixel_budget)
    shapes = {part: {name: x.shape for name, x in file.items()} for part, file in files.items()}
    try:
        config = infer_config.editor_config(shapes, budget, layout)
    except UserError as error:
        unread = [unread_weights(file.paths[0], file.unknown) for file in files.values()]
        raise UserError(f"{error}{''.join(unread)}") from error
    if not quiet:
        for guess in guesses:
            print(f"warning: {guess}", file=sys.stderr, flush=True)
    return _Opened(files, config, family, [sentence for _, sentence in chosen.values() if sentence])


def _select(request: Published, part: str, path: str) -> tuple[WeightsFile, str]:
    """The tensors of a part in a file that may hold more, as `locate.find_part` gives them."""
    if part == "text":
        return locate.find_part(path, part)
    if part == "tokenizer":
        return locate.find_part(path, part, request.tokenizer_weights, "tokenizer_weights")
    return locate.find_part(path, part, request.weights, "weights")


def _match(opened: _Opened, part: str) -> list[names.Link]:
    file = opened.files[part]
    try:
        return names.match(part, {name: x.shape for name, x in file.items()}, abstract_params(opened.config, part))
    except UserError as error:
        raise UserError(f"{file.paths[0]}: {error}{unread_weights(file.paths[0], file.unknown)}") from error


def mapping_in(request: Published) -> list[Mapped]:
    """Every mapping of published files, without reading a tensor. Raises UserError for what cannot be converted."""
    opened = _open(request)
    return [
        Mapped(part, link, opened.files[part][link.name].dtype)
        for part in opened.files
        for link in _match(opened, part)
    ]


def mapping_of(config: EditorConfig, parts: Sequence[str], dtype: str = "float32") -> list[Mapped]:
    """Every published tensor that an editor's parts become; nothing is allocated."""
    return [
        Mapped(part, link, _published_type(link, dtype))
        for part in parts
        for link in names.links(part, abstract_params(config, part), _default_dialect(config))
    ]


def _published_type(link: names.Link, dtype: str) -> np.dtype:
    return np.dtype("int64" if link.layout == "powers" else dtype)


def _default_dialect(config: EditorConfig) -> names.Dialect:
    return names.Dialect(chunks=names.published_chunks(config.transformer.depth, config.transformer.width))


def _stored_type(dtypes: set[np.dtype]) -> np.dtype:
    """The type of a stack: that of its entries, or one that holds all of them exactly."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def to_jax(request: Published, output: PathLike, quiet: bool = False) -> int:
    """Converts published files to a directory of weights; returns its bytes.

    Every tensor keeps its type; a stack whose entries differ in type takes one that holds all of them exactly.

    Raises:
      UserError: a file that is missing, damaged, of another model (every missing, unexpected or misshapen tensor is
        named) or runs code; values that are not finite; no room; an output that exists.
    """
    opened = _open(request, quiet)
    matched = {part: _match(opened, part) for part in opened.files}
    leaves = {part: _stored_leaves(opened, part, links) for part, links in matched.items()}
    paths = [path for file in opened.files.values() for path in file.paths]
    fingerprint = {"to": "jax", "files": [stamp(path) for path in paths], "request": dataclasses.asdict(request)}
    if not quiet:
        print(opened)
    with stream.ConversionJob(output, fingerprint) as job:
        writers = {part: native.OrbaxPart(job.staging / part, leaves[part]) for part in matched}
        tasks = [
            _import_task(part, opened.files[part], link, leaves[part], writers[part])
            for part, links in matched.items()
            for link in links
        ]
        size = sum(task.nbytes for task in tasks)
        job.run(tasks, size, [writer.create for writer in writers.values()], opened.release, quiet)
        describe(job.staging, *infer_config.as_published(opened.config, opened.family))
        manifest = {
            "form": "orbax",
            "family": opened.family,
            "dialects": {part: dataclasses.asdict(names.dialect_of(file)) for part, file in opened.files.items()},
            "weights": request.weights,
            "tokenizer_weights": request.tokenizer_weights,
            "sources": [path.name for path in paths],
        }
        job.finish(tasks, manifest)
    return size


def _stored_leaves(opened: _Opened, part: str, links: Sequence[names.Link]) -> dict[str, native.Leaf]:
    """Shape and type of every array to store, by path. Raises UserError for tensors that are not floating-point."""
    types: dict[str, set[np.dtype]] = {}
    for link in links:
        if not link.is_buffer:
            dtype = opened.files[part][link.name].dtype
            check_float(dtype, link.name)
            types.setdefault(link.path, set()).add(np.dtype(dtype))
    expected = names.flat(abstract_params(opened.config, part))
    return {path: native.Leaf(tuple(leaf.shape), _stored_type(types[path])) for path, leaf in expected.items()}


def _import_task(
    part: str, file: WeightsFile, link: names.Link, leaves: Mapping[str, native.Leaf], writer: native.OrbaxPart
) -> stream.TensorTask:
    lazy = file[link.name]
    shape = leaves[link.path].shape[0 if link.index is None else 1 :]

    def work() -> stream.ManifestEntry:
        tensor = lazy.load()
        found = _record(part, link, tensor)
        if link.is_buffer:
            names.check_buffer(tensor, link)
            return found
        check_finite(tensor, link.name)
        ours = np.ascontiguousarray(names.to_ours(tensor, link, shape).astype(leaves[link.path].dtype, copy=False))
        writer.write(link.path, link.index, ours)
        return found | {"ours": sha256(ours)}

    return stream.TensorTask(f"{part}/{link.name}", int(np.prod(lazy.shape)) * lazy.dtype.itemsize, work)


def _record(part: str, link: names.Link, tensor: np.ndarray) -> stream.ManifestEntry:
    return {
        "part": part,
        "name": link.name,
        "shape": list(link.shape),
        "dtype": str(tensor.dtype),
        "path": "" if link.is_buffer else link.path,
        "index": link.index,
        "sha256": sha256(tensor),
    }


def describe(directory: pathlib.Path, config: EditorConfig, sampling: SamplingConfig, editing: EditingConfig) -> None:
    """Writes config.json and the vocabulary of a directory of weights."""
    write_editor_config(directory, config, sampling, editing)
    text = importlib.resources.files(varedit_jax).joinpath("text", VOCABULARY).read_bytes()
    storage_files.write_bytes(directory / VOCABULARY, text)


def to_torch(
    source: ExportSource,
    output: PathLike,
    file_format: str = "pth",
    shard_bytes: int = 5 * 10**9,
    dtype: str = "",
    chunks: int | None = None,
    quiet: bool = False,
) -> int:
    """Writes parts as files of the published code, buffers included; returns their bytes.

    `pth`: transformer.pth, tokenizer.pth ({"vae": state dict}), text/pytorch_model.bin. `safetensors`: a directory per
    part, one file or shards, with an index. The text encoder comes with the config.json that transformers reads.

    Args:
      source: of `open_source`.
      output: new directory.
      file_format: pth or safetensors.
      shard_bytes: largest size of a safetensors file.
      dtype: float32, bfloat16 or float16; "" writes every tensor in the type it was published in, or is stored in.
      chunks: of the transformer's blocks, 0 for none; None: as they were published.

    Raises:
      UserError: weights that have no published form, values that do not fit `dtype`, no room, an output that exists.
    """
    mapping = mapping_from(source, dtype, chunks)
    if not quiet and _has_own_positions(source):
        print(
            f"{source.directory} has rope_layout=paper below 1M pixels, but VAREdit's published code computes the "
            f"released positions: it gives other images"
        )
    tasks: list[stream.TensorTask] = []
    files: dict[str, list[TensorFile]] = {}
    with export_job(source, output, "torch", [file_format, shard_bytes, dtype, chunks]) as job:
        for part in source.parts:
            leaves = source.open(part)
            lines = [line for line in mapping if line.part == part]
            planned = [Planned(line.link.name, line.link.shape, line.dtype) for line in lines]
            files[part] = _files_of(part, job.staging, planned, file_format, shard_bytes)
            file_of = {tensor.name: file for file in files[part] for tensor in file.tensors}
            tasks += [
                _export_task(part, line.link, tensor, leaves[line.link.path], file_of[tensor.name])
                for line, tensor in zip(lines, planned, strict=True)
            ]
        size = sum(file.size for group in files.values() for file in group)
        job.run(tasks, size, [file.create for group in files.values() for file in group], quiet=quiet)
        for part, group in files.items():
            for file in group:
                file.finish({tensor.name: job.done[f"{part}/{tensor.name}"]["crc32"] for tensor in file.tensors})
            if isinstance(group[0], SafetensorsFile):  # the published code loads by it, even a single file
                index = group[0].path.with_name("model.safetensors.index.json")
                storage_files.write_json(index, shard_index(group), indent=1)
        if "text" in files:
            described = infer_config.hugging_face_config(source.config.text)
            storage_files.write_json(files["text"][0].path.with_name(CONFIG), described, indent=1)
        job.finish(tasks, {"form": "torch"})
    return size


def export_job(source: ExportSource, output: PathLike, to: str, options: list[Any]) -> stream.ConversionJob:
    """The job of an export, which is resumed if weights, parts and options are the same."""
    weights = [str(source.directory), *source.stamp()]
    return stream.ConversionJob(output, {"to": to, "source": weights, "options": [list(source.parts), *options]})


def mapping_from(source: ExportSource, dtype: str = "", chunks: int | None = None) -> list[Mapped]:
    """Every published tensor that weights of ours become; `dtype` and `chunks` as in `to_torch`. None is read."""
    if "transformer" in source.parts:
        _check_published_code_computes(source.config)
    published = {(entry["part"], entry.get("name")): entry for entry in (source.manifest or {}).get("tensors", [])}
    found = []
    for part in source.parts:
        leaves = source.open(part)
        for link in names.links(part, abstract_params(source.config, part), _dialect(source, part, chunks)):
            known = published.get((part, link.name), {}).get("dtype", str(leaves[link.path].dtype))
            found.append(Mapped(part, link, _published_type(link, dtype or known)))
    return found


def _check_published_code_computes(config: EditorConfig) -> None:
    """Raises UserError for a transformer whose tensors the published code would load, and use in another way."""
    for name, value, published in (
        ("conditioning", config.transformer.conditioning, "sar"),
        ("quantized_source", config.quantized_source, False),
    ):
        if value != published:
            raise UserError(
                f"the editor was trained with {name}={value}, but published code computes {name}={published} only; "
                f"export it in our own names (--to=directory)"
            )


def _has_own_positions(source: ExportSource) -> bool:
    """Returns True if VAREdit's published code would use other positions; Infinity's uses the paper's."""
    paper = "transformer" in source.parts and source.config.transformer.rope_layout == "paper"
    return paper and source.config.pixel_budget != "1M" and (source.manifest or {}).get("family") != "infinity"


def _dialect(source: ExportSource, part: str, chunks: int | None) -> names.Dialect:
    """As the weights were published, or as published ones of their size are; `chunks` overrides."""
    recorded = (source.manifest or {}).get("dialects", {}).get(part)
    dialect = names.Dialect(**recorded) if recorded else _default_dialect(source.config)
    return dialect if chunks is None else dataclasses.replace(dialect, chunks=chunks)


def _files_of(
    part: str, directory: pathlib.Path, planned: Sequence[Planned], file_format: str, shard_bytes: int
) -> list[TensorFile]:
    if file_format == "safetensors":
        return list(safetensors_shards(directory / part, planned, shard_bytes))
    name = "text/pytorch_model.bin" if part == "text" else f"{part}.pth"
    return [PthFile(directory / name, planned, under="vae" if part == "tokenizer" else "")]


def _export_task(
    part: str, link: names.Link, planned: Planned, leaf: native.Leaf, file: TensorFile
) -> stream.TensorTask:
    def work() -> stream.ManifestEntry:
        if link.is_buffer:
            tensor = names.BUFFERS[link.layout](link.shape).astype(planned.dtype)
        else:
            tensor = _rounded(names.to_published(leaf.read(link.index), link), planned.dtype, link.name)
        return _record(part, link, tensor) | {"crc32": file.write(link.name, tensor)}

    return stream.TensorTask(f"{part}/{link.name}", planned.nbytes, work)


def _rounded(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # what becomes infinite is refused, by name
        rounded = np.ascontiguousarray(tensor.astype(dtype, copy=False))
    check_finite(rounded, name if rounded.dtype == tensor.dtype else f"{name}, as {dtype},")
    return rounded


def to_directory(
    source: ExportSource, output: PathLike, dtype: str = "", license: str = "", quiet: bool = False
) -> int:
    """Writes parts as safetensors with our own names, config.json, vocabulary and a model card; returns their bytes.

    `dtype` as in `to_torch`; `license` goes into the model card. Raises UserError as `to_torch` does.
    """
    tasks: list[stream.TensorTask] = []
    files: list[SafetensorsFile] = []
    with export_job(source, output, "directory", [dtype, license]) as job:
        for part in source.parts:
            leaves = source.open(part)
            planned = [Planned(path, leaf.shape, np.dtype(dtype or leaf.dtype)) for path, leaf in leaves.items()]
            files.append(SafetensorsFile(job.staging / f"{part}.safetensors", planned))
            tasks += [
                _copy_task(part, tensor, index, leaves[tensor.name], files[-1])
                for tensor in planned
                for index in (range(tensor.shape[0]) if native.is_stack(tensor.name) else (None,))
            ]
        size = sum(file.size for file in files)
        job.run(tasks, size, [file.create for file in files], quiet=quiet)
        for file in files:
            file.finish({})
        describe(job.staging, source.config, source.sampling, source.editing)
        card = model_card(source.config, source.parts, source.run, source.step, size, license)
        storage_files.write_text(job.staging / "README.md", card)
        job.finish(tasks, {"form": "safetensors"})
    return size


def _copy_task(
    part: str, planned: Planned, index: int | None, leaf: native.Leaf, file: TensorFile
) -> stream.TensorTask:
    nbytes = planned.nbytes if index is None else planned.nbytes // planned.shape[0]

    def work() -> stream.ManifestEntry:
        tensor = _rounded(np.asarray(leaf.read(index)), planned.dtype, indexed(planned.name, index))
        file.write(planned.name, tensor, start=nbytes * (index or 0))
        return {"part": part, "path": planned.name, "index": index, "ours": sha256(tensor)}

    return stream.TensorTask(f"{part}/{planned.name}/{index}", nbytes, work)


def verify(directory: PathLike) -> int:
    """Reads every tensor of an output again and compares its checksum; returns their number.

    Raises UserError naming every tensor that differs, or if there is no manifest, or the directory is not complete.
    """
    root = resolve(directory)
    storage_files.check_complete(root)
    if not root.is_dir():
        raise UserError(f"{root} is no directory; give one that a conversion wrote")
    manifest = read_manifest(root)
    if manifest is None:
        raise UserError(f"{root} has no {MANIFEST}: there is nothing to verify it by")
    tensors = manifest["tensors"]
    damaged: list[str] = []
    for part in dict.fromkeys(entry["part"] for entry in tensors):
        entries = [entry for entry in tensors if entry["part"] == part]
        check = _damaged_published if manifest["form"] == "torch" else _damaged
        damaged += check(root, part, entries)
    if damaged:
        raise UserError(f"{root} is damaged: the checksum of {', '.join(damaged)} differs from the manifest's")
    return len(tensors)


def _damaged_published(root: pathlib.Path, part: str, entries: Sequence[stream.ManifestEntry]) -> Iterator[str]:
    """Names of published tensors that are missing, or differ from their entries in the manifest."""
    pth = root / f"{part}.pth"
    file = open_weights(pth if pth.exists() or not (root / part).exists() else root / part).under("vae.")
    for entry in entries:
        if entry["name"] not in file or sha256(file[entry["name"]].load()) != entry["sha256"]:
            yield entry["name"]
        file.release()


def _damaged(root: pathlib.Path, part: str, entries: Sequence[stream.ManifestEntry]) -> Iterator[str]:
    """The same for a directory of weights; buffers have no path in our tree."""
    leaves = native.open_part(root, part, abstract_params(read_editor_config(root)[0], part))
    for entry in (entry for entry in entries if entry["path"]):
        leaf = leaves[entry["path"]]
        int8 = leaf.source if isinstance(leaf.source, native.StoredInt8) else None
        stored = {"ours": int8.values, "scale": int8.scale} if int8 else {"ours": leaf}
        try:
            intact = all(sha256(np.asarray(x.read(entry["index"]))) == entry.get(key) for key, x in stored.items())
        except UserError as error:  # a chunk is missing or cut short
            if is_machine_error(error):
                raise
            intact = False
        if not intact:
            yield f"{part}/{indexed(entry['path'], entry['index'])}"
