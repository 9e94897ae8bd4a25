"""Trains an editor.

    python -m experiments.train --config=experiments/configs/shapes.py --workdir=runs/shapes

Running the same command again goes on from the newest checkpoint. `--export=FOLDER` writes the finished editor.
"""

import itertools
import pathlib
from typing import Any

import jax
import numpy as np
from absl import flags

from data_pipelines import features as features_lib
from data_pipelines import loader
from data_pipelines.shapes.scoring import sample_sheet
from experiments import program
from varedit_jax.config import RunConfig, to_dict
from varedit_jax.conversion import convert
from varedit_jax.conversion.folder import save_folder, weights_hash
from varedit_jax.errors import UserError
from varedit_jax.sampling.editor import Editor
from varedit_jax.scales import Pyramid, editor_pyramid
from varedit_jax.text.vocabulary import Vocabulary
from varedit_jax.tokenizer.tokens import encode_images
from varedit_jax.training import editor_run, loop
from varedit_jax.training.optimizer import learning_rate, make_optimizer
from varedit_jax.training.stages import Stages

_CONFIG = program.config_flag(RunConfig)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, metrics, pictures", required=True)
_STOP_AFTER = flags.DEFINE_integer("stop_after", None, "end, saved, after so many steps of this process", lower_bound=1)
_EXPORT = flags.DEFINE_string("export", "", "new folder for the finished editor's weights")
_EXPORT_TYPE = flags.DEFINE_enum(
    "export_type", "float16", ["float32", "bfloat16", "float16"], "type of exported weights"
)
_VERIFY = flags.DEFINE_bool("verify", False, "compare the weights it starts from with their manifests first")


def _features(config: RunConfig, source: loader.TfdsSource, split: str, tokenizer: Any) -> Any:
    """Features of a split, computed on first use, if the card asks for them."""
    if config.data.features == "online":
        return None
    name = weights_hash(tokenizer["encoder"])  # features do not depend on the decoder
    encode = jax.jit(lambda params, images: encode_images(params, images, config.model))
    folder = pathlib.Path(source.directory) / "features" / f"{split}-{name[:16]}"
    return features_lib.precompute(folder, source, name, lambda images: encode(tokenizer, images), batch_size=64)


def _stages(config: RunConfig, pyramid: Pyramid, optimizer: Any, frozen: Any) -> Stages:
    if any(scales > pyramid.scales for _, scales in config.stages):
        raise UserError(f"stages={config.stages!r}, but the pyramid has {pyramid.scales} scales; lower the scales")
    ends = itertools.accumulate(steps for steps, _ in config.stages)
    pyramids = [pyramid.first(scales) for _, scales in config.stages]
    steps = [
        (end, jax.jit(editor_run.make_step(config, part, optimizer), donate_argnums=0))
        for end, part in zip((*ends, config.steps), (*pyramids, pyramid), strict=True)
    ]
    return Stages(steps, frozen)


def main(argv: list[str]) -> None:
    """Puts data, weights and step together and runs the loop."""
    del argv
    config: RunConfig = _CONFIG.value
    if _VERIFY.value:
        for folder in dict.fromkeys((config.tokenizer_weights, config.text_weights, config.init_from)):
            if folder:
                print(f"{convert.verify(folder)} tensors of {folder} are as they were written")
    pyramid = editor_pyramid(config.model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    frozen = jax.device_put(editor_run.load_frozen(config))
    vocabulary = Vocabulary.load()
    train, held_out = (loader.open_split(config.data, split) for split in ("train", "test"))
    train_features = _features(config, train, "train", frozen["tokenizer"])
    held_out_features = _features(config, held_out, "test", frozen["tokenizer"])

    evaluate_batch = jax.jit(editor_run.make_evaluate(config, pyramid))

    def evaluate(state: Any) -> dict[str, np.ndarray]:
        batches = loader.evaluation_batches(config.data, vocabulary, held_out, held_out_features)
        metrics = [
            jax.device_get(evaluate_batch(state.params, frozen, jax.device_put(batch)))
            for batch, _ in zip(batches, range(config.eval_batches), strict=False)
        ]
        return jax.tree.map(lambda *values: np.mean(values, axis=0), *metrics)

    def sample(state: Any, step: int) -> dict[str, np.ndarray]:
        del step
        editor = Editor(config.model, {**frozen, **state.params}, config.sampling)
        return {"held_out": np.asarray(sample_sheet(editor, held_out, range(8)))}

    init = editor_run.make_init(config, optimizer)
    with _stages(config, pyramid, optimizer, frozen) as stages:
        state = loop.train(
            workdir=_WORKDIR.value,
            steps=config.steps,
            key=jax.random.key(config.seed),
            abstract_state=jax.eval_shape(init),
            init_state=lambda: editor_run.start(config, init),
            step_fn=stages.step,
            batches=loader.training_batches(config.data, vocabulary, train, train_features),
            put=jax.device_put,
            run_record=to_dict(config),
            cadence=loop.Cadence(
                log_every=config.log_every,
                eval_every=config.eval_every,
                sample_every=config.sample_every,
                save_every=config.save_every,
                keep=config.keep_checkpoints,
            ),
            evaluate=evaluate,
            sample=sample,
            learning_rate=learning_rate(config.optimizer, config.steps),
            stop_after=_STOP_AFTER.value,
        )
    if _EXPORT.value and int(state.step) == config.steps:
        save_folder(_EXPORT.value, config.model, {**frozen, **state.params}, _EXPORT_TYPE.value, config.sampling)


if __name__ == "__main__":
    program.run(main)
