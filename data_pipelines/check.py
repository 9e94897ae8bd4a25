"""Finds the records of a prepared data set that cannot be used, by decoding every image once.

    python -m data_pipelines.check --input=prepared/ultraedit --processes=16

Records were checked when they were prepared; this is for what happened to them since, on disks and on the way. What is
found goes to DIRECTORY/SPLIT/bad.jsonl with its reason, and training leaves it out from then on. Where the loader meets
such a record unchecked, another example of the batch stands in for it. A check that was ended goes on when the same
command runs again.
"""

import os

from absl import flags

from data_pipelines.bad_records import check_split
from data_pipelines.shards import read_index
from varedit_jax import command

_INPUT = command.DEFINE_path("input", None, "directory of a prepared data set", required=True)
_CACHE = command.DEFINE_path("cache_directory", "", "for copies of shards, where --input is a bucket", local=True)
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count() or 1, "that decode at a time", lower_bound=1)


def main(argv: list[str]) -> None:
    """Checks all splits."""
    del argv
    for split in read_index(_INPUT.value)["splits"]:
        counts = check_split(_INPUT.value, split, _PROCESSES.value, _CACHE.value)
        told = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        print(f"{split}: {counts.total()} records cannot be used{f': {told}' if told else ''}")


if __name__ == "__main__":
    command.run(main)
