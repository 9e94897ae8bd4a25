"""What a training run of an editor starts from: frozen weights, initial state, evaluation."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from varedit_jax.config import RunConfig
from varedit_jax.conversion import names, ours
from varedit_jax.errors import UserError
from varedit_jax.parameters import init_text, init_transformer
from varedit_jax.scales import Pyramid
from varedit_jax.training.ledger import say
from varedit_jax.training.state import TrainState
from varedit_jax.training.step import Batch, Metrics, Params, make_loss, make_step

__all__ = ["load_frozen", "make_evaluate", "make_init", "make_step", "start"]


def load_frozen(config: RunConfig, abstract: Params) -> Params:
    """Weights the run uses but does not change: the tokenizer, and the text encoder unless it is trained.

    `abstract` are these parts as jax.ShapeDtypeStruct (sharded.abstract_frozen): each process reads what its devices
    hold of them. Raises UserError if the card names no folder for one, or the folder's weights do not fit.
    """
    folders = {"tokenizer": config.tokenizer_weights, "text": config.text_weights}
    frozen = {}
    for part, wanted in abstract.items():
        if not folders[part]:
            raise UserError(f"the card names no {part}_weights; give --config.{part}_weights=FOLDER")
        leaves, like = ours.open_part(folders[part], part, wanted), names.flat(wanted)
        frozen[part] = names.tree({path: ours.place(leaf, like[path]) for path, leaf in leaves.items()})
    return frozen


def make_init(config: RunConfig, optimizer: optax.GradientTransformation) -> Callable[[], TrainState]:
    """Makes the state of step 0 with random parameters, from the config's seed: `() -> TrainState`."""

    def init() -> TrainState:
        transformer_key, text_key = jax.random.split(jax.random.key(config.seed))
        params = {"transformer": init_transformer(config.model, transformer_key)}
        if config.train_text:
            params["text"] = init_text(config.model, text_key)
        # Copies: the state is donated to each step, and no array can be given away twice.
        ema = jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else None
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params), ema=ema)

    return init


# What may differ between a model and the one it starts from, and is then initialized anew, as the recipe does: the maps
# from and to bits of another tokenizer; everything about a text encoder of another width; what published models lack.
_MAY_DIFFER = {
    "transformer": (
        r"word_embed/kernel|head/.*",
        r"text_.*",
        r"position_embed/.*",
    ),
}


def start(
    config: RunConfig, abstract: TrainState, init: Callable[[], TrainState], log: Callable[[str], None] = say
) -> TrainState:
    """The state of step 0: random, or with what is trained (the transformer, the text encoder) from `init_from`.

    `init_from` is a folder of weights or of a run. What does not fit is initialized, if the recipe allows it to differ;
    `log` gets what was loaded and what was not. Every array is made where `abstract` has it, and each process reads
    what its devices hold. Raises UserError naming anything else that does not fit.
    """
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if not config.init_from:
        return jax.jit(init, out_shardings=places)()
    found = {part: _fitting(config.init_from, part, params) for part, params in abstract.params.items()}
    state = jax.jit(init, out_shardings=places)()
    params = {}
    for part, (loaded, anew) in found.items():
        log(f"{part} from {config.init_from}: {len(loaded)} arrays loaded: {', '.join(loaded) or 'none'}")
        if anew:
            log(f"{part}: {len(anew)} arrays do not fit and are initialized: {'; '.join(anew.values())}")
        values, like = names.flat(state.params[part]), names.flat(abstract.params[part])
        params[part] = names.tree(
            {path: ours.place(loaded[path], like[path]) if path in loaded else x for path, x in values.items()}
        )
    ema = state.ema
    if ema is not None:  # Copies: the state is donated to each step, and no array can be given away twice.
        ema = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=places.ema)(params)
    return state.replace(params=params, ema=ema)


def _fitting(folder: str, part: str, expected: Params) -> tuple[dict[str, ours.Leaf], dict[str, str]]:
    """Arrays of a part that a run can start from, by path; and, by path, how the others differ."""
    wanted = names.flat(expected)
    found = ours.find_part(folder, part)
    differ = {
        path: f"{path} (there {list(found[path].shape) if path in found else 'none'}, here {list(leaf.shape)})"
        for path, leaf in wanted.items()
        if path not in found or tuple(found[path].shape) != tuple(leaf.shape)
    }
    groups = [re.compile(pattern) for pattern in _MAY_DIFFER.get(part, ())]
    anew: set[str] = set()
    for group in groups:  # one that differs takes its group with it, as the recipe has it
        members = {path for path in wanted if group.fullmatch(path)}
        if members & set(differ):
            anew |= members
    refused = [text for path, text in differ.items() if path not in anew]
    if refused:
        raise UserError(f"a run of this configuration cannot start from {folder}: {part} {'; '.join(refused)}")
    loaded = {path: found[path] for path in wanted if path not in anew}
    return loaded, {path: differ.get(path, f"{path} (goes with them)") for path in wanted if path in anew}


def make_evaluate(config: RunConfig, pyramid: Pyramid) -> Callable[[Params, Params, Batch], Metrics]:
    """Metrics of a held-out batch, without noise or drop: `(params, frozen, batch) -> metrics`."""
    loss_fn: Callable[..., Any] = make_loss(config, pyramid, training=False)

    def evaluate(params: Params, frozen: Params, batch: Batch) -> Metrics:
        return loss_fn(params, frozen, batch, jax.random.key(0))[1]

    return evaluate
