"""The initial state and frozen weights of an editor's training run."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.config import DataConfig, LossConfig, MeshConfig, OptimizerConfig, RunConfig, preset
from varedit_jax.errors import UserError
from varedit_jax.parallel.mesh import make_mesh, replicated
from varedit_jax.parameters import abstract_params
from varedit_jax.scales import editor_pyramid
from varedit_jax.training.compile_step import abstract_frozen
from varedit_jax.training.optimizer import make_optimizer
from varedit_jax.training.setup import KINDS, MeshRun, load_frozen, make_evaluate, start
from varedit_jax.training.state import TrainState, make_init
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


def held_out(size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of precomputed features with kinds of edits; the last example has none."""
    draw = np.random.default_rng(seed)
    shape = (size, 2, 2, 4)
    return {
        "text_ids": draw.integers(0, 20, (size, 5)).astype(np.int32),
        "text_length": draw.integers(1, 6, size).astype(np.int32),
        "source_features": draw.normal(size=shape).astype(np.float32),
        "target_features": draw.normal(size=shape).astype(np.float32),
        KINDS: np.array([0, 2, 0, *[2] * (size - 4), -1], np.int32),
    }


def test_evaluation_in_microbatches(shipped, quick_jit):
    """It equals that of the whole batch, and so do the sums by kind, which are those of each example alone."""
    params, _ = shipped
    batch, pyramid = held_out(8), editor_pyramid(MODEL)
    inputs = {name: value for name, value in batch.items() if name != KINDS}
    parted = dataclasses.replace(RUN, optimizer=OptimizerConfig(accumulation=4))
    whole = quick_jit(make_evaluate(RUN, pyramid, kinds=3))(params, {}, batch)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=2e-6),
        quick_jit(make_evaluate(parted, pyramid, kinds=3))(params, {}, batch), whole,
    )  # fmt: skip
    alone = quick_jit(make_evaluate(RUN, pyramid))
    losses = [alone(params, {}, {name: value[[row]] for name, value in inputs.items()}) for row in range(8)]
    assert whole["count"].tolist() == [2, 0, 5]
    for name, of_batch in zip(("example_loss", "example_bit_accuracy"), ("loss", "bit_accuracy"), strict=True):
        values = np.array([float(each[of_batch]) for each in losses])
        np.testing.assert_allclose(whole[name], [values[[0, 2]].sum(), 0, values[[1, 3, 4, 5, 6]].sum()], rtol=1e-5)
        np.testing.assert_allclose(whole[of_batch], values.mean(), rtol=1e-5)


def test_smoothing_is_for_training_alone(shipped, quick_jit):
    params, _ = shipped
    smooth = dataclasses.replace(RUN, loss=LossConfig(noise_max=0.0, text_drop=0.0, label_smoothing=0.2))
    batch = {name: value for name, value in held_out(4).items() if name != KINDS}
    plain, same = (quick_jit(make_evaluate(run, editor_pyramid(MODEL)))(params, {}, batch) for run in (RUN, smooth))
    assert float(plain["loss"]) == float(same["loss"])
    loss, _ = quick_jit(make_loss(smooth, editor_pyramid(MODEL), training=True))(params, {}, batch, jax.random.key(0))
    assert abs(float(loss) - float(plain["loss"])) > 1e-3


def test_metrics_of_an_evaluation(shipped):
    """Means over batches of different kinds, by kind over all their examples; the EMA's beside those of the parameters.

    A program that was prepared is used.
    """
    params, _ = shipped
    data = DataConfig(batch_size=4, text_tokens=5, features="precomputed")
    config = dataclasses.replace(RUN, data=data, optimizer=OptimizerConfig(accumulation=2, ema_decay=0.5))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    trained = {part: params[part] for part in ("transformer", "text")}
    names_of_kinds = ("add", "remove", "move")
    batches = [held_out(4), held_out(4, seed=1) | {KINDS: np.full(4, 2, np.int32)}]
    with jax.set_mesh(mesh):
        run = MeshRun(config, mesh)
        run.prepare_evaluation(3)
        averages = jax.tree.map(lambda x: 0.5 * x, trained)
        state = jax.device_put(TrainState(0, trained, (), averages), replicated(mesh))
        frozen = jax.device_put({"tokenizer": params["tokenizer"]}, replicated(mesh))
        found = run.evaluate(state, frozen, batches, names_of_kinds)
        plain = run.evaluate(state.replace(ema=None), frozen, batches)
        assert len(run._evaluation(run.pyramid, 3)._programs) == 1
    assert {name for name in found if "by_kind" in name} == {
        f"{group}/{metric}/{kind}"
        for group in ("eval", "eval_ema")
        for metric in ("loss_by_kind", "bit_accuracy_by_kind")
        for kind in ("add", "move")
    }
    assert {name.partition("/")[0] for name in plain} == {"eval"}
    for name, value in plain.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    assert found["eval_ema/loss"] != found["eval/loss"]
    one = make_evaluate(config, run.pyramid, 3)
    first, second = (jax.jit(one)(trained, frozen, batch) for batch in batches)
    moves = (first["example_loss"][2] + second["example_loss"][2]) / (1 + 4)
    assert float(found["eval/loss_by_kind/move"]) == pytest.approx(float(moves), rel=1e-5)
    assert float(found["eval/loss_by_kind/add"]) == pytest.approx(float(first["example_loss"][0]) / 2, rel=1e-5)
