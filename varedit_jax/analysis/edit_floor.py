"""What an edit takes at least, by formula: the operations of each stage, and the bytes that it moves.

A multiply-add is two operations, matmuls and convolutions count, attention counts visible pairs and all T padded text
tokens (training/flops.py). Bytes: each weight that a stage uses is read once, keys and values that its queries see are
read once, new ones written once, images and features read and written; activations are as if they stayed on the chip.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from varedit_jax import hardware
from varedit_jax.sampling.pipeline import Stage
from varedit_jax.scales import image_size
from varedit_jax.training.flops import decoder_flops, encoder_flops, scale_keys, source_pairs, text_flops
from varedit_jax.transformer.visibility import Visibility
from varedit_jax.types import Params

# Parts of the transformer's tree that a stage has no use for, by path.
_NOT_IN_PREFILL = ("head", "pos_start")
_NOT_IN_SCALES = (
    "text_",
    "cross_attention/kv_kernel",
    "cross_attention/v_bias",
)  # of the text, whose keys and values are cached


class Floor(NamedTuple):
    """Of one stage, all devices together."""

    operations: int
    bytes: int
    weight_bytes: int  # of the bytes, those of weights

    def __add__(self, other: "Floor") -> "Floor":  # type: ignore[override]
        return Floor(*(one + more for one, more in zip(self, other, strict=True)))

    def seconds(self, chip: hardware.Chip, devices: int = 1) -> float:
        """The longer of both at the chip's peaks; arithmetic at that of bfloat16."""
        share = chip.devices / devices
        return max(self.operations / (chip.tflops * 1e12), self.bytes / chip.hbm_bandwidth) * share


NOTHING = Floor(0, 0, 0)


def floor(stage: Stage, params: Params) -> Floor:
    """Returns the floor of a stage. `params`: of all parts, abstract or not."""
    batch = stage.batch
    if stage.name == "text":
        return _text(stage, params["text"])
    if stage.name == "begin":
        return NOTHING
    assert stage.pyramid is not None
    rows, columns = stage.pyramid.cells(stage.config.patchify).last
    features = 4 * batch * rows * columns * stage.config.tokenizer.bits
    pixels = 3 * batch * math.prod(image_size(stage.config, stage.pyramid))
    if stage.name in ("source", "decode"):
        count = encoder_flops if stage.name == "source" else decoder_flops
        part = "encoder" if stage.name == "source" else "decoder"
        shown = stage.pyramid.scales if stage.every_scale else 1
        weights = _bytes(params["tokenizer"][part])
        each = count(stage.config.tokenizer, image_size(stage.config, stage.pyramid))
        return Floor(shown * batch * each, weights + features + shown * pixels, weights)
    return _transformer(stage, params["transformer"], features)


def _text(stage: Stage, params: Params) -> Floor:
    config, tokens = stage.config.text, stage.text_tokens
    table = params["embedding"]["embedding"]
    weights = _bytes(params) - table.size * table.dtype.itemsize
    rows = stage.batch * tokens * config.width
    return Floor(stage.batch * text_flops(config, tokens), weights + rows * (table.dtype.itemsize + 4), weights)


def _transformer(stage: Stage, params: Params, features: int) -> Floor:
    """Of `prefill` or a scale, for the conditional and the unconditional half."""
    assert stage.pyramid is not None
    config, pyramid, text_tokens = stage.config.transformer, stage.pyramid, stage.text_tokens
    width, depth = config.width, config.depth
    samples = stage.batch * (2 if stage.guided else 1)
    source, filling = pyramid.source_tokens(config.conditioning), stage.name == "prefill"
    queries = source if filling else pyramid.lengths[stage.scale]
    aligned = int(config.conditioning == "sar")
    pairs = [_pairs(stage, scale_aligned=True)] * aligned + [_pairs(stage, scale_aligned=False)] * (depth - aligned)
    # qkv 3, proj 1, the text's q 1 and proj 1, feed-forward 4 + 4: C x C matrices each.
    operations = (
        depth * queries * 2 * 14 * width**2 + 4 * width * sum(pairs) + depth * 4 * width * queries * text_tokens
    )
    operations += 2 * width * (6 if filling else 8) * width  # modulation
    if filling or stage.scale > 0:  # scale 0 begins with the text
        operations += queries * 2 * config.token_bits * width
    if filling:
        operations += depth * 4 * width**2 * text_tokens
        operations += text_tokens * (4 * config.text_width * width + 4 * width) + 2 * width**2
        operations += text_tokens * 2 * (config.text_width * width + width**2)
    else:
        operations += queries * 4 * width * config.token_bits
    last = not filling and stage.scale == pyramid.scales - 1
    seen = 0 if filling else sum(count // queries - queries for count in pairs)
    written = 0 if last else depth * queries
    text_rows = depth * text_tokens
    cached = 2 * width * np.dtype(config.dtype).itemsize * samples * (seen + written + text_rows)
    unused = _NOT_IN_PREFILL if filling else _NOT_IN_SCALES
    weights = sum(
        leaf.size * leaf.dtype.itemsize
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not any(part in jax.tree_util.keystr(path, simple=True, separator="/") for part in unused)
    )
    return Floor(samples * operations, weights + cached + features, weights)


def _pairs(stage: Stage, scale_aligned: bool) -> int:
    """Visible pairs of a query and a key of one sample in one block."""
    assert stage.pyramid is not None
    pyramid, conditioning = stage.pyramid, stage.config.transformer.conditioning
    visibility = Visibility(pyramid, conditioning, scale_aligned=scale_aligned)
    if stage.name == "prefill":
        return source_pairs(visibility)
    return pyramid.lengths[stage.scale] * scale_keys(visibility, stage.scale)


def _bytes(params: Params) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
