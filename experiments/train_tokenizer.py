"""Trains a tokenizer: autoencoder and residual quantizer, on the pictures of a data set.

    python -m experiments.train_tokenizer --config=experiments/configs/shapes.py:tokenizer --workdir=runs/tokenizer

Running the same command again goes on from the newest checkpoint. `--export=FOLDER` writes the finished tokenizer.
"""

from typing import Any

import jax
import numpy as np
from absl import flags

from data_pipelines import loader
from experiments import program
from varedit_jax.config import TokenizerRunConfig, to_dict
from varedit_jax.conversion.folder import save_folder
from varedit_jax.evaluation.sheet import Row, contact_sheet
from varedit_jax.text.vocabulary import Vocabulary
from varedit_jax.training import loop, tokenizer_step
from varedit_jax.training.optimizer import learning_rate, make_optimizer
from varedit_jax.training.perceptual import load_perceptual

_CONFIG = program.config_flag(TokenizerRunConfig)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, pictures", required=True)
_EXPORT = flags.DEFINE_string("export", "", "new folder for the finished tokenizer's weights")
_EXPORT_TYPE = flags.DEFINE_enum(
    "export_type", "float16", ["float32", "bfloat16", "float16"], "type of exported weights"
)


def main(argv: list[str]) -> None:
    """Trains, and exports if asked to."""
    del argv
    config: TokenizerRunConfig = _CONFIG.value
    perceptual = load_perceptual(config.perceptual_weights) if config.perceptual_weight else None
    optimizer = make_optimizer(config.optimizer, config.steps)
    shown = [loader.open_split(config.data, "test")[index]["source"] for index in range(8)]
    reconstruct = jax.jit(tokenizer_step.make_reconstruct(config.model))

    def sample(state: Any, step: int) -> dict[str, np.ndarray]:
        del step
        restored = np.asarray(reconstruct(state.params, jax.device_put(np.stack(shown))))
        rows = [Row(pictures=pair, instruction="") for pair in zip(shown, restored, strict=True)]
        return {"reconstructions": np.asarray(contact_sheet(rows, ["picture", "reconstruction"]))}

    init = tokenizer_step.make_init(config, optimizer)
    step = jax.jit(tokenizer_step.make_step(config, optimizer, perceptual), donate_argnums=0)
    state = loop.train(
        workdir=_WORKDIR.value,
        steps=config.steps,
        key=jax.random.key(config.seed),
        abstract_state=jax.eval_shape(init),
        init_state=lambda: tokenizer_step.start(config, init),
        step_fn=lambda number: step,
        batches=loader.training_batches(config.data, Vocabulary.load(), loader.open_split(config.data, "train")),
        put=jax.device_put,
        run_record=to_dict(config),
        cadence=loop.Cadence(
            log_every=config.log_every,
            sample_every=config.sample_every,
            save_every=config.save_every,
            keep=config.keep_checkpoints,
        ),
        sample=sample,
        learning_rate=learning_rate(config.optimizer, config.steps),
    )
    if _EXPORT.value:
        save_folder(_EXPORT.value, config.model, {"tokenizer": state.params}, _EXPORT_TYPE.value)


if __name__ == "__main__":
    program.run(main)
