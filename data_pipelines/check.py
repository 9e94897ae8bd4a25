"""Finds the records of a prepared data set that cannot be used, by decoding every image once.

    python -m data_pipelines.check --input=prepared/ultraedit --processes=16

Records were checked when they were prepared; this finds damage done since, on disk or in transfer. Bad records are
listed with their reasons in DIRECTORY/SPLIT/bad.jsonl. A run that begins leaves them out; a run under way does so when
it is resumed with --apply_bad_records. Where the loader meets a bad record that is not listed, another example of the
batch stands in for it. The same command resumes an interrupted check.
"""

import os

from absl import flags

from data_pipelines.bad_records import check_split
from data_pipelines.shards import read_index
from varedit_jax import command

_INPUT = command.DEFINE_path("input", None, "directory of a prepared data set", required=True)
_CACHE = command.DEFINE_path("cache_directory", "", "for copies of shards, where --input is a bucket", local=True)
_PROCESSES = flags.DEFINE_integer("processes", os.cpu_count() or 1, "parallel decoding processes", lower_bound=1)


def main(argv: list[str]) -> None:
    """Checks all splits."""
    del argv
    for split in read_index(_INPUT.value)["splits"]:
        counts = check_split(_INPUT.value, split, _PROCESSES.value, _CACHE.value)
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        print(f"{split}: {counts.total()} records cannot be used{f': {reasons}' if reasons else ''}")


if __name__ == "__main__":
    command.run(main)
