"""From features to bits in stages, each a pure function of explicit trees (model.md, section 8).

`prefill` runs the source through the transformer once; `sample_scale` draws the bits of one scale, coarse to fine.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from varedit_jax.config import EditingConfig, EditorConfig
from varedit_jax.parallel.constrain import as_bits, batch_only, constrain
from varedit_jax.parallel.rules import gather
from varedit_jax.sampling.guidance import Controls, choose_bits, guided_margin
from varedit_jax.scales import Pyramid
from varedit_jax.text.t5 import T5Encoder
from varedit_jax.tokenizer import quantizer
from varedit_jax.tokenizer.tokens import decode_features, encode_images, source_tokens
from varedit_jax.transformer.model import Caches, TextMemory, Transformer
from varedit_jax.types import Params


@flax.struct.dataclass
class Prefilled:
    """A source and a text as the scale loop begins with them; with guidance the unconditional half comes last."""

    text: TextMemory
    caches: Caches

    def first_samples(self, count: int) -> "Prefilled":
        """That of the first `count` samples of the batch."""
        return Prefilled(jax.tree.map(lambda x: x[:count], self.text), self.caches.first_samples(count))


@flax.struct.dataclass
class Drawn:
    """The state between two scales."""

    prefilled: Prefilled  # with the keys and values of the scales that are drawn
    accumulated_BhwZ: jax.Array  # float32, what their bits add up to, at the last grid


@flax.struct.dataclass
class SampledBits:
    """Result of the scale loop; tuples hold one array per scale."""

    bits: tuple[jax.Array, ...]  # bool [B, h_k, w_k, Z], tokenizer cells
    logits: tuple[jax.Array, ...]  # float32 [B or 2 B, L_k, N, 2], the unconditional half last


def encode_source(params: Params, images_uint8: jax.Array, config: EditorConfig, editing: EditingConfig) -> jax.Array:
    """Features of images uint8 [B, y, x, 3], float32 [B, h, w, Z]. `params`: of the tokenizer."""
    with jax.default_matmul_precision(editing.tokenizer_precision):
        return encode_images(params, images_uint8, config)


def encode_text(
    params: Params,
    ids_BT: jax.Array,
    length_B: jax.Array,
    config: EditorConfig,
    editing: EditingConfig,
) -> jax.Array:
    """Features of instructions, float32 [B, T, E]. `params`: of the text encoder."""
    encoder = T5Encoder(config.text, jnp.dtype(editing.text_dtype), functools.partial(gather, "text"))
    stacks = {"layers": as_bits(params["layers"])}
    return encoder.apply({"params": {**params, **stacks}}, ids_BT, length_B)


def prefill(
    params: Params,
    source_BhwZ: jax.Array,
    features_BTE: jax.Array,
    length_B: jax.Array,
    config: EditorConfig,
    pyramid: Pyramid,
    guided: bool,
) -> Prefilled:
    """Runs sources and texts through the transformer once.

    Args:
      params: of the transformer.
      source_BhwZ: float32 raw source features at the last grid.
      features_BTE, length_B: text features and how many of their rows are real.
      config, pyramid: static.
      guided: static; if some scale is to be guided, the batch is doubled by an unconditional half.
    """
    source_BSN, unconditional_B = source_tokens(source_BhwZ, config, pyramid), None
    if guided:
        batch = len(source_BSN)
        source_BSN, features_BTE, length_B = (jnp.concatenate([x, x]) for x in (source_BSN, features_BTE, length_B))
        unconditional_B = jnp.arange(2 * batch) >= batch
    model = _model(config, pyramid)
    arguments = source_BSN, features_BTE, length_B, unconditional_B
    return Prefilled(*model.apply(_variables(params), *arguments, method=model.prefill))


def begin(prefilled: Prefilled, batch: int, config: EditorConfig, pyramid: Pyramid) -> Drawn:
    """The state before the first scale of `batch` images."""
    rows, columns = pyramid.cells(config.patchify).last
    return Drawn(prefilled, jnp.zeros((batch, rows, columns, config.tokenizer.bits), jnp.float32))


def sample_scale(
    params: Params,
    drawn: Drawn,
    controls: Controls,
    keys_B: jax.Array,
    scale: int,
    config: EditorConfig,
    pyramid: Pyramid,
    guided: bool,
) -> tuple[Drawn, jax.Array, jax.Array]:
    """Draws the bits of one scale.

    Args:
      params: of the transformer.
      drawn: the state behind the scales before it.
      controls: guidance, temperature and the like.
      keys_B: one PRNG key per image; unused where greedy.
      scale, config, pyramid: static.
      guided: static; if not, an unconditional half is dropped first.

    Returns:
      (the state behind it, bits bool [B, h_k, w_k, Z], logits float32 [B or 2 B, L_k, N, 2]).
    """
    cells, batch = pyramid.cells(config.patchify), len(drawn.accumulated_BhwZ)
    prefilled = drawn.prefilled
    if not guided and len(prefilled.text.cond_BC) > batch:
        prefilled = prefilled.first_samples(batch)
    inputs_BLN = None
    if scale > 0:
        inputs_BLN = quantizer.to_tokens(quantizer.next_input(drawn.accumulated_BhwZ, scale, cells), config.patchify)
        if guided:
            inputs_BLN = jnp.concatenate([inputs_BLN, inputs_BLN])
    model = _model(config, pyramid)
    logits, caches = model.apply(
        _variables(params), scale, inputs_BLN, prefilled.text, prefilled.caches, method=model.decode_scale
    )
    margin_BLN = guided_margin(logits[:batch], logits[batch:] if guided else None, controls, scale)
    scale_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, scale)
    bits_BLN = choose_bits(margin_BLN, controls, scale_keys_B)
    bits_BhwZ = quantizer.to_cells(bits_BLN, pyramid.grids[scale], config.patchify)
    accumulated_BhwZ = quantizer.accumulate(drawn.accumulated_BhwZ, bits_BhwZ, cells)
    return Drawn(Prefilled(prefilled.text, caches), accumulated_BhwZ), bits_BhwZ, logits


def _variables(params: Params) -> Params:
    stacks = {name: as_bits(params[name]) for name in ("block_0", "blocks") if name in params}
    return {"params": {**params, **stacks}}


def _model(config: EditorConfig, pyramid: Pyramid) -> Transformer:
    return Transformer(config.transformer, pyramid, functools.partial(gather, "transformer"))


def sample_bits(
    params: Params,
    source_BhwZ: jax.Array,
    features_BTE: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    controls: Controls,
    config: EditorConfig,
    pyramid: Pyramid,
    guided_scales: int,
) -> SampledBits:
    """Draws the bits of every scale: `prefill`, then `sample_scale` for each; arguments as theirs.

    guided_scales: static; how many of the first scales run the unconditional half.
    """
    prefilled = prefill(params, source_BhwZ, features_BTE, length_B, config, pyramid, guided_scales > 0)
    drawn = begin(prefilled, len(source_BhwZ), config, pyramid)
    all_bits, all_logits = [], []
    for scale in range(pyramid.scales):
        drawn, bits_BhwZ, logits = sample_scale(
            params, drawn, controls, keys_B, scale, config, pyramid, guided=scale < guided_scales
        )
        all_bits.append(bits_BhwZ)
        all_logits.append(logits)
    return SampledBits(tuple(all_bits), tuple(all_logits))


def decode(
    params: Params,
    bits: tuple[jax.Array, ...],
    config: EditorConfig,
    pyramid: Pyramid,
    editing: EditingConfig,
    every_scale: bool,
) -> jax.Array:
    """Images of the bits of all scales, uint8 [1, B, y, x, 3]; with `every_scale` those after each, [K, B, y, x, 3].

    params: of the tokenizer.
    """
    cells = pyramid.cells(config.patchify)
    # Otherwise the compiler (libtpu 0.0.42) splits convolutions by channels, and gathers the activations of all images.
    params = jax.tree.map(constrain, params)

    def image(quantized_BhwZ: jax.Array) -> jax.Array:
        with jax.default_matmul_precision(editing.tokenizer_precision):
            return batch_only(decode_features(params, batch_only(quantized_BhwZ), config))

    if not every_scale:
        return image(quantizer.dequantize(bits, cells))[None]
    # One after the other, in the memory of one.
    shown = [quantizer.dequantize(bits[:stop], cells) for stop in range(1, pyramid.scales + 1)]
    return jax.lax.map(image, jnp.stack(shown))
