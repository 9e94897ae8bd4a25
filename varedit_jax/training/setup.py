"""Setup of a training run of an editor: frozen weights, initial state, evaluation, and the run on a mesh."""

import bisect
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from varedit_jax.config import RunConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel.compiler_options import compiler_options
from varedit_jax.parallel.mesh import batch_sharding, check_batch, put_batch, replicated
from varedit_jax.parallel.processes import say
from varedit_jax.parallel.programs import Programs
from varedit_jax.scales import Pyramid, editor_pyramid, image_size, nearest_aspect
from varedit_jax.training import compile_step
from varedit_jax.training.flops import run_flops
from varedit_jax.training.loss import BY_EXAMPLE
from varedit_jax.training.metrics import Work
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.stages import Stages
from varedit_jax.training.state import TrainState, make_init
from varedit_jax.training.step import BATCH_FIELDS, make_loss, sum_over_microbatches
from varedit_jax.training.stop import poll
from varedit_jax.training.verify import Examples, make_numbers
from varedit_jax.types import Batch, Metrics, Params
from varedit_jax.weights import names, native


def load_frozen(config: RunConfig, abstract: Params) -> Params:
    """Returns the frozen weights of a run: the tokenizer, and the text encoder unless it is trained.

    `abstract` has these parts as jax.ShapeDtypeStruct (compile_step.abstract_frozen): each process reads what its
    devices hold of them. Raises UserError if the experiment config names no directory for one, or the directory's
    weights do not fit.
    """
    directories = {"tokenizer": config.tokenizer_weights, "text": config.text_weights}
    frozen = {}
    for part, wanted in abstract.items():
        if not directories[part]:
            raise UserError(f"the experiment config names no {part}_weights; give --config.{part}_weights=DIRECTORY")
        leaves, like = native.open_part(directories[part], part, wanted), names.flat(wanted)
        frozen[part] = names.tree({path: native.load_sharded(leaf, like[path]) for path, leaf in leaves.items()})
    return frozen


# Groups of arrays that may differ from those of `init_from`, and are then initialized, as in the recipe: projections of
# another tokenizer's bits; all of a text encoder of another width; parts that published models lack.
_MAY_DIFFER = {"transformer": (r"word_embed/kernel|head/.*", r"text_.*", r"position_embed/.*")}


def start(
    config: RunConfig, abstract: TrainState, init: Callable[[], TrainState], log: Callable[[str], None] = say
) -> TrainState:
    """Returns the state of step 0: random, or with the trained parts (transformer, text encoder) from `init_from`.

    `init_from` is a directory of weights or of a run. Arrays that do not fit are initialized, if the recipe allows them
    to differ; `log` gets what was loaded and what was not. Arrays have the shardings of `abstract`, and each process
    reads what its devices hold. Raises UserError naming anything else that does not fit.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if not config.init_from:
        return jax.jit(init, out_shardings=places)()
    found = {part: _fitting(config.init_from, part, params) for part, params in abstract.params.items()}
    state = jax.jit(init, out_shardings=places)()
    params = {}
    for part, (loaded, fresh) in found.items():
        log(f"{part} from {config.init_from}: {len(loaded)} arrays loaded: {', '.join(loaded) or 'none'}")
        if fresh:
            log(f"{part}: {len(fresh)} arrays do not fit and are initialized: {'; '.join(fresh.values())}")
        values, like = names.flat(state.params[part]), names.flat(abstract.params[part])
        params[part] = names.tree(
            {path: native.load_sharded(loaded[path], like[path]) if path in loaded else x for path, x in values.items()}
        )
    ema = state.ema
    if ema is not None:  # copies, because the state is donated to each step, and no array can be donated twice
        ema = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=places.ema)(params)
    return state.replace(params=params, ema=ema)


def _fitting(directory: str, part: str, expected: Params) -> tuple[dict[str, native.Leaf], dict[str, str]]:
    """Returns the arrays of a part that fit, by path, and for each of the others how it differs."""
    wanted = names.flat(expected)
    found = native.find_part(directory, part)
    differ = {
        path: f"{path} (there {list(found[path].shape) if path in found else 'none'}, here {list(leaf.shape)})"
        for path, leaf in wanted.items()
        if path not in found or tuple(found[path].shape) != tuple(leaf.shape)
    }
    groups = [re.compile(pattern) for pattern in _MAY_DIFFER.get(part, ())]
    fresh: set[str] = set()
    for group in groups:  # one that differs takes its group with it, as in the recipe
        members = {path for path in wanted if group.fullmatch(path)}
        if members & set(differ):
            fresh |= members
    refused = [text for path, text in differ.items() if path not in fresh]
    if refused:
        raise UserError(f"a run of this configuration cannot start from {directory}: {part} {'; '.join(refused)}")
    loaded = {path: found[path] for path in wanted if path not in fresh}
    return loaded, {path: differ.get(path, f"{path} (goes with them)") for path in wanted if path in fresh}


KINDS = "kinds"  # field of a held-out batch: the number of each example's kind of edit, int32 [B]; -1 for none


def make_evaluate(config: RunConfig, pyramid: Pyramid, kinds: int = 0) -> Callable[[Params, Params, Batch], Metrics]:
    """Returns `(params, frozen, batch) -> metrics` of a held-out batch, without noise or drop.

    The batch is worked on in the microbatches of the step, because it needs as much memory. With `kinds` K > 0 it has
    the field `KINDS`, and the metrics have sums over the examples of each kind [K]: of `loss.BY_EXAMPLE`, and `count`.
    """
    loss_fn: Callable[..., Any] = make_loss(config, pyramid, training=False, by_example=kinds > 0)
    parts = config.optimizer.accumulation

    def compute(params: Params, frozen: Params, batch: Batch) -> tuple[Metrics, Metrics]:
        inputs = {name: value for name, value in batch.items() if name != KINDS}
        metrics = loss_fn(params, frozen, inputs, jax.random.key(0))[1]
        if not kinds:
            return metrics, {}
        members_BK = jax.nn.one_hot(batch[KINDS], kinds)  # none of -1
        sums = {name: jnp.dot(metrics[name], members_BK, precision="highest") for name in BY_EXAMPLE}
        means = {name: value for name, value in metrics.items() if name not in BY_EXAMPLE}
        return means, sums | {"count": jnp.sum(members_BK, axis=0)}

    def evaluate(params: Params, frozen: Params, batch: Batch) -> Metrics:
        if parts == 1:
            means, sums = compute(params, frozen, batch)
        else:
            means, sums = sum_over_microbatches(lambda part, _: compute(params, frozen, part), batch, parts)
            means = jax.tree.map(lambda x: x / parts, means)
        return {**means, **sums}

    return evaluate


def jitted_evaluation(config: RunConfig, pyramid: Pyramid, mesh: Mesh, kinds: int = 0) -> Any:
    """Returns the jitted function of `make_evaluate`, whose metrics all processes get; compiled as the step is."""
    return jax.jit(
        make_evaluate(config, pyramid, kinds),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(mesh.devices.flat[0], config.compiler_options) or None,
    )


class MeshRun:
    """A run on a mesh. Call its methods under `jax.set_mesh(mesh)`."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        """Computes nothing yet.

        Raises UserError for stages that the pyramid does not have, for dimensions that do not divide over the mesh, and
        for an attention kernel that cannot work on it.
        """
        self.config, self.mesh = config, mesh
        self.pyramid = editor_pyramid(config.model)
        if any(scales > self.pyramid.scales for _, scales in config.stages):
            raise UserError(
                f"stages={config.stages!r}, but the pyramid has {self.pyramid.scales} scales; lower the scales"
            )
        compile_step.check_attention(config)
        check_batch(mesh, config.data.batch_size, config.optimizer.accumulation)
        self._optimizer = make_optimizer(config.optimizer, config.steps)
        self.abstract_state = compile_step.abstract_state(config, self._optimizer, mesh)
        # Of each stage, the last one being the whole pyramid: the step it ends before, and the scales it trains.
        self._ends = [*itertools.accumulate(steps for steps, _ in config.stages), config.steps]
        self._scales = [*(scales for _, scales in config.stages), self.pyramid.scales]
        self._work = functools.cache(
            lambda scales, pyramid, text_tokens: Work.of(
                run_flops(config, pyramid.first(scales), pyramid, text_tokens), mesh.devices.flat
            )
        )
        self._evaluations: dict[tuple[Pyramid, int], Programs] = {}
        self._numbers_of: dict[Pyramid, Programs] = {}

    def load_frozen(self) -> Params:
        """Returns the frozen weights on the mesh. Raises UserError as `load_frozen`."""
        return load_frozen(self.config, compile_step.abstract_frozen(self.config, self.mesh))

    def init_state(self) -> TrainState:
        """Returns the state of step 0 on the mesh. Raises UserError as `start`."""
        return start(self.config, self.abstract_state, make_init(self.config, self._optimizer))

    def stages(self, frozen: Params, later: Sequence[Callable[[], object]] = ()) -> Stages:
        """Returns the steps of every stage; `later` compiles what else the run will need (`Stages`)."""

        def step_of(scales: int, batch: Batch) -> Any:
            pyramid = self._pyramid_of(batch).first(scales)
            return compile_step.sharded_step(self.config, pyramid, self._optimizer, self.mesh)

        return Stages(
            [(end, functools.partial(step_of, scales)) for end, scales in zip(self._ends, self._scales, strict=True)],
            frozen,
            later,
            self._of_other_lengths,
            self.mesh,
        )

    def _of_other_lengths(self, batch: Batch) -> list[dict[str, Any]]:
        """Returns an abstract batch with the other lengths of texts that the run may have."""
        data, now = self.config.data, batch["text_ids"].shape[1]

        def padded(length: int) -> dict[str, Any]:
            def leaf(name: str, x: Any) -> jax.ShapeDtypeStruct:
                text = name in ("text_ids", "text_features")
                shape = (x.shape[0], length, *x.shape[2:]) if text else x.shape
                return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

            return {name: leaf(name, x) for name, x in batch.items()}

        return [padded(length) for length in (*data.text_buckets, data.text_tokens) if length != now]

    def _pyramid_of(self, batch: Batch) -> Pyramid:
        """Returns the pyramid of a batch's images or features, which are all of one aspect."""
        images = "source" in batch
        height, width = batch["source" if images else "source_features"].shape[1:3]
        pyramid = editor_pyramid(self.config.model, nearest_aspect(height, width))
        if images and image_size(self.config.model, pyramid) != (height, width):
            raise ValueError(f"images of {height} x {width} pixels are of no pyramid of this model")
        return pyramid

    def work(self, step: int, batch: Batch) -> Work:
        """Returns the cost of an example of step `step`, in a batch of one aspect and one length of texts."""
        scales = self._scales[min(bisect.bisect_right(self._ends, step), len(self._scales) - 1)]
        return self._work(scales, self._pyramid_of(batch), batch["text_ids"].shape[1])

    def put(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """Returns the fields that the step takes, with this process's part of a batch as arrays of the whole batch."""
        return self._put(batch)

    def _put(self, batch: Mapping[str, np.ndarray], *more: str) -> Batch:
        return put_batch(self.mesh, {name: batch[name] for name in batch if name in (*BATCH_FIELDS, *more)})

    def _evaluation(self, pyramid: Pyramid, kinds: int) -> Programs:
        """Returns the evaluation of batches of a pyramid with so many kinds of edits."""
        if (pyramid, kinds) not in self._evaluations:
            function = jitted_evaluation(self.config, pyramid, self.mesh, kinds)
            self._evaluations[pyramid, kinds] = Programs("evaluation", function.lower, self.mesh)
        return self._evaluations[pyramid, kinds]

    def prepare_evaluation(self, kinds: int) -> None:
        """Compiles the evaluation of batches of the model's first aspect with so many kinds of edits."""
        frozen = compile_step.abstract_frozen(self.config, self.mesh)
        batch = compile_step.abstract_batch(self.config, self.pyramid, self.mesh)
        if kinds:
            batch[KINDS] = jax.ShapeDtypeStruct(
                (self.config.data.batch_size,), np.int32, sharding=batch_sharding(self.mesh)
            )
        self._evaluation(self.pyramid, kinds).prepare(self.abstract_state.params, frozen, batch)

    def _numbers(self, pyramid: Pyramid) -> Programs:
        """Returns the function of `verify.make_numbers` for batches of a pyramid."""
        if pyramid not in self._numbers_of:
            function = jax.jit(make_numbers(self.config, pyramid), out_shardings=replicated(self.mesh))
            self._numbers_of[pyramid] = Programs("numbers of examples", function.lower, self.mesh)
        return self._numbers_of[pyramid]

    def examples(self, frozen: Params) -> Examples:
        """Returns what the devices compute of the examples of a batch, to be compared."""
        shares = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        sharding = batch_sharding(self.mesh)

        @functools.partial(jax.jit, out_shardings=sharding)
        def moved(batch: Batch) -> Batch:
            return jax.tree.map(lambda x: jnp.roll(x, len(x) // shares, axis=0), batch)

        def numbers(state: TrainState, batch: Batch, places: int) -> np.ndarray:
            run = self._numbers(self._pyramid_of(batch))
            for _ in range(places):
                batch = moved(batch)
            found = jax.device_get(run(state.params, frozen, batch))
            return np.roll(found, -places * len(found) // shares, axis=0)

        return Examples(shares=self.mesh.devices.reshape(shares, -1).tolist(), numbers=numbers)

    def prepare_numbers(self) -> None:
        """Compiles what `examples` calls, for batches of the model's first aspect."""
        frozen = compile_step.abstract_frozen(self.config, self.mesh)
        batch = compile_step.abstract_batch(self.config, self.pyramid, self.mesh)
        self._numbers(self.pyramid).prepare(self.abstract_state.params, frozen, batch)

    def evaluate(
        self,
        state: TrainState,
        frozen: Params,
        batches: Iterable[Mapping[str, np.ndarray]],
        kinds: Sequence[str] = (),
    ) -> dict[str, np.ndarray]:
        """Returns mean metrics of `batches`, this process's part of each. Stops between two of them if the run must.

        Args:
          state: its parameters give `eval/NAME`, its EMA, if there is one, `eval_ema/NAME`.
          frozen: from `load_frozen`.
          batches: held-out ones.
          kinds: names of the kinds of edits that the field `KINDS` of the batches numbers. Those that occur, in the
            batches of any process, have `GROUP/loss_by_kind/NAME` and `GROUP/bit_accuracy_by_kind/NAME`.

        Raises UserError if there is no batch.
        """
        groups = {"eval": state.params} | ({} if state.ema is None else {"eval_ema": state.ema})
        found: dict[str, list[Metrics]] = {group: [] for group in groups}
        for batch in batches:
            placed = self._put(batch, KINDS) if kinds else self.put(batch)
            run = self._evaluation(self._pyramid_of(placed), len(kinds))
            for group, params in groups.items():
                poll()
                found[group].append(jax.device_get(run(params, frozen, placed)))
        if not found["eval"]:
            why = f"no aspect has data.batch_size = {self.config.data.batch_size} held-out examples"
            why = why if self.config.eval_batches > 0 else f"eval_batches is {self.config.eval_batches}"
            raise UserError(f"there is nothing to evaluate on: {why}; set cadence.eval_every to 0 to do without")
        return {
            f"{group}/{name}": value
            for group, metrics in found.items()
            for name, value in _mean_metrics(metrics, kinds).items()
        }


def _mean_metrics(metrics: Sequence[Metrics], kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the means of metrics of equally many examples, and those by kind from their sums."""
    sums = ("count", *BY_EXAMPLE) if kinds else ()
    means = {name: np.mean([each[name] for each in metrics], axis=0) for name in metrics[0] if name not in sums}
    if kinds:
        count, *values = (np.sum([each[name] for each in metrics], axis=0) for name in sums)
        for name, value in zip(("loss_by_kind", "bit_accuracy_by_kind"), values, strict=True):
            means |= {f"{name}/{kind}": value[i] / count[i] for i, kind in enumerate(kinds) if count[i]}
    return means
