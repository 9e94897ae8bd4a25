"""The initial state and frozen weights of an editor's training run."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.config import DataConfig, LossConfig, MeshConfig, OptimizerConfig, RunConfig, preset
from varedit_jax.errors import UserError
from varedit_jax.parallel.mesh import make_mesh
from varedit_jax.parameters import abstract_params
from varedit_jax.scales import editor_pyramid
from varedit_jax.training.compile_step import abstract_frozen
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.setup import load_frozen, make_evaluate, start
from varedit_jax.training.state import make_init
from varedit_jax.training.step import make_loss
from varedit_jax.weights import names
from varedit_jax.weights.directory import save_weights

TINY = preset("tiny")
MODEL = dataclasses.replace(
    TINY,
    text=dataclasses.replace(TINY.text, vocabulary_size=20, layers=1),
    transformer=dataclasses.replace(TINY.transformer, depth=2),
    grids=((1, 1), (2, 2)),
)
RUN = RunConfig(name="test", model=MODEL, data=DataConfig(text_tokens=5), train_text=True)
OPTIMIZER = make_optimizer(RUN.optimizer, RUN.steps)


@pytest.fixture(scope="module")
def shipped(lively, tmp_path_factory):
    """Weights of all parts, and their directory."""
    params = {part: lively(abstract_params(MODEL, part)) for part in ("tokenizer", "text", "transformer")}
    directory = tmp_path_factory.mktemp("weights") / "editor"
    save_weights(directory, MODEL, params)
    return params, str(directory)


def load(run):
    """The frozen weights of a run, on one device."""
    return load_frozen(run, abstract_frozen(run, make_mesh(MeshConfig())))


def test_frozen_weights(shipped):
    """A run loads what it does not train, and nothing else."""
    params, directory = shipped
    frozen = load(dataclasses.replace(RUN, tokenizer_weights=directory))
    jax.tree.map(np.testing.assert_array_equal, frozen, {"tokenizer": params["tokenizer"]})
    frozen = load(dataclasses.replace(RUN, train_text=False, tokenizer_weights=directory, text_weights=directory))
    jax.tree.map(np.testing.assert_array_equal, frozen, {part: params[part] for part in ("tokenizer", "text")})


def test_a_frozen_text_encoder_has_the_type_it_computes_in(shipped):
    params, directory = shipped
    run = dataclasses.replace(RUN, train_text=False, tokenizer_weights=directory, text_weights=directory)
    frozen = load(dataclasses.replace(run, text_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen["text"])} == {jnp.dtype("bfloat16")}
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), frozen["text"], params["text"])


def test_frozen_weights_that_do_not_fit(shipped):
    _, directory = shipped
    with pytest.raises(UserError, match="no tokenizer_weights; give --config.tokenizer_weights=DIRECTORY"):
        load(RUN)
    with pytest.raises(UserError, match="no text_weights; give --config.text_weights=DIRECTORY"):
        load(dataclasses.replace(RUN, train_text=False, tokenizer_weights=directory))
    wide = dataclasses.replace(MODEL, tokenizer=dataclasses.replace(MODEL.tokenizer, base_channels=16))
    with pytest.raises(UserError, match="is of another model: .* has shape .* expected is"):
        load(dataclasses.replace(RUN, model=wide, tokenizer_weights=directory))


@pytest.mark.parametrize("train_text", [True, False])
def test_state_holds_what_is_trained(train_text):
    state = jax.eval_shape(make_init(dataclasses.replace(RUN, train_text=train_text), OPTIMIZER))
    expected = {"transformer": abstract_params(MODEL, "transformer")}
    if train_text:
        expected["text"] = abstract_params(MODEL, "text")
    assert state.params == expected
    assert (state.step.shape, state.step.dtype) == ((), jnp.int32)
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.shape]
    assert sorted(moments) == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(expected) if leaf.shape])


def test_seed_decides():
    """The compiled program contains the seed."""
    programs = [
        jax.jit(make_init(dataclasses.replace(RUN, seed=seed), OPTIMIZER)).lower().as_text() for seed in (0, 0, 1)
    ]
    assert programs[0] == programs[1] != programs[2]


def test_start(shipped):
    """Trained parts come from `init_from`; the rest is initialized."""
    params, directory = shipped
    abstract = jax.eval_shape(make_init(RUN, OPTIMIZER))

    def ones():
        return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), abstract)

    state = start(RUN, abstract, ones)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, np.ones_like(leaf)), state)
    loaded = start(dataclasses.replace(RUN, init_from=directory), abstract, ones)
    trained = {part: params[part] for part in ("transformer", "text")}
    jax.tree.map(np.testing.assert_array_equal, loaded.params, trained)
    jax.tree.map(np.testing.assert_array_equal, loaded.replace(params=None), state.replace(params=None))
    averaged = dataclasses.replace(RUN, init_from=directory, optimizer=OptimizerConfig(ema_decay=0.9))
    abstract = abstract.replace(ema=abstract.params)
    averages = start(averaged, abstract, lambda: ones().replace(ema=ones().params)).ema
    jax.tree.map(np.testing.assert_array_equal, averages, trained)
    deeper = dataclasses.replace(MODEL, transformer=dataclasses.replace(MODEL.transformer, depth=3))
    with pytest.raises(UserError, match=r"cannot start from .*: transformer blocks/ada_gss \(there \[1, .* here \[2, "):
        run = dataclasses.replace(RUN, model=deeper, init_from=directory)
        start(run, jax.eval_shape(make_init(run, OPTIMIZER)), ones)


@pytest.mark.parametrize(
    ("tokenizer", "transformer", "text", "anew"),
    [
        ({"bits": 8}, {"token_bits": 8}, {}, r"word_embed/kernel|head/(kernel|bias)"),
        ({}, {"text_width": 48}, {"width": 48}, r"text_(unconditional|norm|pool|proj_in|proj_out)\b.*"),
        ({}, {"absolute_positions": True}, {}, r"position_embed/kernel"),
    ],
    ids=["other bits", "other text encoder", "positions"],
)
def test_start_from_a_model_that_differs_where_it_may(shipped, tokenizer, transformer, text, anew):
    """As from Infinity: arrays that do not fit stay initialized, the others are loaded, and the log lists both."""
    params, directory = shipped
    model = dataclasses.replace(
        MODEL,
        tokenizer=dataclasses.replace(MODEL.tokenizer, **tokenizer),
        text=dataclasses.replace(MODEL.text, **text),
        transformer=dataclasses.replace(MODEL.transformer, **transformer),
    )
    run = dataclasses.replace(RUN, model=model, init_from=directory, train_text=False)
    abstract = jax.eval_shape(make_init(run, OPTIMIZER))
    log: list[str] = []
    state = start(
        run, abstract, lambda: jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7, leaf.dtype), abstract), log.append
    )
    found, theirs = names.flat(state.params["transformer"]), names.flat(params["transformer"])
    for path, tensor in found.items():
        if re.fullmatch(anew, path):
            np.testing.assert_array_equal(tensor, np.full_like(tensor, 7))
            assert path in log[1] and path not in log[0].split(": ")[-1].split(", ")
        else:
            np.testing.assert_array_equal(tensor, theirs[path])
            assert path in log[0]
    changed = [path for path in found if re.fullmatch(anew, path)]
    assert log[1].startswith(f"transformer: {len(changed)} arrays do not fit and are initialized: ")


def test_evaluation_has_no_noise():
    """Its program is the same with and without noise and text drop; that of training is not."""
    noisy = dataclasses.replace(RUN, loss=LossConfig(noise_max=0.3, text_drop=0.5))
    quiet = dataclasses.replace(noisy, loss=LossConfig(noise_max=0.0, text_drop=0.0))
    trained = {part: abstract_params(MODEL, part) for part in ("transformer", "text")}
    features = jax.ShapeDtypeStruct((2, 2, 2, 4), jnp.float32)
    batch = {"source_features": features, "target_features": features}
    batch["text_ids"], batch["text_length"] = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((2, 3), (2,)))
    pyramid = editor_pyramid(MODEL)

    def training(config):
        loss_fn = make_loss(config, pyramid, training=True)
        return jax.jit(lambda *args: loss_fn(*args, jax.random.key(0))[1]).lower(trained, {}, batch).as_text()

    def evaluation(config):
        return jax.jit(make_evaluate(config, pyramid)).lower(trained, {}, batch).as_text()

    assert evaluation(noisy) == evaluation(quiet)
    assert training(noisy) != training(quiet)
