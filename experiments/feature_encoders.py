"""The frozen encoders of a run, as functions that compute features of images and instructions."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.datasets import ExampleSource, image_sizes
from data_pipelines.features import EncodeImages, EncodeText, Features, MadeBy, precompute
from varedit_jax.config import RunConfig
from varedit_jax.parallel import processes
from varedit_jax.parallel.compiler_options import jit_everywhere
from varedit_jax.parameters import abstract_params
from varedit_jax.text.t5 import T5Encoder
from varedit_jax.text.vocabulary import Vocabulary
from varedit_jax.tokenizer.tokens import encode_images
from varedit_jax.types import Params
from varedit_jax.weights.directory import weights_hash
from varedit_jax.weights.native import load_part


def load_encoders(config: RunConfig) -> tuple[Params, Params | None]:
    """Returns the weights of the tokenizer, and of a frozen text encoder. Raises UserError as `load_part`."""
    tokenizer = load_part(config.tokenizer_weights, "tokenizer", abstract_params(config.model, "tokenizer"))
    if config.train_text:
        return tokenizer, None
    return tokenizer, load_part(config.text_weights, "text", abstract_params(config.model, "text"))


def made_by(config: RunConfig, tokenizer: Params, text: Params | None) -> MadeBy:
    """Returns the identity of the encoders and settings that make the features; the tokenizer's decoder has no part."""
    data = config.data
    return MadeBy(
        tokenizer=f"{weights_hash(tokenizer['encoder'])}-{config.tokenizer_precision}",
        text="" if text is None else weights_hash(text) + f"-{config.text_dtype}",
        text_tokens=data.text_tokens,
        sizes=image_sizes(config.model, data.aspects),
        # Version 2: targets are brought to their source's size. Generated images are never resized.
        resize=data.resize if data.name == "shapes" else f"{data.resize} 2",
        dtype="bfloat16" if data.name == "records" else "float32",
    )


@functools.cache
def _made_by(config: RunConfig) -> MadeBy:
    return made_by(config, *load_encoders(config))


def open_features(config: RunConfig, source: ExampleSource, split: str) -> Features | None:
    """Returns the precomputed features of a source, None if the config has none; computes those of generated data.

    Raises UserError as `load_encoders` and `Features`.
    """
    if config.data.features == "online":
        return None
    made = _made_by(config)
    if config.data.name != "records":
        with processes.first_process_first(f"features of {split}"):
            precompute(source, made, *encoders(config, *load_encoders(config)), batch_size=64)
    return Features(source, made)


def encoders(config: RunConfig, tokenizer: Params, text: Params | None) -> tuple[EncodeImages, EncodeText | None]:
    """Returns the functions that compute features on the first device."""
    encode = jit_everywhere(lambda params, images: encode_images(params, images, config.model))

    def encode_pixels(images: np.ndarray) -> jax.Array:
        with jax.default_matmul_precision(config.tokenizer_precision):
            return encode(tokenizer, images)

    if text is None:
        return encode_pixels, None
    dtype = jnp.dtype(config.text_dtype)
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), text)
    apply = jit_everywhere(T5Encoder(config.model.text, dtype).apply)
    vocabulary = Vocabulary.load()

    def encode_text(instructions: Sequence[str]) -> tuple[jax.Array, np.ndarray]:
        ids, lengths = vocabulary.encode(instructions, config.data.text_tokens)
        return apply({"params": weights}, ids, lengths), lengths

    return encode_pixels, encode_text
