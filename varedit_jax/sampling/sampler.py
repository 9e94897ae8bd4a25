"""The scale loop: `(params, request, keys) -> bits`, one static-shape pass per scale (model.md, section 8)."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from varedit_jax.config import EditorConfig, SamplingConfig, per_scale
from varedit_jax.parallel.rules import gather
from varedit_jax.sampling.guidance import choose_bits, guided_margin
from varedit_jax.scales import Pyramid
from varedit_jax.text.t5 import T5Encoder
from varedit_jax.tokenizer import quantizer
from varedit_jax.tokenizer.tokens import decode_bits, encode_images, source_tokens
from varedit_jax.transformer.model import Transformer
from varedit_jax.types import Params


@flax.struct.dataclass
class SampledBits:
    """Result of the scale loop; tuples hold one array per scale."""

    bits: tuple[jax.Array, ...]  # bool [B, h_k, w_k, Z], tokenizer cells
    logits: tuple[jax.Array, ...]  # float32 [B or 2 B, L_k, N, 2], the unconditional half last


def sample_bits(
    params: Params,
    source_BhwZ: jax.Array,
    features_BTE: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    config: EditorConfig,
    pyramid: Pyramid,
    sampling: SamplingConfig,
) -> SampledBits:
    """Draws the bits of every scale.

    Args:
      params: of the transformer.
      source_BhwZ: float32 raw source features at the last grid.
      features_BTE, length_B: text features and how many of their rows are real.
      keys_B: one PRNG key per image; unused when greedy.
      config, pyramid, sampling: static.

    The unconditional half of the batch runs only as long as some later scale has guidance other than 1.
    """
    model = Transformer(config.transformer, pyramid, functools.partial(gather, "transformer"))
    variables = {"params": params}
    guidance = per_scale(sampling.guidance, pyramid.scales)
    temperature = per_scale(sampling.temperature, pyramid.scales)
    cells = pyramid.cells(config.patchify)
    batch = source_BhwZ.shape[0]
    source_BSN = source_tokens(source_BhwZ, config, pyramid)

    doubled = any(value != 1 for value in guidance)
    unconditional_B = None
    if doubled:
        source_BSN, features_BTE, length_B = (jnp.concatenate([x, x]) for x in (source_BSN, features_BTE, length_B))
        unconditional_B = jnp.arange(2 * batch) >= batch
    text, caches = model.apply(variables, source_BSN, features_BTE, length_B, unconditional_B, method=model.prefill)
    accumulated_BhwZ = jnp.zeros(source_BhwZ.shape, jnp.float32)
    all_bits, all_logits = [], []
    for scale, grid in enumerate(pyramid.grids):
        if doubled and all(value == 1 for value in guidance[scale:]):
            doubled = False
            text = jax.tree.map(lambda x: x[:batch], text)
            caches = caches.first_samples(batch)
        inputs_BLN = None
        if scale > 0:
            inputs_BLN = quantizer.to_tokens(quantizer.next_input(accumulated_BhwZ, scale, cells), config.patchify)
            if doubled:
                inputs_BLN = jnp.concatenate([inputs_BLN, inputs_BLN])
        logits, caches = model.apply(variables, scale, inputs_BLN, text, caches, method=model.decode_scale)
        margin_BLN = guided_margin(
            logits[:batch], logits[batch:] if doubled else None, guidance[scale], temperature[scale]
        )
        scale_keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, scale)
        bits_BLN = choose_bits(margin_BLN, sampling, scale_keys_B)
        bits_BhwZ = quantizer.to_cells(bits_BLN, grid, config.patchify)
        accumulated_BhwZ = quantizer.accumulate(accumulated_BhwZ, bits_BhwZ, cells)
        all_bits.append(bits_BhwZ)
        all_logits.append(logits)
    return SampledBits(tuple(all_bits), tuple(all_logits))


def edit(
    params: Params,
    images_uint8: jax.Array,
    ids_BT: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    *,
    config: EditorConfig,
    pyramid: Pyramid,
    sampling: SamplingConfig,
    every_scale: bool = False,
) -> jax.Array:
    """Edited images, uint8 [1, B, y, x, 3]; with `every_scale` also the image after each scale, [K, B, y, x, 3].

    Args:
      params: {"tokenizer", "text", "transformer"}.
      images_uint8: [B, y, x, 3] of the pyramid's size.
      ids_BT, length_B: instructions as token ids, padded, and their lengths.
      keys_B: one PRNG key per image.
      config, pyramid, sampling, every_scale: static.
    """
    source_BhwZ = encode_images(params["tokenizer"], images_uint8, config)
    encoder = T5Encoder(config.text, gather=functools.partial(gather, "text"))
    features_BTE = encoder.apply({"params": params["text"]}, ids_BT, length_B)
    sample = sample_bits(params["transformer"], source_BhwZ, features_BTE, length_B, keys_B, config, pyramid, sampling)
    shown = range(1, pyramid.scales + 1) if every_scale else [pyramid.scales]
    return jnp.stack([decode_bits(params["tokenizer"], sample.bits[:stop], config, pyramid) for stop in shown])
