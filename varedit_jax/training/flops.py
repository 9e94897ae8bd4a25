"""Operations of a training example by formula, and of any program by counting, for MFU.

The convention, which is printed beside every MFU:

  - a multiply-add is two operations; only matmuls and convolutions count
  - attention counts visible pairs of a query and a key only, and all T padded text tokens
  - the backward pass is twice the forward pass of what is trained
  - rematerialization adds no model FLOP
  - not counted: area and linear resizing, RoPE's matmul with its constant matrix, the table of positions, the loss and
    the optimizer; together under 1 % of a step of the published models

`MFU` is 3 x forward of the transformer (and of the text encoder where it is trained too) over peak; `MFU with encoders`
adds one forward pass of the frozen text encoder and of the frozen tokenizer's encoder on source and target.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.interpreters.partial_eval as pe
from jax.extend.core import ClosedJaxpr, Jaxpr

from varedit_jax.config import EditorConfig, RunConfig, TextConfig, TokenizerConfig
from varedit_jax.scales import Grid, Pyramid, image_size
from varedit_jax.transformer.visibility import Visibility

CONVENTION = (
    "multiply-add = 2; attention counts visible pairs; training = 3 x forward; no recomputation; "
    "MFU: the transformer alone, MFU with encoders: and the frozen encoders, forward"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one example's forward pass, by part."""

    tokens: int  # source and target tokens
    linear: int  # matmuls of the blocks with weights, source and target tokens
    self_attention: int  # matmuls of queries, keys and values over visible pairs
    cross_attention: int  # to the text, with its keys and values
    rest: int  # embedding of tokens, head, pooling and projection of the text, modulation
    text: int  # text encoder
    tokenizer: int  # tokenizer's encoder on both images; 0 with precomputed features
    trains_text: bool = False

    @property
    def transformer(self) -> int:
        """Forward pass of the transformer."""
        return self.linear + self.self_attention + self.cross_attention + self.rest

    @property
    def training(self) -> int:
        """Operations of a training example that MFU counts: 3 x the forward pass of what is trained."""
        return 3 * (self.transformer + (self.text if self.trains_text else 0))

    @property
    def training_with_encoders(self) -> int:
        """`training` and the forward passes of the frozen encoders."""
        return self.training + self.tokenizer + (0 if self.trains_text else self.text)


def example_flops(
    config: EditorConfig,
    pyramid: Pyramid,
    text_tokens: int,
    *,
    train_text: bool = False,
    encode: bool = True,
    whole: Pyramid | None = None,
) -> Flops:
    """Returns the operations of one example, by formula.

    Args:
      config: the editor.
      pyramid: of the example: the whole one, or the first scales of a stage.
      text_tokens: T, padding included.
      train_text: True if the text encoder is trained too.
      encode: True if the tokenizer's encoder runs in the step, that is, without precomputed features.
      whole: the pyramid that the images are encoded for, where `pyramid` is its first scales.
    """
    model = config.transformer
    width, depth, bits, text_width = model.width, model.depth, model.token_bits, model.text_width
    source, target = pyramid.source_tokens(model.conditioning), pyramid.target_tokens
    tokens = source + target
    # qkv 3, proj 1, the text's q 1 and proj 1, feed-forward 4 + 4: C x C matrices each.
    linear = depth * tokens * 2 * 14 * width**2
    aligned = int(model.conditioning == "sar")
    pairs = aligned * visible_pairs(Visibility(pyramid, model.conditioning, scale_aligned=True))
    pairs += (depth - aligned) * visible_pairs(Visibility(pyramid, model.conditioning, scale_aligned=False))
    cross_attention = depth * (4 * width * tokens * text_tokens + 2 * 2 * width**2 * text_tokens)
    pooling = text_tokens * 2 * text_width * 2 * width + 4 * width * text_tokens + 2 * width**2
    projection = text_tokens * 2 * (text_width * width + width**2)
    modulation = 2 * width * (6 + 2) * width
    embedding = (tokens - 1) * 2 * bits * width  # the first token is the pooled text
    head = target * 2 * width * 2 * bits
    size = image_size(config, whole or pyramid)
    return Flops(
        tokens=tokens,
        linear=linear,
        self_attention=4 * width * pairs,
        cross_attention=cross_attention,
        rest=pooling + projection + modulation + embedding + head,
        text=text_flops(config.text, text_tokens),
        tokenizer=2 * encoder_flops(config.tokenizer, size) if encode else 0,
        trains_text=train_text,
    )


def run_flops(
    config: RunConfig, pyramid: Pyramid, whole: Pyramid | None = None, text_tokens: int | None = None
) -> Flops:
    """Returns the operations of one example of a run on `pyramid`, which may be a stage's first scales of `whole`.

    `text_tokens` is T of its batch, `data.text_tokens` by default.
    """
    return example_flops(
        config.model,
        pyramid,
        text_tokens or config.data.text_tokens,
        train_text=config.train_text,
        encode=config.data.features == "online",
        whole=whole,
    )


def visible_pairs(visibility: Visibility) -> int:
    """Returns the visible pairs of a query and a key in one block's self-attention, over source and targets."""
    pyramid = visibility.pyramid
    pairs = source_pairs(visibility)
    return pairs + sum(length * scale_keys(visibility, scale) for scale, length in enumerate(pyramid.lengths))


def source_pairs(visibility: Visibility) -> int:
    """Returns the visible pairs of the source tokens."""
    return sum(
        (queries.stop - queries.start) * (keys.stop - keys.start) for queries, keys in visibility.source_groups()
    )


def scale_keys(visibility: Visibility, scale: int) -> int:
    """Returns the keys that a token of `scale` sees, its own scale's included."""
    targets = visibility.pyramid.offsets[scale + 1]
    if visibility.scale_aligned:
        return visibility.pyramid.lengths[scale] + targets
    return (targets if visibility.conditioning == "full" else visibility.source_tokens) + targets


def text_flops(config: TextConfig, tokens: int) -> int:
    """Returns the operations of the text encoder's forward pass over `tokens` tokens, padding included."""
    inner = config.heads * config.head_size
    token = 2 * 4 * config.width * inner + 2 * 3 * config.width * config.mlp_width + 4 * inner * tokens
    return config.layers * tokens * token


def encoder_flops(config: TokenizerConfig, size: Grid) -> int:
    """Returns the operations of the tokenizer's encoder on one image of `size` (height, width), padding included."""
    area = math.prod(size)
    total = _conv(3, config.base_channels, area)
    before = config.base_channels
    for level, channels in enumerate(config.channels):
        total += _residual_blocks(before, channels, config.encoder_blocks, area)
        before = channels
        if level < len(config.channels) - 1:
            area //= 4
            total += _conv(before, before, area)
    return total + _residual_blocks(before, before, 2, area) + _conv(before, config.bits, area)


def decoder_flops(config: TokenizerConfig, size: Grid) -> int:
    """Returns the operations of the tokenizer's decoder for one image of `size` (height, width), padding included."""
    area = math.prod(size) // config.stride**2
    before = config.channels[-1]
    total = _conv(config.bits, before, area) + _residual_blocks(before, before, 2, area)
    for level, channels in reversed(list(enumerate(config.channels))):
        total += _residual_blocks(before, channels, config.decoder_blocks, area)
        before = channels
        if level > 0:
            area *= 4
            total += _conv(before, before, area)
    return total + _conv(before, 3, area)


def _conv(inputs: int, outputs: int, area: int, kernel: int = 3) -> int:
    return 2 * kernel**2 * inputs * outputs * area


def _residual_blocks(inputs: int, outputs: int, count: int, area: int) -> int:
    shortcut = _conv(inputs, outputs, area, 1) if inputs != outputs else 0
    return shortcut + _conv(inputs, outputs, area) + (2 * count - 1) * _conv(outputs, outputs, area)


def count_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Returns the operations of the matmuls and convolutions of a program from `jax.make_jaxpr`.

    A scanned body counts once per iteration, rematerialized operations count again, and dead code does not count, nor
    do the zeros that the gradient of a strided convolution puts between its inputs. In `shard_map` the operations of
    all shards count.

    Raises:
      ValueError: for a loop of unknown length that has matmuls, and for opaque kernels (pallas, cuDNN): count a program
        with plain attention.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    live, _ = pe.dce_jaxpr(inner, [True] * len(inner.outvars))
    return sum(_count(equation) for equation in live.eqns)


def _count(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return _count_convolution(equation)
    if name in ("pallas_call", "cudnn_fmha") or "dot_product_attention" in name:
        raise ValueError(f"operations inside of {name} cannot be counted; count with plain attention")
    bodies: list[int] = [count_jaxpr(body) for body in _bodies(params)]
    if name == "scan":
        return params["length"] * sum(bodies)
    if name == "while" and sum(bodies):
        raise ValueError("a loop of unknown length has matmuls in it, which cannot be counted")
    if name == "cond":
        return max(bodies)
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(bodies)
    return sum(bodies)


def _count_convolution(equation: Any) -> int:
    params = equation.params
    numbers = params["dimension_numbers"]
    kernel = equation.invars[1].aval.shape
    output = math.prod(equation.outvars[0].aval.shape)
    taps = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])  # input channels of a group, and the window
    return 2 * output * taps // math.prod(params["lhs_dilation"])


def _bodies(params: Mapping[str, Any]) -> Iterator[Jaxpr | ClosedJaxpr]:
    """Yields the programs among an equation's parameters."""
    for value in params.values():
        for entry in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(entry, (Jaxpr, ClosedJaxpr)):
                yield entry
