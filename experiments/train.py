"""Trains an editor, on all devices of all processes.

    python -m experiments.train --config=experiments/configs/shapes.py --workdir=runs/shapes

Running the same command again resumes from the newest checkpoint. `--export=DIRECTORY` writes the finished editor.
`--apply_bad_records` lets a run go on without what data_pipelines.check has found to be bad since it began.
`--replay=WORKDIR/replay/step_N` repeats a dumped step, and prints its metrics as JSON.

Several processes find each other by their environment (TPU VMs, GKE, SLURM) or by --coordinator=HOST:PORT,
--process_count and --process_index; experiments/launch has the commands.
"""

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from data_pipelines import loader
from data_pipelines.amendments import Amendments
from data_pipelines.record import EXAMPLE_IDS
from experiments import program, run_flags
from experiments.feature_encoders import open_features
from experiments.shapes_scoring import prepare_sheet, sample_sheet
from varedit_jax import command
from varedit_jax.config import RunConfig, to_dict
from varedit_jax.conversion import convert
from varedit_jax.errors import UserError
from varedit_jax.parallel import processes
from varedit_jax.parallel.mesh import batch_part, make_mesh
from varedit_jax.sampling.editor import Editor
from varedit_jax.storage import paths
from varedit_jax.text.vocabulary import Vocabulary
from varedit_jax.training import run_config
from varedit_jax.training.metrics import flat_metrics
from varedit_jax.training.optimizer import learning_rate
from varedit_jax.training.replay import replay
from varedit_jax.training.setup import MeshRun
from varedit_jax.training.trainer import Job, Trainer
from varedit_jax.training.watchdog import Watchdog
from varedit_jax.weights.directory import save_weights

_CONFIG = program.ConfigFlag(RunConfig)
_VERIFY = flags.DEFINE_bool("verify", False, "first compare the initial and frozen weights with their manifests")
_REPLAY = command.DEFINE_path("replay", "", "directory of a step, WORKDIR/replay/step_N, to repeat instead of training")
_APPLY_BAD_RECORDS = flags.DEFINE_bool(
    "apply_bad_records", False, "resume without the examples that data_pipelines.check found to be bad since the start"
)
_SHOWN = 8  # examples of a sheet
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, if the environment does not give it")
_PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "processes of the run; 1 ignores the environment")
_PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "index of this process, from 0")


def _replay(run: MeshRun, step_fn: Callable[[int], Any]) -> None:
    """Repeats a step, and prints its metrics."""
    run_config.check_config(paths.resolve(_REPLAY.value).parent.parent, to_dict(run.config))
    key = jax.random.key(run.config.seed)
    metrics = replay(
        _REPLAY.value, key=key, abstract_state=run.abstract_state, step_fn=step_fn, put=run.put, ids_field=EXAMPLE_IDS
    )
    if jax.process_index() == 0:
        values = {name: value if math.isfinite(value) else None for name, value in flat_metrics(metrics)}
        print(json.dumps(values))


def _train(config: RunConfig, watchdog: Watchdog) -> None:
    """Sets up data, weights and step, and runs the loop."""
    mesh = make_mesh(config.mesh)
    processes.meet(mesh)
    part, vocabulary = batch_part(mesh), Vocabulary.load()
    with processes.first_process_first("the data set"):
        train, held_out = (loader.open_examples(config.data, split, config.model) for split in ("train", "test"))
    with jax.set_mesh(mesh):
        run = MeshRun(config, mesh)
        frozen = run.load_frozen()
    train_features, held_out_features = (open_features(config, train, "train"), open_features(config, held_out, "test"))
    amendments = Amendments(
        {
            "train": loader.kept_examples(train, train_features),
            "test": loader.kept_examples(held_out, held_out_features),
        },
        run_flags.WORKDIR.value,
        apply=_APPLY_BAD_RECORDS.value,
        writes=jax.process_index() == 0,
        say=processes.say,
    )

    def evaluate(state: Any) -> dict[str, np.ndarray]:
        kept = amendments.kept("test", int(state.step))
        batches = loader.evaluation_batches(config.data, vocabulary, held_out, held_out_features, *part, kept)
        return run.evaluate(state, frozen, itertools.islice(batches, config.eval_batches), held_out.kinds)

    shown = loader.shown_examples(held_out, _SHOWN) if config.cadence.sample_every else []

    def sample(state: Any, step: int) -> dict[str, np.ndarray]:
        del step
        if not shown:
            return {}
        params = {"held_out": state.params} | ({} if state.ema is None else {"held_out_ema": state.ema})
        use = config.sampling, config.editing
        editors = {name: Editor(config.model, {**frozen, **each}, *use) for name, each in params.items()}
        return {name: np.asarray(sample_sheet(editor, shown)) for name, editor in editors.items()}

    def prepare_evaluation() -> None:
        if config.cadence.eval_every:
            run.prepare_evaluation(len(held_out.kinds))

    def prepare_sample() -> None:
        with jax.set_mesh(mesh):
            if shown:
                params = {**frozen, **run.abstract_state.params}
                prepare_sheet(Editor(config.model, params, config.sampling, config.editing), shown)

    def prepare_numbers() -> None:
        if config.guard.verify_every:
            run.prepare_numbers()

    quarantine = paths.resolve(run_flags.WORKDIR.value) / "quarantine" / f"process_{jax.process_index()}.jsonl"
    batches = loader.training_batches(
        config.data, vocabulary, train, train_features, *part, quarantine=quarantine, amendments=amendments
    )
    with jax.set_mesh(mesh), run.stages(frozen, (prepare_evaluation, prepare_sample, prepare_numbers)) as stages:
        if _REPLAY.value:
            return _replay(run, stages.step)
        processes.wait_for_all("the run to begin")
        job = Job(
            steps=config.steps,
            key=jax.random.key(config.seed),
            abstract_state=run.abstract_state,
            init_state=run.init_state,
            stages=stages,
            batches=batches,
            data_metrics=batches.metrics,
            data_digest=batches.digest,
            put=run.put,
            record=to_dict(config),
            cadence=config.cadence,
            evaluate=evaluate,
            sample=sample,
            learning_rate=learning_rate(config.optimizer, config.steps),
            guard=config.guard,
            examples=run.examples(frozen),
            work=run.work,
            ids_field=EXAMPLE_IDS,
        )
        state = Trainer(job, run_flags.launch(), watchdog).run()
    if run_flags.EXPORT.value and int(state.step) == config.steps:
        params = {**frozen, **state.params}
        use = config.sampling, config.editing
        save_weights(run_flags.EXPORT.value, config.model, params, run_flags.EXPORT_TYPE.value, *use)


def main(argv: list[str]) -> None:
    """Joins the other processes and trains."""
    del argv
    config: RunConfig = _CONFIG.value
    with (
        processes.joined(_COORDINATOR.value, _PROCESS_COUNT.value, _PROCESS_INDEX.value),
        Watchdog(config.guard, run_flags.WORKDIR.value) as watchdog,
    ):
        program.share_compiled(run_flags.WORKDIR.value)
        if run_flags.EXPORT.value and jax.process_count() > 1:
            raise UserError(
                f"--export is for a single process, and there are {jax.process_count()}; export the finished run "
                f"by experiments.convert --to=directory --input={run_flags.WORKDIR.value} "
                f"--output={run_flags.EXPORT.value}"
            )
        if _VERIFY.value:
            for directory in dict.fromkeys((config.tokenizer_weights, config.text_weights, config.init_from)):
                if directory:
                    print(f"{convert.verify(directory)} tensors of {directory} are as they were written")
        _train(config, watchdog)


if __name__ == "__main__":
    program.run(main)
