"""The scale loop with its caches gives what one teacher-forced pass gives; guidance and seeds do what they say."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varedit_jax.config import EditorConfig, SamplingConfig, preset
from varedit_jax.parameters import abstract_params
from varedit_jax.sampling.guidance import controls, guided_scales
from varedit_jax.sampling.sampler import SampledBits, sample_bits
from varedit_jax.scales import Pyramid
from varedit_jax.tokenizer import quantizer
from varedit_jax.tokenizer.tokens import source_tokens
from varedit_jax.transformer.model import Transformer

# Oblong, and below its full schedule, so that positions follow the released layout.
PYRAMID = Pyramid(((1, 1), (2, 3), (4, 5)), ((1, 1), (2, 3), (4, 5), (8, 10)))
BATCH, ROWS = 2, 7
LENGTHS = np.array([7, 3], np.int32)


def editor(conditioning: str, patchify: bool) -> EditorConfig:
    tiny = preset("tiny")
    transformer = dataclasses.replace(
        tiny.transformer, depth=3, conditioning=conditioning, token_bits=16 if patchify else 4
    )
    return dataclasses.replace(tiny, transformer=transformer, patchify=patchify)


def request_of(config: EditorConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    source = draw.normal(size=(BATCH, *PYRAMID.cells(config.patchify).last, config.tokenizer.bits))
    text = draw.normal(size=(BATCH, ROWS, config.text.width))
    return source.astype(np.float32), text.astype(np.float32), LENGTHS


def keys(*seeds: int) -> jax.Array:
    return jax.vmap(jax.random.key)(np.array(seeds, np.uint32))


class Run(NamedTuple):
    guidance: tuple[float, ...]
    temperature: tuple[float, ...]
    sample: SampledBits
    forced: np.ndarray  # teacher-forced logits [2 B, L, N, 2] from the sampled bits, the unconditional half last


def forced_logits(params: Any, sample: SampledBits, request: tuple[Any, ...], config: EditorConfig) -> jax.Array:
    """One pass over all scales and both halves, from the bits of a sample."""
    cells = PYRAMID.cells(config.patchify)
    inputs = [
        quantizer.to_tokens(
            quantizer.next_input(quantizer.dequantize(sample.bits[:scale], cells), scale, cells), config.patchify
        )
        for scale in range(1, PYRAMID.scales)
    ]
    source, text, lengths = request
    arguments = (source_tokens(source, config, PYRAMID), jnp.concatenate(inputs, axis=1), text, lengths)
    doubled = (jnp.concatenate([x, x]) for x in arguments)
    model = Transformer(config.transformer, PYRAMID)
    return model.apply({"params": params}, *doubled, jnp.arange(2 * BATCH) >= BATCH)


@pytest.fixture(
    scope="module",
    params=[
        ("sar", False, (3.0, 3.0, 3.0)),
        ("finest", False, (3.0, 1.0, 1.0)),
        ("full", True, (1.0, 1.0, 1.0)),
    ],
    ids=["sar", "finest, guidance ends", "full, patches, no guidance"],
)
def run(request: pytest.FixtureRequest, lively: Callable, quick_jit: Callable) -> Run:
    conditioning, patchify, guidance = request.param
    config = editor(conditioning, patchify)
    params = lively(abstract_params(config, "transformer", PYRAMID))
    sampling = SamplingConfig(guidance=guidance, temperature=(0.5, 2.0), greedy=True)

    configs = [sampling] * BATCH
    rest = controls(configs, PYRAMID.scales), config, PYRAMID, guided_scales(configs, PYRAMID.scales)

    @quick_jit
    def both(params: Any, *inputs: Any) -> tuple[SampledBits, jax.Array]:
        sample = sample_bits(params, *inputs, keys(0, 1), *rest)
        return sample, forced_logits(params, sample, inputs, config)

    return Run(guidance, (0.5, 2.0, 2.0), *jax.device_get(both(params, *request_of(config))))


def test_cached_scales_equal_the_teacher_forced_pass(run: Run) -> None:
    """Both halves where they run; nothing runs twice once no later scale is guided."""
    for scale, tokens in enumerate(PYRAMID.slices()):
        logits = run.sample.logits[scale]
        guided = any(value != 1 for value in run.guidance[scale:])
        assert len(logits) == (2 * BATCH if guided else BATCH)
        np.testing.assert_allclose(logits, run.forced[: len(logits), tokens], atol=1e-5)
    assert np.abs(run.forced[:BATCH] - run.forced[BATCH:]).max() > 0.1  # the halves do differ


def test_greedy_bits_follow_from_the_teacher_forced_pass(run: Run) -> None:
    """With both halves kept for every scale: guidance 1 and a half that is dropped change nothing."""
    with_text, without = run.forced[:BATCH], run.forced[BATCH:]
    for scale, tokens in enumerate(PYRAMID.slices()):
        cfg = run.guidance[scale]
        guided = (cfg * with_text + (1 - cfg) * without)[:, tokens] / run.temperature[scale]
        margin = guided[..., 1] - guided[..., 0]
        patchify = margin.shape[-1] == 16
        bits = np.asarray(quantizer.to_tokens(run.sample.bits[scale], patchify))
        clear = np.abs(margin) > 1e-4
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(bits[clear], (margin > 0)[clear])


def test_a_seed_belongs_to_a_image_not_to_its_place(lively: Callable, quick_jit: Callable) -> None:
    """The same bits in another order and beside another image; other bits from another seed."""
    config = editor("sar", False)
    params = lively(abstract_params(config, "transformer", PYRAMID))
    sampling = SamplingConfig(guidance=1.0, temperature=1.0)
    rest = controls([sampling] * BATCH, PYRAMID.scales), config, PYRAMID, 0
    draw = quick_jit(lambda *inputs: sample_bits(params, *inputs, *rest).bits)
    request = request_of(config)
    turned = tuple(x[::-1] for x in request)
    forth, back, again = draw(*request, keys(5, 6)), draw(*turned, keys(6, 5)), draw(*request, keys(5, 7))
    for one, other, third in zip(forth, back, again, strict=True):
        np.testing.assert_array_equal(one, other[::-1])
        np.testing.assert_array_equal(one[0], third[0])
    assert any((one[1] != third[1]).any() for one, third in zip(forth, again, strict=True))
