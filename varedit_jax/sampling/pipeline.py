"""The compiled stages of an edit, and the values between them, which a caller may keep and pass again.

    images -> source -+
                      +-> prefill -> begin -> scale 0 -> ... -> scale K-1 -> decode -> images
    texts  -> text ---+

A stage is one program for each size of batch and text, of which there are few: both are padded. Guidance, temperature,
top-p, greedy and seeds are its arguments. Arrays are handed on without waiting for them.
"""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from varedit_jax.config import EditingConfig, EditorConfig, SamplingConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel import stored_programs
from varedit_jax.parallel.compiler_options import jit_everywhere
from varedit_jax.parallel.constrain import batch_only
from varedit_jax.parallel.mesh import BATCH, replicated, whole_batch
from varedit_jax.parallel.programs import Programs, shapes_of
from varedit_jax.sampling import sampler
from varedit_jax.sampling.guidance import Controls, controls, guided_scales
from varedit_jax.sampling.sampler import Drawn, Prefilled
from varedit_jax.scales import Pyramid, editor_pyramid, image_size
from varedit_jax.types import Params

MOST_PROGRAMS = 256  # that are kept; an edit of one size takes four and one for each scale
_LEAST_TEXT = 16  # tokens that texts are padded to at least

StageName = Literal["source", "text", "prefill", "begin", "scale", "decode"]


class Stage(NamedTuple):
    """What a program of an edit depends on, besides the shapes of the parameters."""

    name: StageName
    config: EditorConfig
    pyramid: Pyramid  # of texts, which have none, that of the square
    mesh: Mesh
    batch: int
    text_tokens: int = 0
    scale: int = 0
    guided: bool = False  # with the unconditional half
    every_scale: bool = False
    again: bool = False  # what it is given is used again: nothing is written in its place
    editing: EditingConfig = EditingConfig()

    @property
    def title(self) -> str:
        """For messages and reports."""
        return f"scale {self.scale}" if self.name == "scale" else self.name


@dataclasses.dataclass(frozen=True)
class Source:
    """Encoded images."""

    features_BhwZ: jax.Array
    count: int  # of images; the rest is padding
    pyramid: Pyramid


@dataclasses.dataclass(frozen=True)
class Text:
    """Encoded instructions."""

    features_BTE: jax.Array
    length_B: jax.Array | np.ndarray
    count: int


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Sources with instructions, as the transformer has seen them."""

    prefilled: Prefilled
    count: int
    pyramid: Pyramid
    guided: bool


def bucket(mesh: Mesh, count: int) -> int:
    """Returns how many samples a batch of `count` is padded to: a power of two that divides over the mesh."""
    return whole_batch(mesh, 1 << max(count - 1, 0).bit_length())


def text_bucket(longest: int, limit: int) -> int:
    """Returns how many tokens texts of at most `longest` are padded to: 16, 32, 64, ..., at most `limit`."""
    return min(limit, max(_LEAST_TEXT, 1 << (longest - 1).bit_length()))


class Program:
    """A stage's function, with the program of its arguments' shapes; more than one where the parameters differ."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._function, self._donated = _function(stage)
        self._jitted = jit_everywhere(self._function, donate_argnums=self._donated)
        self._known: dict[Any, tuple[Any, Any]] = {}
        self._stored: dict[Any, jax.stages.Compiled | None] = {}
        self.run = Programs(f"edit, {stage.title}", self._lower, stage.mesh)

    def results(self, *arguments: Any) -> Any:
        """Abstract results for arguments, which may be abstract."""
        stored = self._load(arguments)
        return stored.out_info if stored else self._for(arguments)[1]

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """Traces the program for arguments, which may be abstract."""
        lowered: jax.stages.Lowered = self._for(arguments)[0].lower(*arguments)
        return lowered

    def _lower(self, *arguments: Any) -> Any:
        """What `compile` of it gives the program: lowered, or read from the disk."""
        stored = self._load(arguments)
        if stored:
            return _Ready(stored)
        lowered = self.lower(*arguments)
        return _ToKeep(lowered, self._key(arguments)) if self._stage.mesh.empty else lowered

    def _load(self, arguments: tuple[Any, ...]) -> jax.stages.Compiled | None:
        """The program for arguments of these shapes from the disk; those of meshes are not kept there."""
        shapes = shapes_of(arguments)
        if shapes not in self._stored:
            self._stored[shapes] = stored_programs.load(self._key(arguments)) if self._stage.mesh.empty else None
        return self._stored[shapes]

    def _key(self, arguments: tuple[Any, ...]) -> str:
        return stored_programs.key_of(self._stage, shapes_of(arguments))

    def _for(self, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        key = shapes_of(arguments)
        if key not in self._known:
            self._known[key] = self._traced(arguments)
        return self._known[key]

    def _traced(self, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        """The jitted function, whose results are split over a mesh as the next stage takes them, and these."""
        mesh = self._stage.mesh
        if mesh.empty:
            return self._jitted, self._jitted.eval_shape(*arguments)
        results = jax.eval_shape(self._function, *arguments)
        places = jax.tree.map(functools.partial(_place, self._stage), results)
        more: dict[str, Any] = {"donate_argnums": self._donated, "out_shardings": places}
        jitted = jit_everywhere(self._function, mesh.devices.flat[0], **more)
        return jitted, jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), results, places)


@dataclasses.dataclass(frozen=True)
class _Ready:
    program: jax.stages.Compiled

    def compile(self) -> jax.stages.Compiled:
        return self.program


@dataclasses.dataclass(frozen=True)
class _ToKeep:
    lowered: jax.stages.Lowered
    key: str

    def compile(self) -> jax.stages.Compiled:
        return stored_programs.compile_and_save(self.key, self.lowered)


_lock = threading.Lock()
_programs = functools.lru_cache(maxsize=MOST_PROGRAMS)(Program)


def program(stage: Stage) -> Program:
    """Returns the program of a stage, of which the last `MOST_PROGRAMS` are kept."""
    with _lock:
        return _programs(stage)


def _place(stage: Stage, x: jax.ShapeDtypeStruct) -> NamedSharding:
    """Images come to every device; caches [layers, B, H, M, D] are split over heads, too, all else by examples."""
    if stage.name == "decode":
        return replicated(stage.mesh)
    return NamedSharding(stage.mesh, PartitionSpec(None, BATCH, "tensor") if x.ndim == 5 else PartitionSpec(BATCH))


def _function(stage: Stage) -> tuple[Callable[..., Any], tuple[int, ...]]:
    """Returns the function of a stage, and which of its arguments it may write over."""
    config, pyramid = stage.config, stage.pyramid

    def source(params: Params, images: jax.Array) -> jax.Array:
        return sampler.encode_source(params, batch_only(images), config, stage.editing)

    def text(params: Params, ids_BT: jax.Array, length_B: jax.Array) -> jax.Array:
        return sampler.encode_text(params, batch_only(ids_BT), batch_only(length_B), config, stage.editing)

    def prefill(
        params: Params, source_BhwZ: jax.Array, features_BTE: jax.Array, length_B: jax.Array, rows_2B: jax.Array
    ) -> Prefilled:
        source_BhwZ = batch_only(source_BhwZ[rows_2B[0]])
        features_BTE, length_B = (batch_only(x[rows_2B[1]]) for x in (features_BTE, length_B))
        return sampler.prefill(params, source_BhwZ, features_BTE, length_B, config, pyramid, stage.guided)

    def begin(prefilled: Prefilled, rows_B: jax.Array) -> Drawn:
        if stage.again:
            halves = rows_B
            if stage.guided:
                halves = jnp.concatenate([rows_B, rows_B + len(prefilled.text.cond_BC) // 2])
            text = jax.tree.map(lambda x: batch_only(x[halves]), prefilled.text)
            caches = jax.tree.map(lambda x: x[:, halves], prefilled.caches)
            prefilled = Prefilled(text, caches)
        return sampler.begin(prefilled, stage.batch, config, pyramid)

    def scale(params: Params, drawn: Drawn, choices: Controls, seeds_B: jax.Array) -> tuple[Drawn | None, jax.Array]:
        choices, seeds_B = jax.tree.map(batch_only, (choices, seeds_B))
        keys_B = jax.vmap(jax.random.key)(seeds_B)
        request = params, drawn, choices, keys_B, stage.scale, config, pyramid
        following, bits_BhwZ, _ = sampler.sample_scale(*request, stage.guided)
        return (None if stage.scale == pyramid.scales - 1 else following), bits_BhwZ

    def decode(params: Params, bits: tuple[jax.Array, ...]) -> jax.Array:
        return sampler.decode(params, bits, config, pyramid, stage.editing, stage.every_scale)

    functions: dict[StageName, tuple[Callable[..., Any], tuple[int, ...]]] = {
        "source": (source, ()),
        "text": (text, ()),
        "prefill": (prefill, ()),
        "begin": (begin, () if stage.again else (0,)),
        "scale": (scale, () if stage.again else (1,)),
        "decode": (decode, ()),
    }
    return functions[stage.name]


Run = Callable[..., Any]  # (stage, *arguments) -> the results of its program


def run(stage: Stage, *arguments: Any) -> Any:
    """Runs a stage."""
    return program(stage).run(*arguments)


@contextlib.contextmanager
def compiling() -> Iterator[Run]:
    """A function in place of `run` that has programs compiled, several at a time, and gives abstract results.

    All are compiled at the end of the block; what fails comes up when it runs.
    """
    begun: list[tuple[Programs, tuple[Any, ...]]] = []

    def prepare(stage: Stage, *arguments: Any) -> Any:
        found = program(stage)
        if not found.run.has(*arguments):
            begun.append((found.run, arguments))
        return found.results(*arguments)

    yield prepare
    if len(begun) == 1:
        begun[0][0].prepare(*begun[0][1])
    elif begun:
        with ThreadPoolExecutor(min(len(begun), os.cpu_count() or 1)) as pool:
            for programs, arguments in begun:
                programs.prepare(*arguments, pool=pool)


def encode_source(
    run: Run, params: Params, images: np.ndarray, config: EditorConfig, editing: EditingConfig, pyramid: Pyramid
) -> Source:
    """Encodes images of the model's size, uint8 [n, y, x, 3]. `params`: of the tokenizer."""
    mesh = jax.sharding.get_mesh()
    stage = Stage("source", config, pyramid, mesh, bucket(mesh, len(images)), editing=editing)
    return Source(run(stage, params, _rows(images, stage.batch)), len(images), pyramid)


def encode_text(
    run: Run, params: Params, ids_BT: np.ndarray, length_B: np.ndarray, config: EditorConfig, editing: EditingConfig
) -> Text:
    """Encodes instructions as token ids, padded, with their lengths. `params`: of the text encoder."""
    mesh = jax.sharding.get_mesh()
    stage = Stage(
        "text", config, editor_pyramid(config), mesh, bucket(mesh, len(ids_BT)), ids_BT.shape[1], editing=editing
    )
    length_B = _rows(length_B, stage.batch)
    return Text(run(stage, params, _rows(ids_BT, stage.batch), length_B), length_B, len(ids_BT))


def prefill(run: Run, params: Params, source: Source, text: Text, config: EditorConfig, guided: bool) -> Pairs:
    """Each source with the instruction at its place; a single one of either goes with all of the other.

    `params`: of the transformer. `guided`: with the unconditional half that guidance needs.
    """
    mesh, count = jax.sharding.get_mesh(), max(source.count, text.count)
    if min(source.count, text.count) not in (1, count):
        raise UserError(f"{source.count} sources and {text.count} instructions: give one of either, or as many of both")
    batch = bucket(mesh, count)
    stage = Stage("prefill", config, source.pyramid, mesh, batch, text.features_BTE.shape[1], guided=guided)
    rows_2B = np.stack([_places(values.count, batch) for values in (source, text)])
    prefilled = run(stage, params, source.features_BhwZ, text.features_BTE, text.length_B, rows_2B)
    return Pairs(prefilled, count, source.pyramid, guided)


def sample(
    run: Run,
    params: Params,
    pairs: Pairs,
    seeds: Sequence[int],
    sampling: Sequence[SamplingConfig],
    config: EditorConfig,
    keep: bool = True,
) -> tuple[jax.Array, ...]:
    """Bits of all scales, bool [B, h_k, w_k, Z] each; one seed and config for each pair, or for a single pair any.

    `params`: of the transformer. Without `keep` the pairs are written over, and cannot be used again.
    """
    mesh, pyramid = jax.sharding.get_mesh(), pairs.pyramid
    batch, last = bucket(mesh, len(seeds)), guided_scales(sampling, pyramid.scales)
    if pairs.count not in (1, len(seeds)):
        raise UserError(f"{len(seeds)} seeds for {pairs.count} pairs: give one of each, or seeds for a single pair")
    if last and not pairs.guided:
        raise UserError(
            f"guidance is {[config.guidance for config in sampling]}, but the pairs were prefilled without the "
            f"unconditional half; prefill them with guided=True"
        )
    rows = _places(pairs.count, batch)
    again = keep or pairs.count != len(seeds)
    text_tokens = pairs.prefilled.text.mask_BT.shape[1]
    stage = Stage("begin", config, pyramid, mesh, batch, text_tokens, guided=pairs.guided, again=again)
    drawn = run(stage, pairs.prefilled, rows)
    choices = controls([sampling[row] for row in _places(len(sampling), batch)], pyramid.scales)
    seeds_B = _rows(np.asarray(seeds, np.uint32), batch)
    bits, doubled = [], pairs.guided
    for scale in range(pyramid.scales):
        guided, final = scale < last, scale == pyramid.scales - 1
        # Nothing can be written in the place of caches that become smaller, or are not needed any more.
        stage = stage._replace(name="scale", scale=scale, guided=guided, again=final or guided != doubled)
        doubled = guided
        drawn, drawn_bits = run(stage, params, drawn, choices, seeds_B)
        bits.append(drawn_bits)
    return tuple(bits)


def edit(
    run: Run,
    params: Params,
    images: np.ndarray,
    ids_BT: np.ndarray,
    length_B: np.ndarray,
    seeds: Sequence[int],
    sampling: Sequence[SamplingConfig],
    config: EditorConfig,
    editing: EditingConfig,
    pyramid: Pyramid,
    every_scale: bool = False,
) -> Any:
    """All stages of an edit, one after the other: the images of `decode`, with padding. `params`: of all parts."""
    guided = guided_scales(sampling, pyramid.scales) > 0
    source = encode_source(run, params["tokenizer"], images, config, editing, pyramid)
    text = encode_text(run, params["text"], ids_BT, length_B, config, editing)
    pairs = prefill(run, params["transformer"], source, text, config, guided)
    bits = sample(run, params["transformer"], pairs, seeds, sampling, config, keep=False)
    return decode(run, params["tokenizer"], bits, config, editing, pyramid, every_scale)


def decode(
    run: Run,
    params: Params,
    bits: tuple[jax.Array, ...],
    config: EditorConfig,
    editing: EditingConfig,
    pyramid: Pyramid,
    every_scale: bool,
) -> jax.Array:
    """Images of bits, uint8 [1 or K, B, y, x, 3]. `params`: of the tokenizer."""
    stage = Stage("decode", config, pyramid, jax.sharding.get_mesh(), bits[0].shape[0], every_scale=every_scale)
    stage = stage._replace(editing=editing)
    return run(stage, params, bits)


def _places(count: int, batch: int) -> np.ndarray:
    """Rows of `batch` samples in an array of `count`: each its own, the last for padding; a single one serves all."""
    return np.minimum(np.arange(batch, dtype=np.int32), count - 1)


def _rows(x: np.ndarray, batch: int) -> np.ndarray:
    return x if len(x) == batch else x[_places(len(x), batch)]


def cache_bytes(config: EditorConfig, pyramid: Pyramid, guided: bool) -> int:
    """Bytes of keys and values that one image keeps during an edit."""
    transformer = config.transformer
    tokens = pyramid.source_tokens(transformer.conditioning) + pyramid.target_tokens
    each = 2 * transformer.depth * transformer.width * jnp.dtype(transformer.dtype).itemsize
    return (2 if guided else 1) * tokens * each


def image_bytes(config: EditorConfig, pyramid: Pyramid, guided: bool) -> int:
    """Bytes that one image may take at most on a device, by formula: caches, or the decoder's finest activations."""
    height, width = image_size(config, pyramid)
    decoder = 6 * height * width * config.tokenizer.base_channels * 4
    return max(cache_bytes(config, pyramid, guided) * 3 // 2, decoder)
