"""Parameters of every preset, abstract: their number against a count by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from varedit_jax.config import PRESETS, EditorConfig, TextConfig, TokenizerConfig, TransformerConfig, preset
from varedit_jax.parameters import INIT, abstract_params, bytes_by_type, count, stored_params
from varedit_jax.scales import Pyramid, published_pyramid


def transformer_count(config: TransformerConfig) -> int:
    """The trainable tensors of the published transformer, one a term (its buffers `zero_k_bias` are not trained)."""
    C, E, N, H = config.width, config.text_width, config.token_bits, config.heads
    block = (
        6 * C  # ada_gss
        + (H + C + C + 3 * C * C + C * C + C)  # sa: scale_mul_1H11, q_bias, v_bias, mat_qkv, proj
        + 2 * C  # ca_norm
        + (C * C + C + 2 * C * C + C + C * C + C)  # ca: mat_q, mat_kv, v_bias, proj
        + (4 * C * C + 4 * C + 4 * C * C + C)  # ffn: fc1, fc2
    )
    around = (
        config.unconditional_rows * E  # cfg_uncond
        + C  # pos_start
        + E  # text_norm
        + (C + C + 2 * C * E + C * C + C)  # text_proj_for_sos.ca: mat_q, v_bias, mat_kv, proj
        + (C * E + C + C * C + C)  # text_proj_for_ca
        + config.levels * C  # lvl_embed
        + (C * N + C)  # word_embed
        + (6 * C * C + 6 * C)  # shared_ada_lin
        + (2 * C * C + 2 * C)  # head_nm.ada_lin
        + (2 * N * C + 2 * N)  # head
    )
    return config.depth * block + around


def tokenizer_count(config: TokenizerConfig) -> int:
    def conv(channels_in: int, channels_out: int, side: int = 3) -> int:
        return side * side * channels_in * channels_out + channels_out

    def residual(channels_in: int, channels_out: int) -> int:
        shortcut = conv(channels_in, channels_out, 1) if channels_in != channels_out else 0
        return (
            2 * (channels_in + channels_out)
            + conv(channels_in, channels_out)
            + conv(channels_out, channels_out)
            + shortcut
        )

    widths = [multiplier * config.base_channels for multiplier in config.channel_multipliers]
    first, last = widths[0], widths[-1]
    total = conv(3, config.base_channels) + conv(last, config.bits) + 2 * last  # encoder: in, out, norm
    total += conv(config.bits, last) + conv(first, 3) + 2 * first  # decoder likewise
    total += 4 * residual(last, last)  # the middles
    channels = config.base_channels
    for width in widths:
        total += residual(channels, width) + (config.encoder_blocks - 1) * residual(width, width)
        channels = width
    total += sum(conv(width, width) for width in widths[:-1])  # to the next coarser level
    for width in reversed(widths):
        total += residual(channels, width) + (config.decoder_blocks - 1) * residual(width, width)
        channels = width
    return total + sum(conv(width, width) for width in widths[1:])  # to the next finer level


def text_count(config: TextConfig) -> int:
    inner = config.heads * config.head_size
    layer = 4 * config.width * inner + 3 * config.width * config.mlp_width + 2 * config.width
    return (
        config.vocabulary_size * config.width
        + config.relative_buckets * config.heads
        + config.layers * layer
        + config.width
    )


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_transformer_parameters(name):
    editor = preset(name)
    found = abstract_params(editor, "transformer", Pyramid(((1, 1), (2, 2)), ((1, 1), (2, 2))))
    assert count(found) == transformer_count(editor.transformer)


@pytest.mark.parametrize("name", ["tiny", "2b", "8b"])  # the others' are one of these
def test_number_of_tokenizer_and_text_parameters(name):
    editor = preset(name)
    assert count(abstract_params(editor, "tokenizer")) == tokenizer_count(editor.tokenizer)
    assert count(abstract_params(editor, "text")) == text_count(editor.text)


def test_published_numbers():
    """Sums over the published files."""
    assert count(abstract_params(preset("8b"), "transformer")) == 8_375_791_824
    assert transformer_count(preset("8b").transformer) == 8_375_791_824
    assert transformer_count(preset("2b").transformer) == 2_204_564_032
    assert tokenizer_count(preset("8b").tokenizer) == 81_624_209
    assert tokenizer_count(preset("2b").tokenizer) == 110_118_051
    assert text_count(preset("2b").text) == 1_223_527_424


def test_parameters_are_float32_whatever_the_compute_type_and_pyramid():
    tiny = preset("tiny")
    wanted = abstract_params(tiny, "transformer")
    assert all(x.dtype == jnp.float32 for part in INIT for x in jax.tree.leaves(abstract_params(tiny, part)))
    values = tiny.transformer.__dict__ | {"dtype": "bfloat16", "remat": "full", "conditioning": "full"}
    other = EditorConfig(
        tokenizer=tiny.tokenizer, text=tiny.text, transformer=TransformerConfig(**values), pixel_budget="0.06M"
    )
    assert abstract_params(other, "transformer") == wanted
    assert abstract_params(other, "transformer", published_pyramid("0.06M", "2.0")) == wanted


def in_bfloat16(name: str) -> EditorConfig:
    editor = preset(name)
    return dataclasses.replace(editor, transformer=dataclasses.replace(editor.transformer, dtype="bfloat16"))


@pytest.mark.parametrize("name", ["tiny", "2b", "8b"])
def test_what_blocks_and_text_encoder_compute_in_bfloat16_is_kept_so(name):
    """Matrices of the blocks, the text encoder; biases, norms and all around the blocks are float32."""
    editor = in_bfloat16(name)
    config, text = editor.transformer, text_count(editor.text)
    matrices = config.depth * 16 * config.width**2  # qkv 3, q 1, kv 2, two outputs 2, feed-forward 8
    sizes = bytes_by_type(stored_params(editor, "transformer"))
    others = transformer_count(config) - matrices
    assert sizes == {"bfloat16": 2 * matrices, "float32": 4 * others}
    assert bytes_by_type(stored_params(editor, "text", "bfloat16")) == {"bfloat16": 2 * text}
    assert bytes_by_type(stored_params(editor, "text")) == {"float32": 4 * text}
    assert stored_params(editor, "tokenizer") == abstract_params(editor, "tokenizer")
    assert stored_params(preset(name), "transformer") == abstract_params(preset(name), "transformer")


def test_the_8b_editor_takes_half_the_memory_in_bfloat16():
    sizes = {
        dtype: sum(sum(bytes_by_type(stored_params(config, part, dtype)).values()) for part in INIT)
        for dtype, config in (("bfloat16", in_bfloat16("8b")), ("float32", preset("8b")))
    }
    assert sizes["bfloat16"] <= 20.5e9 and sizes["float32"] == pytest.approx(38.7e9, rel=1e-3)
