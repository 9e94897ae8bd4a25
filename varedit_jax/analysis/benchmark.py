"""Times and memory of the complete training step and of editing, on random weights and images, on any device."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from varedit_jax import hardware
from varedit_jax.analysis import edit_floor
from varedit_jax.analysis.operations import recomputed_share
from varedit_jax.config import RunConfig
from varedit_jax.parallel.mesh import put_batch
from varedit_jax.parameters import init_text, init_tokenizer, init_transformer, stored_params
from varedit_jax.sampling import pipeline
from varedit_jax.sampling.pipeline import Stage
from varedit_jax.scales import Pyramid, editor_pyramid, image_size
from varedit_jax.training.compile_step import (
    abstract_arguments,
    abstract_frozen,
    abstract_state,
    check_attention,
    sharded_step,
)
from varedit_jax.training.flops import run_flops
from varedit_jax.training.metrics import Work
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.state import make_init
from varedit_jax.transformer.kernels import Kernel, choose
from varedit_jax.types import Params

Row = dict[str, Any]  # what was measured, ready for JSON

OUT_OF_MEMORY = "out of memory"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measurements of a run and the number of their repeats."""

    run: RunConfig  # model, batch, optimizer and precision of the step
    mesh: Mesh
    repeats: int = 10
    warmup: int = 2  # calls before, which are not measured
    text_features: bool = False  # the batch has the features of images and text, and no frozen encoder runs
    _measured: dict[RunConfig, Row] = dataclasses.field(
        default_factory=dict
    )  # a step that several rows share is measured once

    def train(self, **transformer: Any) -> Row:
        """The training step, with some fields of the transformer's configuration replaced."""
        run = _with(self.run, **transformer)
        chosen = run.model.transformer
        row = {"what": "train", "batch": run.data.batch_size, "attention": chosen.attention, "remat": chosen.remat}
        if chosen.attention == "auto":
            run = _with(run, attention=self._auto_attention)
        if run not in self._measured:
            self._measured[run] = _guarded(lambda: self._train(run))
        return row | self._measured[run]

    def edit(self, batch: int) -> Row:
        """A complete edit of `batch` images, from pixels to pixels, on the first device, and its `stages`."""
        return {"what": "edit", "batch": batch} | _guarded(lambda: self._edit(batch))

    def attention(self) -> Iterator[Row]:
        """The training step with plain attention, and with the platform's fast kernel where it has one."""
        yield {**self.train(attention="plain"), "what": "attention"}
        fast, model = self._auto_attention, self.run.model.transformer
        if fast == "plain":
            heads = f"heads of {model.head_size} channels in {model.dtype}"
            note = f"no fast kernel for the platform {self._device.platform} and {heads}"
            yield {"what": "attention", "batch": self.run.data.batch_size, "attention": "auto", "note": note}
        else:
            yield {**self.train(attention=fast), "what": "attention"}

    def remat(self) -> Iterator[Row]:
        """The training step with each `remat`, the one of least memory first.

        `again_of_forward` is the recomputation in the backward pass, as a share of the transformer's forward pass.
        """
        for remat in ("full", "named", "none"):
            share = recomputed_share(_with(self.run, remat=remat))
            yield {**self.train(remat=remat), "what": "remat", "again_of_forward": share}

    @property
    def _auto_attention(self) -> Kernel:
        """The kernel of "auto" on the devices that are measured."""
        model = self.run.model.transformer
        with jax.set_mesh(self.mesh):
            return choose("auto", model.head_size, model.dtype)

    @property
    def _device(self) -> jax.Device:
        return self.mesh.devices.flat[0]

    @functools.cached_property
    def _initial(self) -> dict[str, Callable[[], Any]]:
        """Functions that make random weights on the devices, the same for all rows."""
        run = self.run
        optimizer = make_optimizer(run.optimizer, run.steps)

        def maker(init: Callable[[], Any], abstract: Any = None) -> Callable[[], Any]:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
            function = jax.jit(init, out_shardings=shardings)

            def make() -> Any:
                with jax.default_prng_impl("rbg"):  # compiles in a fraction of the default's time
                    return jax.block_until_ready(function())

            return make

        return {
            "state": maker(make_init(run, optimizer), abstract_state(run, optimizer, self.mesh)),
            "frozen": maker(lambda: _random_frozen(run), abstract_frozen(run, self.mesh)),
            "editor": maker(lambda: _random_editor(run)),
        }

    def _train(self, run: RunConfig) -> Row:
        before = _peak()
        with jax.set_mesh(self.mesh):
            check_attention(run)
        pyramid = editor_pyramid(run.model)
        optimizer = make_optimizer(run.optimizer, run.steps)
        abstract = self._abstract(run, pyramid, optimizer)
        with jax.set_mesh(self.mesh):
            began = time.perf_counter()
            step = sharded_step(run, pyramid, optimizer, self.mesh).lower(*abstract).compile()
            compiling = time.perf_counter() - began
            state, frozen = self._initial["state"](), {} if self.text_features else self._initial["frozen"]()
            batch = put_batch(self.mesh, _random_batch(abstract[2]))
            key = jax.device_put(jax.random.key(0), abstract[3].sharding)

            def once() -> Any:
                nonlocal state
                state, metrics = step(state, frozen, batch, key)
                return metrics

            processor = time.process_time()
            seconds = self._times(once)
            processor = (time.process_time() - processor) / (self.warmup + self.repeats)
        flops = run_flops(run, pyramid)
        work = Work.of(flops, self.mesh.devices.flat)
        median = float(np.median(seconds))
        examples = run.data.batch_size
        return {
            **_spread(seconds),
            "processor_s": processor,  # of all cores of this machine, a call
            "compile_s": compiling,
            "examples_per_s": examples / median,
            "tokens_per_s": examples * flops.tokens / median,
            **work.speed(examples, median),
            **self._memory(step, before),
        }

    def _abstract(self, run: RunConfig, pyramid: Pyramid, optimizer: optax.GradientTransformation) -> tuple[Any, ...]:
        """The arguments of the step, abstract."""
        state, frozen, batch, key = abstract_arguments(run, pyramid, optimizer, self.mesh)
        if self.text_features:
            ids, width = batch["text_ids"], run.model.text.width
            batch["text_features"] = jax.ShapeDtypeStruct((*ids.shape, width), jnp.bfloat16, sharding=ids.sharding)
            frozen = {}
        return state, frozen, batch, key

    def _edit(self, batch: int) -> Row:
        before, run = _peak(), self.run
        model, pyramid = run.model, editor_pyramid(run.model)
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (batch, *image_size(model, pyramid), 3), np.uint8)
        tokens = min(32, run.data.text_tokens)  # of an instruction
        ids = draw.integers(1, model.text.vocabulary_size, (batch, tokens), np.int32)
        lengths = np.full((batch,), tokens, np.int32)
        with jax.default_device(self._device):
            params = self._initial["editor"]()
            request = images, ids, lengths, range(batch), [run.sampling] * batch, model, run.editing, pyramid
            stages = EditStages(params)
            for _ in range(self.warmup + self.repeats):
                pipeline.edit(stages.run, params, *request)
            # Without waiting between the stages.
            seconds = self._times(lambda: pipeline.edit(pipeline.run, params, *request))
        row = _spread(seconds)
        rows = stages.rows(self.warmup, hardware.chip_of(self._device))
        memory: list[Row] = [self._memory(program, before) for program in stages.programs.values()]
        for found, sizes in zip(rows, memory, strict=True):
            found |= {name: size for name, size in sizes.items() if name in ("planned_gib", "temporary_gib")}
        largest: Row = max(memory, key=lambda sizes: float(sizes.get("planned_gib", 0)))
        return row | {
            "compile_s": sum(found["compile_s"] for found in rows),
            "examples_per_s": batch / row["median_s"],
            "weights_gib": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / hardware.GIB,
            **largest,
            "stages": rows,
        }

    def _times(self, once: Callable[[], Any]) -> list[float]:
        """Seconds of each call, from its dispatch until its results are there."""
        seconds = []
        for _ in range(self.warmup + self.repeats):
            began = time.perf_counter()
            jax.block_until_ready(once())
            seconds.append(time.perf_counter() - began)
        return seconds[self.warmup :]

    def _memory(self, program: Any, before: int | None) -> Row:
        """GiB per device: that the compiler plans for the program, and the peak of the fullest device.

        A device reports its peak since the process began. Where it has not risen above `before`, the peak of earlier
        rows, `peak_gib` is None and `peak_at_most_gib` an upper bound.
        """
        planned = program.memory_analysis()
        sizes: Row = {}
        if planned is not None:
            total = planned.argument_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
            sizes["planned_gib"] = (total + planned.temp_size_in_bytes) / hardware.GIB
            sizes["temporary_gib"] = planned.temp_size_in_bytes / hardware.GIB
        peak = _peak()
        if peak is None:
            return sizes | {"peak_gib": None}
        rose = before is None or peak > before
        return sizes | {"peak_gib": peak / hardware.GIB if rose else None, "peak_at_most_gib": peak / hardware.GIB}


class EditStages:
    """Times of the stages of edits, each until its results are there."""

    def __init__(self, params: Params) -> None:
        """`params`: of all parts, for the floor."""
        self._params = params
        self.programs: dict[str, Any] = {}  # compiled, by title
        self._stages: dict[str, Stage] = {}
        self._compile: dict[str, float] = {}
        self._seconds: dict[str, list[float]] = {}

    def run(self, stage: Stage, *arguments: Any) -> Any:
        """In place of `pipeline.run`."""
        program, title = pipeline.program(stage).run, stage.title
        if title not in self.programs:
            began = time.perf_counter()
            self.programs[title] = program.compiled(*arguments)
            self._compile[title], self._stages[title] = time.perf_counter() - began, stage
        began = time.perf_counter()
        results = jax.block_until_ready(program(*arguments))
        self._seconds.setdefault(title, []).append(time.perf_counter() - began)
        return results

    def rows(self, warmup: int, chip: hardware.Chip | None) -> list[Row]:
        """A row for each stage: its compilation, first call and the calls after `warmup`, beside the floor.

        The floor has seconds where the chip is known.
        """
        rows = []
        for title, seconds in self._seconds.items():
            floor = edit_floor.floor(self._stages[title], self._params)
            row = {"stage": title, "compile_s": self._compile[title], "first_s": self._compile[title] + seconds[0]}
            row |= _spread(seconds[warmup:]) | {"floor_tflop": floor.operations / 1e12, "floor_gb": floor.bytes / 1e9}
            rows.append(row | ({"floor_s": floor.seconds(chip)} if chip else {}))
        return rows


def environment(mesh: Mesh) -> Row:
    """Device, its peak and versions, on which figures depend besides the program."""
    device = mesh.devices.flat[0]
    chip = hardware.chip_of(device)
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "peak_tflops_per_chip": chip.tflops if chip else None,
        "jax": jax.__version__,
    }


def _peak() -> int | None:
    """Most bytes that any device of this process has held; None where the backend does not report it."""
    return hardware.memory(jax.local_devices()).get("peak")


def _with(run: RunConfig, **transformer: Any) -> RunConfig:
    model = dataclasses.replace(run.model, transformer=dataclasses.replace(run.model.transformer, **transformer))
    return dataclasses.replace(run, model=model)


def _guarded(measure: Callable[[], Row]) -> Row:
    """The row of `measure`, or one with a note if it runs out of memory."""
    try:
        return measure()
    except jax.errors.JaxRuntimeError as error:
        if not any(text in str(error) for text in ("RESOURCE_EXHAUSTED", "Out of memory", "OOM")):
            raise
        return {"note": OUT_OF_MEMORY}


def _random_frozen(run: RunConfig) -> Any:
    frozen = {"tokenizer": init_tokenizer(run.model, jax.random.key(1))}
    if not run.train_text:
        dtype = jnp.dtype(run.text_dtype)
        frozen["text"] = jax.tree.map(lambda x: x.astype(dtype), init_text(run.model, jax.random.key(2)))
    return frozen


def _random_editor(run: RunConfig) -> Any:
    """In the types that weights for editing are kept in."""
    initial = {
        "tokenizer": init_tokenizer(run.model, jax.random.key(1)),
        "text": init_text(run.model, jax.random.key(2)),
        "transformer": init_transformer(run.model, jax.random.key(3)),
    }
    kept = {part: stored_params(run.model, part, run.text_dtype) for part in initial}
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), initial, kept)


def _random_batch(abstract: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random images (or features) and texts of all lengths."""
    draw = np.random.default_rng(0)
    text_tokens = abstract["text_ids"].shape[1]
    highest = {"text_ids": 1000, "text_length": text_tokens + 1}
    batch = {}
    for name, leaf in abstract.items():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            batch[name] = draw.normal(size=leaf.shape).astype(leaf.dtype)
        else:
            batch[name] = draw.integers(1, highest.get(name, 256), leaf.shape).astype(leaf.dtype)
    return batch


def _spread(seconds: list[float]) -> Row:
    """Median, least and quartiles."""
    low, median, high = np.percentile(seconds, [25, 50, 75])
    return {
        "median_s": float(median),
        "min_s": float(min(seconds)),
        "quartiles_s": [float(low), float(high)],
        "repeats": len(seconds),
    }
