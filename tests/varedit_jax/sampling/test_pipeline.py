"""The stages of an edit: the same numbers as one program, no compilation for other settings, values that are kept."""

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import jax
import jax.monitoring
import numpy as np
import pytest

from varedit_jax.config import EditingConfig, SamplingConfig, preset
from varedit_jax.errors import UserError
from varedit_jax.parallel import compilation_cache, compiler_options
from varedit_jax.parameters import abstract_params
from varedit_jax.sampling import pipeline, sampler
from varedit_jax.sampling.editor import Editor
from varedit_jax.sampling.guidance import controls, guided_scales
from varedit_jax.scales import editor_pyramid, image_size
from varedit_jax.weights.directory import PARTS

TINY = preset("tiny")
PYRAMID = editor_pyramid(TINY)
SAMPLING = SamplingConfig(guidance=(3.0, 2.0, 1.0), temperature=0.7)  # the last scales are not guided
INSTRUCTIONS = ["add a red circle", "remove the square", "make it blue", "turn it"]
COMPILED = "/jax/core/compile/backend_compile_duration"  # an event of JAX, for programs from its cache, too


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """LLVM's optimizations off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler_options, "options_everywhere", lambda device: {"xla_backend_optimization_level": 0})
        pipeline._programs.cache_clear()  # those that other tests have made with them
        yield
    pipeline._programs.cache_clear()


@pytest.fixture(scope="module")
def editor(lively) -> Editor:
    return Editor(TINY, {part: lively(abstract_params(TINY, part)) for part in PARTS}, SAMPLING)


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """Gets a line for each program that is compiled from now on."""
    events: list[str] = []

    def listen(event: str, seconds: float, **more: Any) -> None:
        if event == COMPILED:
            events.append(f"{more}, {seconds} s")

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


def images(count: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (count, *image_size(TINY, PYRAMID), 3), np.uint8)


def test_the_stages_give_what_one_program_gives(editor):
    fitted, seeds = images(2), np.array([5, 6], np.uint32)
    ids_BT, length_B = editor.vocabulary.encode(INSTRUCTIONS[:2], 16)
    sampling = [SAMPLING, SamplingConfig(greedy=True, guidance=2.0)]
    guided = guided_scales(sampling, PYRAMID.scales)

    def whole(params: Any, images: Any, ids_BT: Any, length_B: Any, *draw: Any) -> jax.Array:
        source = sampler.encode_source(params["tokenizer"], images, TINY, EditingConfig())
        text = sampler.encode_text(params["text"], ids_BT, length_B, TINY, EditingConfig())
        sample = sampler.sample_bits(params["transformer"], source, text, length_B, *draw, TINY, PYRAMID, guided)
        return sampler.decode(params["tokenizer"], sample.bits, TINY, PYRAMID, EditingConfig(), every_scale=True)

    request = fitted, ids_BT, length_B, jax.vmap(jax.random.key)(seeds), controls(sampling, PYRAMID.scales)
    wanted = compiler_options.jit_everywhere(whole)(editor.params, *request)
    found = editor.edit_fitted(fitted, INSTRUCTIONS[:2], seeds.tolist(), sampling, every_scale=True)
    assert len(found) == PYRAMID.scales
    np.testing.assert_array_equal(found, wanted)


def test_nothing_is_compiled_for_other_settings(editor, compiled):
    editor.edit_fitted(images(4), INSTRUCTIONS, [0, 1, 2, 3])
    assert compiled
    compiled.clear()
    results = [editor.edit_fitted(images(4), INSTRUCTIONS, [0, 1, 2, 3])]
    for sampling in (
        SamplingConfig(guidance=(5.0, 1.5, 1.0), temperature=0.7),
        SamplingConfig(guidance=(3.0, 2.0, 1.0), temperature=(0.4, 1.3)),
        SamplingConfig(guidance=(3.0, 2.0, 1.0), temperature=0.7, top_p=0.6),
        SamplingConfig(guidance=(3.0, 2.0, 1.0), temperature=0.7, greedy=True),
    ):
        results.append(editor.edit_fitted(images(4), INSTRUCTIONS, [0, 1, 2, 3], sampling))
    results.append(editor.edit_fitted(images(4), INSTRUCTIONS, [7, 8, 9, 10]))
    results.append(editor.edit_fitted(images(4), INSTRUCTIONS[::-1], [0, 1, 2, 3]))
    results.append(editor.edit_fitted(images(4, seed=1), INSTRUCTIONS, [0, 1, 2, 3]))
    three = editor.edit_fitted(images(3), INSTRUCTIONS[:3], [0, 1, 2])
    assert compiled == []
    assert len({result.tobytes() for result in results}) == len(results)  # all of it has an effect
    np.testing.assert_array_equal(three, results[0][:, :3])


def test_what_is_warmed_up_is_not_compiled_again(editor, compiled):
    pipeline._programs.cache_clear()
    editor.warm_up((2,), text_tokens=9)
    assert compiled
    compiled.clear()
    editor.edit_fitted(images(2), INSTRUCTIONS[:2], [0, 1])
    assert compiled == []


def test_sources_texts_and_pairs_are_used_again(editor):
    """One picture with several instructions, several with one, and several seeds of one pair: as edited alone."""
    two, pictures = INSTRUCTIONS[:2], images(2)

    def alone(picture: int, text: int, seed: int, sampling: SamplingConfig = SAMPLING) -> np.ndarray:
        return editor.edit_fitted(pictures[picture][None], [INSTRUCTIONS[text]], [seed], sampling)[-1, 0]

    source, text = editor.encode_source(pictures[:1]), editor.encode_text(two)
    pairs = editor.prefill(source, text)
    first = editor.sample(pairs, [3, 4])
    np.testing.assert_array_equal(first, [alone(0, 0, 3), alone(0, 1, 4)])
    np.testing.assert_array_equal(editor.sample(pairs, [3, 4]), first)  # the pairs are as they were

    one_text = editor.prefill(editor.encode_source(pictures), editor.encode_text(two[1:]))
    np.testing.assert_array_equal(editor.sample(one_text, [3, 4]), [alone(0, 1, 3), alone(1, 1, 4)])

    pair = editor.prefill(source, editor.encode_text(two[:1]))
    other = SamplingConfig(guidance=(2.0, 4.0, 1.0), temperature=0.7)
    found = editor.sample(pair, [3, 8, 3], [SAMPLING, SAMPLING, other])
    np.testing.assert_array_equal(found, [alone(0, 0, 3), alone(0, 0, 8), alone(0, 0, 3, other)])


def test_values_that_do_not_go_together(editor):
    two = editor.encode_text(INSTRUCTIONS[:2])
    with pytest.raises(UserError, match="3 sources and 2 instructions: give one of either, or as many of both"):
        editor.prefill(editor.encode_source(images(3)), two)
    pairs = editor.prefill(editor.encode_source(images(1)), two, guided=False)
    with pytest.raises(UserError, match="prefill them with guided=True"):
        editor.sample(pairs, [0, 1])
    with pytest.raises(UserError, match="3 seeds for 2 pairs: give one of each, or seeds for a single pair"):
        editor.sample(pairs, [0, 1, 2], SamplingConfig(guidance=1.0))
    with pytest.raises(UserError, match="2 sampling configs for 1 images"):
        editor.edit_fitted(images(1), INSTRUCTIONS[:1], [0], [SAMPLING] * 2)


def test_threads_get_what_each_would_get_alone(editor):
    requests = [(images(1, seed=index), [INSTRUCTIONS[index % 4]], [index]) for index in range(8)]
    alone = [editor.edit_fitted(*request) for request in requests]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda request: editor.edit_fitted(*request), requests * 3))
    for index, result in enumerate(together):
        np.testing.assert_array_equal(result, alone[index % 8])


@pytest.mark.parametrize("count, wanted", [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16)])
def test_buckets_of_batches(count, wanted):
    assert pipeline.bucket(jax.sharding.get_mesh(), count) == wanted


@pytest.mark.parametrize(
    "longest, limit, wanted", [(1, 512, 16), (16, 512, 16), (17, 512, 32), (300, 512, 512), (9, 7, 7)]
)
def test_buckets_of_texts(longest, limit, wanted):
    assert pipeline.text_bucket(longest, limit) == wanted


def test_the_next_process_neither_traces_nor_compiles(editor, compiled, monkeypatch, tmp_path):
    """Its programs are on disk, and give the same."""
    monkeypatch.setenv("VAREDIT_CACHE", str(tmp_path))
    kept = jax.config.values["jax_compilation_cache_dir"]
    compilation_cache.move_to(str(tmp_path / "jax"))  # whose programs would not be written down again
    pipeline._programs.cache_clear()
    first = editor.edit_fitted(images(1), INSTRUCTIONS[:1], [0])
    assert compiled
    compilation_cache.move_to(kept)
    compiled.clear()
    pipeline._programs.cache_clear()
    monkeypatch.setattr(pipeline.Program, "_traced", lambda *_: pytest.fail("traced"))
    second = editor.edit_fitted(images(1), INSTRUCTIONS[:1], [0])
    assert compiled == []
    np.testing.assert_array_equal(second, first)
