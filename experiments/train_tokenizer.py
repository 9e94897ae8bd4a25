"""Trains a tokenizer: autoencoder and residual quantizer, on the images of a data set.

    python -m experiments.train_tokenizer --config=experiments/configs/shapes.py:tokenizer --workdir=runs/tokenizer

Running the same command again resumes from the newest checkpoint. `--export=DIRECTORY` writes the finished tokenizer.
"""

from typing import Any

import jax
import numpy as np

from data_pipelines import loader
from data_pipelines.record import EXAMPLE_IDS
from experiments import program, run_flags
from varedit_jax.config import TokenizerRunConfig, to_dict
from varedit_jax.contact_sheet import SheetRow, contact_sheet
from varedit_jax.parallel.compiler_options import jit_everywhere
from varedit_jax.text.vocabulary import Vocabulary
from varedit_jax.training import tokenizer_step
from varedit_jax.training.optimizer import learning_rate, make_optimizer
from varedit_jax.training.perceptual import load_perceptual
from varedit_jax.training.stages import SingleStage
from varedit_jax.training.trainer import Job, Trainer
from varedit_jax.weights.directory import save_weights

_CONFIG = program.ConfigFlag(TokenizerRunConfig)


def main(argv: list[str]) -> None:
    """Trains, and exports if requested."""
    del argv
    config: TokenizerRunConfig = _CONFIG.value
    perceptual = load_perceptual(config.perceptual_weights) if config.perceptual_weight else None
    optimizer = make_optimizer(config.optimizer, config.steps)
    shown = [loader.open_split(config.data, "test")[index]["source"] for index in range(8)]
    reconstruct = jit_everywhere(tokenizer_step.make_reconstruct(config.model))

    def sample(state: Any, step: int) -> dict[str, np.ndarray]:
        del step
        restored = np.asarray(reconstruct(state.params, jax.device_put(np.stack(shown))))
        rows = [SheetRow(images=pair, instruction="") for pair in zip(shown, restored, strict=True)]
        return {"reconstructions": np.asarray(contact_sheet(rows, ["original", "reconstruction"]))}

    init = tokenizer_step.make_init(config, optimizer)
    step = jit_everywhere(tokenizer_step.make_step(config, optimizer, perceptual), donate_argnums=0)
    job = Job(
        steps=config.steps,
        key=jax.random.key(config.seed),
        abstract_state=jax.eval_shape(init),
        init_state=lambda: tokenizer_step.start(config, init),
        stages=SingleStage(step),
        batches=loader.training_batches(config.data, Vocabulary.load(), loader.open_split(config.data, "train")),
        put=jax.device_put,
        record=to_dict(config),
        cadence=config.cadence,
        sample=sample,
        learning_rate=learning_rate(config.optimizer, config.steps),
        guard=config.guard,
        ids_field=EXAMPLE_IDS,
    )
    state = Trainer(job, run_flags.launch()).run()
    if run_flags.EXPORT.value and int(state.step) == config.steps:
        save_weights(run_flags.EXPORT.value, config.model, {"tokenizer": state.params}, run_flags.EXPORT_TYPE.value)


if __name__ == "__main__":
    program.run(main)
