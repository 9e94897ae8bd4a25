"""Precomputes the features of prepared records with the frozen encoders of an experiment config.

    python -m experiments.precompute --config=CONFIG.py --config.data.name=records \\
        --config.data.mixture='(("prepared/ultraedit",1.0),)' --process_index=0 --process_count=8

Each of several processes, on one machine or several that share the directories, takes its share of the shards; the same
command resumes. Training with the same config and --config.data.features=precomputed then reads the features, and
refuses those of other weights.
"""

from absl import flags

from data_pipelines import features, loader
from experiments import feature_encoders, program
from varedit_jax.config import RunConfig
from varedit_jax.errors import UserError

_CONFIG = program.ConfigFlag(RunConfig)
_PROCESS_INDEX = flags.DEFINE_integer("process_index", 0, "index of this process, from 0", lower_bound=0)
_PROCESS_COUNT = flags.DEFINE_integer("process_count", 1, "processes that share the shards", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 32, "images per batch", lower_bound=1)


def main(argv: list[str]) -> None:
    """Computes the features of both splits."""
    del argv
    config: RunConfig = _CONFIG.value
    index, count = _PROCESS_INDEX.value, _PROCESS_COUNT.value
    if config.data.name != "records":
        raise UserError(f"data.name is {config.data.name!r}; experiments.train computes features of it by itself")
    if index >= count:
        raise UserError(f"there is no --process_index={index} of --process_count={count}; the first one is 0")
    sources = {split: loader.open_records(config.data, split, config.model) for split in ("train", "test")}
    weights = feature_encoders.load_encoders(config)
    made = feature_encoders.made_by(config, *weights)
    functions = feature_encoders.encoders(config, *weights)
    for split, source in sources.items():
        written = features.precompute(source, made, *functions, _BATCH.value, index, count)
        print(f"{split}: {written} shards written to features/{made.name} of each data set")


if __name__ == "__main__":
    program.run(main)
