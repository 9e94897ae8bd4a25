"""Images to the transformer's condition, teacher-forced inputs and labels (model.md, sections 1, 3 and 5)."""

import flax.struct
import jax
import jax.numpy as jnp

from varedit_jax.config import EditorConfig
from varedit_jax.resize import area_resize
from varedit_jax.scales import Pyramid
from varedit_jax.tokenizer import quantizer
from varedit_jax.tokenizer.autoencoder import Autoencoder
from varedit_jax.tokenizer.pixels import to_model_range, to_uint8
from varedit_jax.types import Params


@flax.struct.dataclass
class Tokens:
    """The transformer's arguments and labels of one batch."""

    source_BSN: jax.Array  # float32 condition
    inputs_BLN: jax.Array  # float32 teacher-forced inputs of scales 1..K-1
    residuals_BLN: jax.Array  # float32 residuals of all scales, whose signs are the bits

    @property
    def labels_BLN(self) -> jax.Array:
        """The bits of all scales, bool [B, L, N]."""
        return self.residuals_BLN > 0


def source_tokens(features_BhwZ: jax.Array, config: EditorConfig, pyramid: Pyramid) -> jax.Array:
    """Raw source features at the last grid -> condition, float32 [B, S, N].

    The feature is neither quantized nor flipped, unless `quantized_source` asks for the paper's quantized one. For
    "full" conditioning the coarser source scales are its area-resized copies.
    """
    cells = pyramid.cells(config.patchify)
    if config.quantized_source:
        features_BhwZ = quantizer.quantize(features_BhwZ, cells).quantized
    grids = cells.source_grids(config.transformer.conditioning)
    scales = [quantizer.to_tokens(area_resize(features_BhwZ, grid), config.patchify) for grid in grids]
    return jnp.concatenate(scales, axis=1)


def make_tokens(
    source_BhwZ: jax.Array,
    target_BhwZ: jax.Array,
    config: EditorConfig,
    pyramid: Pyramid,
    flips: tuple[jax.Array, ...] = (),
) -> Tokens:
    """Raw features of source and target, float32 [B, h, w, Z] -> the transformer's condition, inputs and residuals."""
    cells = pyramid.cells(config.patchify)
    residuals = quantizer.quantize(target_BhwZ, cells, flips)
    inputs = [quantizer.to_tokens(x, config.patchify) for x in residuals.inputs]
    quantized = [quantizer.to_tokens(x, config.patchify) for x in residuals.residuals]
    source_BSN = source_tokens(source_BhwZ, config, pyramid)
    inputs_BLN = jnp.concatenate(inputs, axis=1) if inputs else jnp.zeros((len(source_BSN), 0, source_BSN.shape[-1]))
    return Tokens(source_BSN, inputs_BLN, jnp.concatenate(quantized, axis=1))


def encode_images(params: Params, images_uint8: jax.Array, config: EditorConfig) -> jax.Array:
    """Images uint8 [B, y, x, 3] -> raw features float32 [B, h, w, Z] of the frozen tokenizer."""
    model = Autoencoder(config.tokenizer)
    return model.apply({"params": params}, to_model_range(images_uint8), method=model.encode)


def decode_bits(params: Params, bits: tuple[jax.Array, ...], config: EditorConfig, pyramid: Pyramid) -> jax.Array:
    """Bits of the first scales (all of them for the final image) -> images uint8 [B, y, x, 3].

    params: of the tokenizer.
    """
    return decode_features(params, quantizer.dequantize(bits, pyramid.cells(config.patchify)), config)


def decode_features(params: Params, quantized_BhwZ: jax.Array, config: EditorConfig) -> jax.Array:
    """Quantized features, float32 [B, h, w, Z] -> images uint8 [B, y, x, 3]. params: of the tokenizer."""
    model = Autoencoder(config.tokenizer)
    return to_uint8(model.apply({"params": params}, quantized_BhwZ, method=model.decode))
