"""Compares this implementation with a directory of golden data, tensor by tensor.

The directory holds `config.json`, the state dicts `transformer.pth` and `vae.pth` (or .safetensors) under their
published names, and `golden.safetensors` with the results of the published code in float32.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varedit_jax.config import EditorConfig, LossConfig, SamplingConfig, TextConfig, TokenizerConfig, TransformerConfig
from varedit_jax.errors import UserError
from varedit_jax.parallel.compiler_options import jit_everywhere
from varedit_jax.parameters import abstract_params
from varedit_jax.sampling.guidance import controls, guided_scales
from varedit_jax.sampling.sampler import sample_bits
from varedit_jax.scales import Pyramid, nearest_aspect, published_pyramid
from varedit_jax.storage.files import read_json
from varedit_jax.storage.paths import resolve
from varedit_jax.tokenizer import tokens as tokens_lib
from varedit_jax.tokenizer.autoencoder import Autoencoder
from varedit_jax.tokenizer.pixels import to_model_range
from varedit_jax.tokenizer.quantizer import quantize
from varedit_jax.training.loss import bitwise_loss
from varedit_jax.transformer.model import Transformer
from varedit_jax.weights import names
from varedit_jax.weights.reader import StateDict, read_state_dict

# Largest absolute error allowed in float32, by the beginning of a tensor's name.
TOLERANCES = {
    "src_features": 5e-5,
    "tgt_features": 5e-5,
    "src_tokens": 5e-5,
    "tgt_tokens": 5e-5,
    "quantized": 5e-5,
    "tgt_bits": 0.0,
    "reconstruction_f16": 1e-3,  # stored in half precision
    "train_logits": 5e-5,
    "loss_plain": 1e-5,
    "loss_reweighted": 1e-5,
    "infer_logits": 5e-5,
    "infer_bits": 0.0,
    "infer_image_bgr_uint8": 1.0,  # one level of 255
}
_INPUTS = ("src_image_uint8", "tgt_image_uint8", "text_features", "text_lengths")


@dataclasses.dataclass(frozen=True)
class ParityRow:
    """Error of one tensor."""

    name: str
    error: float  # largest absolute difference
    tolerance: float

    @property
    def passed(self) -> bool:
        """Inside tolerance; NaN is not."""
        return self.error <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Golden:
    """A golden directory, read."""

    config: EditorConfig
    pyramid: Pyramid
    sampling: SamplingConfig
    tensors: StateDict
    tokenizer: Any  # parameters
    transformer: Any


def _editor_config(values: dict[str, Any]) -> EditorConfig:
    patchify = bool(values["patchify"])
    return EditorConfig(
        tokenizer=TokenizerConfig(
            bits=values["d"], channel_multipliers=tuple(values["ch_mult"]), base_channels=values["base_ch"]
        ),
        text=TextConfig(width=values["Ct5"]),
        transformer=TransformerConfig(
            depth=values["depth"],
            width=values["dim"],
            heads=values["heads"],
            token_bits=values["d"] * (4 if patchify else 1),
            text_width=values["Ct5"],
        ),
        patchify=patchify,
        pixel_budget=values["pn"],
    )


def _params(directory: pathlib.Path, name: str, part: str, expected: Any) -> Any:
    """A part from the file `name` (.pth or .safetensors), in float32."""
    for path in (directory / f"{name}{suffix}" for suffix in (".pth", ".safetensors")):
        if path.is_file():
            state = {key.removeprefix("vae."): tensor for key, tensor in read_state_dict(path).items()}
            try:
                return names.as_float32(names.to_tree(part, state, expected))
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
    raise UserError(f"{directory} holds neither {name}.pth nor {name}.safetensors")


def _by_scale(value: Any) -> float | tuple[float, ...]:
    """A number for all scales, or a list with one per scale."""
    return tuple(map(float, value)) if isinstance(value, list) else float(value)


def read_golden(directory: str | os.PathLike[str]) -> Golden:
    """Reads a golden directory. Raises UserError for anything missing or damaged, naming it."""
    directory = resolve(directory)
    try:
        values = read_json(directory / "config.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} is not a golden directory: cannot read its config.json ({error})") from error
    try:
        config = _editor_config(values)
        grids = tuple((rows, columns) for _, rows, columns in values["schedule"])
        full = published_pyramid("1M", nearest_aspect(*values["image_hw"])).grids
        sampling = SamplingConfig(guidance=_by_scale(values["cfg"]), temperature=_by_scale(values["tau"]), greedy=True)
    except KeyError as error:
        raise UserError(f"{directory / 'config.json'} has no field {error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{directory / 'config.json'} does not describe a model: {error}") from error
    pyramid = Pyramid(grids, full)
    tensors = read_state_dict(directory / "golden.safetensors")
    scales = [f"infer_{what}_{scale:02d}" for what in ("logits", "bits") for scale in range(pyramid.scales)]
    wanted = [*_INPUTS, *scales, *(name for name in TOLERANCES if name not in ("infer_logits", "infer_bits"))]
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise UserError(f"{directory / 'golden.safetensors'} has no tensor {', '.join(missing)}")

    tokenizer = abstract_params(config, "tokenizer")
    transformer = abstract_params(config, "transformer", pyramid)
    return Golden(
        config,
        pyramid,
        sampling,
        tensors,
        _params(directory, "vae", "tokenizer", tokenizer),
        _params(directory, "transformer", "transformer", transformer),
    )


def _padded_text(golden: Golden) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all samples, one after the other -> [B, T, E] and lengths [B]."""
    lengths_B = golden.tensors["text_lengths"].astype(np.int32)
    rows = golden.tensors["text_features"]
    features_BTE = np.zeros((len(lengths_B), lengths_B.max(), rows.shape[1]), np.float32)
    for sample, part in enumerate(np.split(rows, np.cumsum(lengths_B)[:-1])):
        features_BTE[sample, : len(part)] = part
    return features_BTE, lengths_B


def forced_inputs(golden: Golden) -> tuple[jax.Array, jax.Array, np.ndarray, np.ndarray]:
    """Source tokens, inputs of all scales but the first by the target, text features and their lengths."""
    source, target = (jnp.asarray(golden.tensors[f"{side}_features"].transpose(0, 2, 3, 1)) for side in ("src", "tgt"))
    made = tokens_lib.make_tokens(source, target, golden.config, golden.pyramid)
    return made.source_BSN, made.inputs_BLN, *_padded_text(golden)


def _model_range(images_uint8: np.ndarray) -> np.ndarray:
    return to_model_range(images_uint8.transpose(0, 2, 3, 1))


def _nchw(x: jax.Array) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def _flat_logits(logits_BLN2: jax.Array) -> np.ndarray:
    return np.asarray(logits_BLN2).reshape(*logits_BLN2.shape[:2], -1)


def compute(golden: Golden) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the golden data as this implementation computes it, (name, array) in the layout of the data."""
    config, pyramid, tensors = golden.config, golden.pyramid, golden.tensors
    autoencoder = Autoencoder(config.tokenizer)
    cells = pyramid.cells(config.patchify)
    encode = jit_everywhere(lambda p, x: autoencoder.apply({"params": p}, x, method=autoencoder.encode))
    decode = jit_everywhere(lambda p, x: autoencoder.apply({"params": p}, x, method=autoencoder.decode))

    features = {}
    for side in ("src", "tgt"):
        features[side] = encode(golden.tokenizer, _model_range(tensors[f"{side}_image_uint8"]))
        yield f"{side}_features", _nchw(features[side])
    made = tokens_lib.make_tokens(features["src"], features["tgt"], config, pyramid)
    quantized = quantize(features["tgt"], cells).quantized
    yield "src_tokens", np.asarray(made.source_BSN)
    yield "tgt_tokens", np.asarray(made.inputs_BLN)
    yield "tgt_bits", np.asarray(made.labels_BLN)
    yield "quantized", _nchw(quantized)
    yield "reconstruction_f16", _nchw(decode(golden.tokenizer, quantized))

    text_BTE, lengths_B = _padded_text(golden)
    forward = jit_everywhere(Transformer(config.transformer, pyramid).apply)
    logits = forward({"params": golden.transformer}, made.source_BSN, made.inputs_BLN, text_BTE, lengths_B)
    yield "train_logits", _flat_logits(logits)
    for name, power in (("loss_plain", 0.0), ("loss_reweighted", 0.5)):
        loss, _ = bitwise_loss(logits, made.residuals_BLN, pyramid, LossConfig(scale_power=power))
        yield name, np.asarray(loss)

    sampling = [golden.sampling]
    how = controls(sampling, pyramid.scales), config, pyramid, guided_scales(sampling, pyramid.scales)

    def draw(params: Any, source: jax.Array, text: jax.Array, lengths: jax.Array) -> Any:
        keys = jax.random.split(jax.random.key(0), len(lengths))
        return sample_bits(params, source, text, lengths, keys, *how)

    sample = jit_everywhere(draw)(golden.transformer, features["src"][:1], text_BTE[:1, : lengths_B[0]], lengths_B[:1])
    for scale, (logits_k, bits_k) in enumerate(zip(sample.logits, sample.bits, strict=True)):
        yield f"infer_logits_{scale:02d}", _flat_logits(logits_k)
        yield f"infer_bits_{scale:02d}", np.asarray(bits_k)[:, None]
    image = tokens_lib.decode_bits(golden.tokenizer, sample.bits, config, pyramid)
    yield "infer_image_bgr_uint8", np.asarray(image)[..., ::-1]


def compare(golden: Golden, on_row: Callable[[ParityRow], None] = lambda row: None) -> list[ParityRow]:
    """Largest absolute error of every tensor; `on_row` gets each as soon as it is known."""
    rows = []
    for name, ours in compute(golden):
        theirs = golden.tensors[name].astype(np.float64)
        if ours.shape != theirs.shape:
            raise UserError(
                f"{name} has shape {list(theirs.shape)} in the golden data, but {list(ours.shape)} is computed"
            )
        tolerance = next(value for start, value in TOLERANCES.items() if name.startswith(start))
        row = ParityRow(name, float(np.max(np.abs(ours.astype(np.float64) - theirs))), tolerance)
        rows.append(row)
        on_row(row)
    return rows
