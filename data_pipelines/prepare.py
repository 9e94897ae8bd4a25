"""Turns a downloaded public data set into shards with an index and a report.

    python -m data_pipelines.prepare --source=omniedit --input=downloads/OmniEdit --output=data/omniedit \
        --min_side=256 --min_score=o_score:7 --near_bits=3 --min_change=3

    --output=gs://bucket/omniedit    inputs and output are local, gs:// or s3://; buckets are streamed
    --runner=DaskRunner --runner_options=--dask_client_address=HOST:8786    a cluster, see docs/clusters.md

The output appears complete or not at all; the same command resumes an interrupted job. The same inputs and flags give
the same bytes. An image, source or target, is in training or in validation, never in both. preparation/ has the steps.
"""

import os
import sys

from absl import flags

from data_pipelines.preparation.pipeline import prepare
from data_pipelines.preparation.settings import Settings, Vision
from data_pipelines.sources import SOURCES
from varedit_jax import command
from varedit_jax.errors import UserError

_SOURCE = flags.DEFINE_string("source", None, f"format: {', '.join(SOURCES)}", required=True)
_INPUT = flags.DEFINE_list("input", None, "files and directories as downloaded, comma-separated", required=True)
_OUTPUT = command.DEFINE_path("output", None, "new directory", required=True)
_STAGING = command.DEFINE_path(
    "staging_directory", "", "local directory for intermediate files; by default beside the output, or in the "
    "working directory if the output is in a bucket", local=True
)  # fmt: skip
_OPTIONS = flags.DEFINE_list("source_options", [], "NAME=VALUE,... of the format")
_SPLITS = flags.DEFINE_list(
    "splits", ["train"], "of the publisher, where names of files say them; `all` takes every file"
)
_RUNNER = flags.DEFINE_string("runner", "DirectRunner", "Beam's runner; DirectRunner is this machine")
_WORKERS = flags.DEFINE_integer("workers", 0, "processes on this machine; 0 is one per core", lower_bound=0)
_RUNNER_OPTIONS = flags.DEFINE_list("runner_options", [], "--NAME=VALUE,... for Beam")
_RUNNER_TIMEOUT = flags.DEFINE_float(
    "runner_timeout",
    600.0,
    "seconds without a sign of life from any worker, after which a runner of a cluster has failed",
)
_CHECK_DISK = flags.DEFINE_bool("check_disk", True, "begin only if the disk has room for all of the inputs")

_DECODE = flags.DEFINE_bool("decode", True, "decode every image, and drop records with damaged ones")
_MIN_SIDE = flags.DEFINE_integer("min_side", 0, "least short side of an image, in pixels")
_MAX_SIDE = flags.DEFINE_integer("max_side", 0, "greatest long side of an image, in pixels; 0 is no limit")
_MAX_RATIO = flags.DEFINE_float("max_ratio", 0.0, "greatest ratio of long to short side; 0 is no limit")
_MAX_ASPECT_CHANGE = flags.DEFINE_float(
    "max_aspect_change", 1.5, "greatest ratio of the aspects of source and target, whose sides must not be turned "
    "against each other either; 0 is no limit"
)  # fmt: skip
_MIN_SCORE = flags.DEFINE_multi_string("min_score", [], "NAME:LEAST; drops records with a lower score; repeatable")
_FIRST_TURN = flags.DEFINE_bool("first_turn", False, "of sessions of several edits, keep only the first")
_MIN_CHANGE = flags.DEFINE_float("min_change", 0.0, "drops edits that change no region by as many levels of 255")
_EXACT = flags.DEFINE_bool("exact", True, "deduplicate records with the same images and instruction")
_NEAR_BITS = flags.DEFINE_integer(
    "near_bits", -1, "drop near-duplicates that differ in up to so many of 64 bits; -1 keeps them"
)
_VALIDATION = flags.DEFINE_float("validation", 0.01, "share of source images kept for validation")
_SHARD_MB = flags.DEFINE_integer("shard_mb", 1024, "approximate size of a shard in MB", lower_bound=1)

_VISION_URL = flags.DEFINE_string("vision_url", "", "endpoint of chat completions, such as http://localhost:8000/v1")
_VISION_MODEL = flags.DEFINE_string("vision_model", "", "vision-language model at the endpoint")
_VISION_KEY = flags.DEFINE_string("vision_key", "OPENAI_API_KEY", "environment variable that holds the key")
_VISION_PER_MINUTE = flags.DEFINE_float("vision_per_minute", 0.0, "most requests per minute and process; 0 is no limit")
_VISION_PARALLEL = flags.DEFINE_integer("vision_parallel", 8, "concurrent requests per process", lower_bound=1)


def _pairs(texts: list[str], separator: str, flag: str) -> list[tuple[str, str]]:
    pairs = [text.partition(separator) for text in texts]
    for name, found, value in pairs:
        if not (name and found and value):
            raise UserError(f"--{flag} is {name + found + value!r}; it must be like NAME{separator}VALUE")
    return [(name, value) for name, _, value in pairs]


def _score(name: str, least: str) -> tuple[str, float]:
    try:
        return name, float(least)
    except ValueError as error:
        raise UserError(f"--min_score is {name}:{least}; {least!r} is no number") from error


def _settings() -> Settings:
    if bool(_VISION_URL.value) != bool(_VISION_MODEL.value):
        raise UserError("--vision_url and --vision_model go together: give both, or neither")
    vision = None
    if _VISION_URL.value:
        vision = Vision(
            url=_VISION_URL.value,
            model=_VISION_MODEL.value,
            key_variable=_VISION_KEY.value,
            parallel=_VISION_PARALLEL.value,
            per_minute=_VISION_PER_MINUTE.value,
        )
    return Settings(
        decode=_DECODE.value,
        min_side=_MIN_SIDE.value,
        max_side=_MAX_SIDE.value,
        max_ratio=_MAX_RATIO.value,
        max_aspect_change=_MAX_ASPECT_CHANGE.value,
        min_scores=tuple(_score(*pair) for pair in _pairs(_MIN_SCORE.value, ":", "min_score")),
        first_turn=_FIRST_TURN.value,
        min_change=_MIN_CHANGE.value,
        exact=_EXACT.value,
        near_bits=_NEAR_BITS.value,
        validation=_VALIDATION.value,
        shard_bytes=_SHARD_MB.value * 2**20,
        vision=vision,
    )


def main(argv: list[str]) -> None:
    """Prepares a data set."""
    counts = prepare(
        _SOURCE.value,
        _INPUT.value,
        _OUTPUT.value,
        _settings(),
        source_options=dict(_pairs(_OPTIONS.value, "=", "source_options")),
        splits=_SPLITS.value,
        runner=_RUNNER.value,
        workers=_WORKERS.value or len(os.sched_getaffinity(0)),
        runner_options=_RUNNER_OPTIONS.value,
        runner_timeout=_RUNNER_TIMEOUT.value,
        staging_directory=_STAGING.value,
        check_disk=_CHECK_DISK.value,
        say=lambda sentence: print(sentence, file=sys.stderr, flush=True),
    )
    splits = ", ".join(f"{count} for {split}" for split, count in counts.items())
    print(f"{_OUTPUT.value}: {splits}; report/report.md lists what was left out and why")


if __name__ == "__main__":
    command.run(main)
