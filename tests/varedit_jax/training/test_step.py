"""The editor's training step: accumulation, text drop, trained parts, noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varedit_jax.config import DataConfig, LossConfig, OptimizerConfig, RunConfig, preset
from varedit_jax.parameters import abstract_params
from varedit_jax.scales import Pyramid, editor_pyramid
from varedit_jax.text.t5 import T5Encoder
from varedit_jax.tokenizer.tokens import encode_images
from varedit_jax.training import step as step_module
from varedit_jax.training.state import TrainState
from varedit_jax.training.step import make_loss, make_step

TINY = preset("tiny")
MODEL = dataclasses.replace(
    TINY,
    text=dataclasses.replace(TINY.text, vocabulary_size=20, layers=1),
    transformer=dataclasses.replace(TINY.transformer, depth=2),
    grids=((1, 1), (2, 2)),
)
QUIET = LossConfig(noise_max=0.0, text_drop=0.0)
RUN = RunConfig(name="test", model=MODEL, loss=QUIET, data=DataConfig(text_tokens=5), train_text=True)
PYRAMID = editor_pyramid(MODEL)
KEY = jax.random.key(0)
RATE = 0.1
SGD = optax.sgd(RATE)  # the update shows the gradient, scale and all


def accumulating(parts: int) -> RunConfig:
    return dataclasses.replace(RUN, optimizer=OptimizerConfig(accumulation=parts))


def batch_of(size: int = 4, model=MODEL) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    rows, columns = editor_pyramid(model).cells(model.patchify).last
    shape = (size, rows, columns, model.tokenizer.bits)
    return {
        "text_ids": draw.integers(0, 20, (size, 5)).astype(np.int32),
        "text_length": np.arange(1, size + 1, dtype=np.int32),
        "source_features": draw.normal(size=shape).astype(np.float32),
        "target_features": draw.normal(size=shape).astype(np.float32),
    }


@pytest.fixture(scope="module")
def params(lively):
    return {part: lively(abstract_params(MODEL, part)) for part in ("transformer", "text", "tokenizer")}


@pytest.fixture(scope="module")
def state(params):
    trained = {part: params[part] for part in ("transformer", "text")}
    return TrainState(step=np.int32(7), params=trained, opt_state=SGD.init(trained))


@pytest.fixture(scope="module")
def step(quick_jit):
    """The step on whole batches, which the tests share."""
    return quick_jit(make_step(accumulating(1), PYRAMID, SGD))


@pytest.fixture(scope="module")
def evaluate(quick_jit):
    """Loss without noise, with the text encoder frozen."""
    return quick_jit(make_loss(dataclasses.replace(RUN, train_text=False), PYRAMID, training=False))


def test_accumulation_equals_one_batch(step, state, quick_jit):
    """Two microbatches of two give the update, and the metrics, of one batch of four."""
    whole, metrics = step(state, {}, batch_of(), KEY)
    halves, metrics_of_halves = quick_jit(make_step(accumulating(2), PYRAMID, SGD))(state, {}, batch_of(), KEY)
    assert int(whole.step) == int(halves.step) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), whole.params, halves.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), metrics, metrics_of_halves)
    moved = jax.tree.map(lambda new, old: np.linalg.norm((np.asarray(new) - old).ravel()), whole.params, state.params)
    norm = np.linalg.norm(jax.tree.leaves(moved)) / RATE
    assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-3)  # the update is small beside the weights
    assert np.linalg.norm(jax.tree.leaves(moved["text"])) > 1e-4  # train_text


def test_microbatches_are_summed_in_float32():
    """Of blocks that compute in bfloat16, gradients are float32, and 64 microbatches keep what bfloat16 would drop."""
    model = dataclasses.replace(MODEL, transformer=dataclasses.replace(MODEL.transformer, dtype="bfloat16"))
    run = dataclasses.replace(RUN, model=model)
    trained = {part: abstract_params(model, part) for part in ("transformer", "text")}
    gradient = jax.grad(make_loss(run, PYRAMID, training=True), has_aux=True)
    gradients, _ = jax.eval_shape(gradient, trained, {}, batch_of(), KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype("float32")}

    def one_number(params, frozen, batch, key):
        return batch["value"].sum() * params, {}

    values = np.full(64, 2**-9, np.float32)
    values[0] = 1
    found, _ = step_module._accumulated(one_number, np.float32(1), {}, {"value": values}, KEY, 64)
    assert float(found) * 64 == 1 + 63 * 2**-9  # 1 in bfloat16, whose next number is 1 + 2^-7


def test_loss_falls(step, state):
    losses = []
    for number in range(20):
        state, metrics = step(state, {}, batch_of(), jax.random.fold_in(KEY, number))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0], losses


def unchanged(new: TrainState, old: TrainState) -> bool:
    """Returns True if two states are the same except for the step count."""
    same = jax.tree.map(np.array_equal, new.replace(step=0), old.replace(step=0))
    return all(jax.tree.leaves(same))


def test_exactly_the_poisoned_steps_change_nothing(step, state):
    """A batch with one NaN is skipped and counted; the next step is as if it had not occurred."""
    poisoned = batch_of()
    poisoned["target_features"][2, 0, 1, 0] = np.nan
    expected, kept = state, state
    for number, batch in enumerate((batch_of(), poisoned, batch_of(), poisoned, poisoned)):
        new, metrics = step(kept, {}, batch, jax.random.fold_in(KEY, number))
        assert float(metrics["skipped"]) == (batch is poisoned)
        assert int(new.step) == int(kept.step) + 1
        assert unchanged(new, kept) == (batch is poisoned)
        if batch is not poisoned:
            expected, _ = step(expected, {}, batch, jax.random.fold_in(KEY, number))
        kept = new
    assert unchanged(kept, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))


def test_a_poisoned_gradient_changes_nothing(monkeypatch, state, quick_jit):
    """A gradient that is not finite is skipped although the loss is finite."""
    bitwise_loss = step_module.bitwise_loss

    def poisoned(logits, residuals, *rest):
        loss, metrics = bitwise_loss(logits, residuals, *rest)
        return loss + jnp.sqrt(0 * jnp.sum(jnp.square(logits))), metrics  # the root of 0 has no finite gradient

    monkeypatch.setattr(step_module, "bitwise_loss", poisoned)
    config = dataclasses.replace(accumulating(1), optimizer=OptimizerConfig(ema_decay=0.5))
    state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.params))
    new, metrics = quick_jit(make_step(config, PYRAMID, SGD))(state, {}, batch_of(), KEY)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["gradient_norm"])
    assert float(metrics["skipped"]) == 1 and unchanged(new, state)


def test_the_ema_follows_the_parameters(state, quick_jit):
    config = dataclasses.replace(accumulating(1), optimizer=OptimizerConfig(ema_decay=0.75))
    state = state.replace(ema=jax.tree.map(np.copy, state.params))
    new, _ = quick_jit(make_step(config, PYRAMID, SGD))(state, {}, batch_of(), KEY)
    jax.tree.map(
        lambda ema, now, before: np.testing.assert_allclose(ema, 0.75 * before + 0.25 * now, atol=1e-6),
        new.ema, new.params, state.params,
    )  # fmt: skip


def test_quiet_training_equals_evaluation(step, state, params, evaluate):
    """Without noise, drop and stochastic depth training adds nothing; a frozen text encoder gives the same loss."""
    _, metrics = step(state, {}, batch_of(), KEY)
    loss, evaluated = evaluate({"transformer": params["transformer"]}, {"text": params["text"]}, batch_of(), KEY)
    assert float(loss) == float(evaluated["loss"])
    for name, value in evaluated.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_online_features_equal_precomputed(params, evaluate, quick_jit):
    """Images encoded in the step give the loss of precomputed features, with source and target in their places."""
    draw = np.random.default_rng(1)
    side = PYRAMID.last[0] * MODEL.token_stride
    images = {name: draw.integers(0, 256, (4, side, side, 3), np.uint8) for name in ("source", "target")}
    text = {name: value for name, value in batch_of().items() if name.startswith("text")}
    encode = quick_jit(lambda weights, images: encode_images(weights, images, MODEL))
    ahead = {f"{name}_features": np.asarray(encode(params["tokenizer"], x)) for name, x in images.items()}
    results = [
        float(evaluate({"transformer": params["transformer"]}, params, text | sides, KEY)[0])
        for sides in (images, ahead)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_precomputed_text_equals_its_encoding_in_the_step(params, evaluate, quick_jit):
    batch = batch_of()
    loss, _ = evaluate(params, params, batch, KEY)
    encode = quick_jit(T5Encoder(MODEL.text, jnp.float32).apply)
    ahead = {**batch, "text_features": encode({"params": params["text"]}, batch["text_ids"], batch["text_length"])}
    without = {part: params[part] for part in ("transformer", "tokenizer")}
    again, _ = evaluate(without, without, ahead, KEY)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    other, _ = evaluate(without, without, {**ahead, "text_features": -ahead["text_features"]}, KEY)
    assert abs(other - loss) > 1e-4


def test_text_drop_and_stochastic_depth(state, params, evaluate, quick_jit):
    """If every text is dropped its words do not matter; stochastic depth follows the key, only in training."""
    deep = dataclasses.replace(MODEL, transformer=dataclasses.replace(MODEL.transformer, drop_path=0.5))
    config = dataclasses.replace(RUN, model=deep, loss=dataclasses.replace(QUIET, text_drop=1.0))
    loss_fn = quick_jit(make_loss(config, PYRAMID, training=True))
    other = batch_of()
    other["text_ids"] = (other["text_ids"] + 3) % 20
    losses = [float(loss_fn(state.params, {}, batch, KEY)[0]) for batch in (batch_of(), other)]
    assert losses[0] == losses[1]
    keys = jax.random.split(KEY, 6)
    assert len({float(loss_fn(state.params, {}, other, key)[0]) for key in keys}) > 1
    quiet = [float(evaluate(state.params, params, batch, KEY)[0]) for batch in (batch_of(), other)]
    assert quiet[0] != quiet[1]


@pytest.mark.parametrize("patchify", [False, True])
def test_noise_reaches_the_target_alone(monkeypatch, patchify):
    """Flips are drawn in tokenizer cells, for training only, and handed to the residual loop of the target."""
    model = dataclasses.replace(
        MODEL,
        patchify=patchify,
        transformer=dataclasses.replace(MODEL.transformer, token_bits=16 if patchify else 4, conditioning="full"),
    )
    config = dataclasses.replace(RUN, model=model, loss=LossConfig(noise_scales=1, noise_max=0.3))
    drawn, used = [], []
    draw_flips, make_tokens = step_module.draw_flips, step_module.make_tokens
    monkeypatch.setattr(step_module, "draw_flips", lambda *args: drawn.append(draw_flips(*args)) or drawn[-1])
    monkeypatch.setattr(step_module, "make_tokens", lambda *args: used.append(args) or make_tokens(*args))
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch_of(model=model)))
    trained = {part: abstract_params(model, part) for part in ("transformer", "text")}
    for training in (True, False):
        loss, _ = jax.eval_shape(make_loss(config, editor_pyramid(model), training), trained, {}, batch, KEY)
        assert loss.shape == () and loss.dtype == jnp.float32
    assert [[flip.shape for flip in flips] for flips in drawn] == [[(4, 2, 2, 4) if patchify else (4, 1, 1, 4)]]
    assert [args[4] for args in used] == [drawn[0], ()]


def test_a_pyramid_of_fewer_scales_sees_area_resized_features(params, quick_jit):
    """A stage's loss on features of the whole pyramid is that on features pooled beforehand."""
    whole = Pyramid(((1, 1), (2, 2), (4, 4)), ((1, 1), (2, 2), (8, 8)))
    loss_fn = quick_jit(make_loss(RUN, whole.first(2), training=False))
    fine = batch_of()
    for side in ("source_features", "target_features"):
        fine[side] = np.random.default_rng(len(side)).normal(size=(4, 4, 4, MODEL.tokenizer.bits)).astype(np.float32)
    pooled = {
        name: x.reshape(4, 2, 2, 2, 2, -1).mean((2, 4)) if name.endswith("features") else x for name, x in fine.items()
    }
    losses = [float(loss_fn(params, {}, batch, KEY)[0]) for batch in (fine, pooled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_padding_of_texts_changes_nothing(state, quick_jit):
    """Loss and gradients of texts padded to 5 tokens equal those of 16, with dropped texts and noise."""
    config = dataclasses.replace(RUN, loss=LossConfig(noise_max=0.3, text_drop=0.5))
    gradient = quick_jit(jax.value_and_grad(make_loss(config, PYRAMID, training=True), has_aux=True))
    short = batch_of()
    long = {**short, "text_ids": np.pad(short["text_ids"], ((0, 0), (0, 11)))}
    (loss, _), gradients = gradient(state.params, {}, short, KEY)
    (other, _), others = gradient(state.params, {}, long, KEY)
    assert float(loss) == pytest.approx(float(other), rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, others)
    full = {**long, "text_length": np.full(4, 16, np.int32)}  # padding that is seen would show
    assert abs(float(gradient(state.params, {}, full, KEY)[0][0]) - float(loss)) > 1e-4
