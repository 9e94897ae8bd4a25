"""All stages in order: read, deduplicate, split, query the vision model, write, report."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.preparation import duplicates, vision_filter
from data_pipelines.preparation.fingerprints import FACTS, Facts, PartFiles, rows_so_far, save_array
from data_pipelines.preparation.scan import ScanTask, scan
from data_pipelines.preparation.settings import Settings
from data_pipelines.preparation.split import find_leaks
from data_pipelines.preparation.stages import StageRunner
from data_pipelines.preparation.staging import Staging
from data_pipelines.preparation.summary import count, write_report
from data_pipelines.preparation.write import lay_out, shard_tasks, write
from data_pipelines.reasons import Reason
from data_pipelines.shards import write_index
from data_pipelines.sources import Part, find_parts, sentences
from varedit_jax.errors import UserError
from varedit_jax.storage import disk
from varedit_jax.storage.paths import PathLike, is_remote, resolve, stamp

VERDICTS = (*Reason,)  # a verdict is 0 for a remaining record, else 1 + index in this tuple


def prepare(
    source: str,
    inputs: Sequence[str],
    output: PathLike,
    settings: Settings,
    *,
    source_options: Mapping[str, str] = {},
    splits: Sequence[str] = ("train",),
    runner: str = "DirectRunner",
    workers: int = 1,
    runner_options: Sequence[str] = (),
    staging_directory: str = "",
    say: Callable[[str], object] = print,
) -> dict[str, int]:
    """Turns a downloaded data set into shards with an index and a report; returns record counts by split.

    The same inputs and settings give the same bytes with any runner and number of workers. Another call resumes an
    interrupted one. Answers of a vision-language model are stored beside the output, in OUTPUT.answers.

    Raises UserError for inputs that cannot be read, settings that leave no record, and an output that exists or is
    below an input.
    """
    with disk.explained("data set", output):
        _check_apart(inputs, resolve(output))
        parts = find_parts(source, inputs, source_options, splits)
        left_out = [refused for part in parts for refused in part.left_out]
        for sentence in sentences(left_out):
            say(sentence)
        job = {
            "facts": FACTS.descr,  # rows of earlier versions of this package differ
            "settings": dataclasses.asdict(settings),
            "parts": [(part.source, part.name, dict(part.options), _stamps(part)) for part in parts],
            **({"left_out": [(refused.id, refused.detail) for refused in left_out]} if left_out else {}),
        }
        with Staging(output, job, staging_directory) as staging:
            stages = StageRunner(runner, workers, runner_options, staging.directory)
            steps = _Steps(staging.directory, parts, settings, stages)
            steps.read()
            say(f"read: {len(steps.facts)} records passed the filters")
            steps.check_some_are_left()
            for reason in (Reason.SAME_ID, Reason.EXACT, Reason.NEAR):
                steps.compare(reason)
            steps.split()
            if settings.vision:
                beside = staging.directory if is_remote(staging.output) else staging.output
                steps.ask(beside.with_name(f"{beside.name}.answers"))
            steps.check_some_are_left()
            out = staging.directory / "out"
            steps.write(out, source)
            counts = write_index(out)
            write_report(out / "report", steps.facts, steps.verdicts, steps.twins, settings.validation)
            staging.finish()
    return counts


def _check_apart(inputs: Sequence[str], output: pathlib.Path) -> None:
    """Raises UserError if the output is below an input."""

    def real(path: pathlib.Path) -> str:
        return str(path) if is_remote(path) else os.path.realpath(path)

    for path in map(resolve, inputs):
        if f"{real(output)}/".startswith(f"{real(path)}/"):
            raise UserError(
                f"{output} lies below {path}, and would be taken for a part of it when the same command resumes; "
                f"give a directory beside it"
            )


def _stamps(part: Part) -> list[Any]:
    """Returns the stamps of a part's files; directories, in which some parts look up names, have no size or time."""
    return [[str(path), 0, 0] if path.is_dir() else stamp(path) for path in map(resolve, part.files)]


class _Steps:
    """The stages of one job, and the verdicts on its records so far."""

    def __init__(self, directory: pathlib.Path, parts: Sequence[Part], settings: Settings, stages: StageRunner) -> None:
        self._directory, self._parts, self._settings, self._stages = directory, parts, settings, stages
        self._directories = tuple(directory / "scan" / f"{index:05d}" for index in range(len(parts)))
        self._verdicts_file = directory / "verdicts.npy"
        self.twins: dict[
            int, tuple[NDArray[np.int64], NDArray[np.int64]]
        ] = {}  # by verdict: dropped records, and their duplicates

    def read(self) -> None:
        """Scans all parts."""
        tasks = [
            ScanTask(part=part, settings=self._settings, directory=directory)
            for part, directory in zip(self._parts, self._directories, strict=True)
        ]
        self._stages.run("read", scan, tasks, lambda: f"{rows_so_far(self._directory / 'scan'):,} records")
        self.facts = Facts([PartFiles(directory) for directory in self._directories])
        self.verdicts = np.zeros(len(self.facts), np.uint8)

    def check_some_are_left(self) -> None:
        """Raises UserError if no record remains."""
        if (self.verdicts == 0).any():
            return
        total = sum(count(self.facts, self.verdicts, 0.0).values(), collections.Counter[str]())
        read = total.pop("read", 0)
        reasons = ", ".join(f"{number} {reason}" for reason, number in total.most_common())
        raise UserError(f"nothing is left of {read} records: {reasons or 'the data set is empty'}; leave out less")

    def _leave(self, reason: Reason, numbers: NDArray[np.int64], twins: NDArray[np.int64] | None = None) -> None:
        """Sets the verdict of dropped records."""
        verdict = 1 + VERDICTS.index(reason)
        numbers, first = np.unique(numbers, return_index=True)
        self.verdicts[numbers] = verdict
        if twins is not None:
            self.twins[verdict] = (numbers, twins[first])

    def _save_verdicts(self) -> pathlib.Path:
        save_array(self._verdicts_file, self.verdicts)
        return self._verdicts_file

    def compare(self, reason: Reason) -> None:
        """Drops duplicates of one kind if the settings say so. Ids are always deduplicated: the index needs it."""
        settings = self._settings
        if (reason is Reason.EXACT and not settings.exact) or (reason is Reason.NEAR and settings.near_bits < 0):
            return
        rows = len(self.facts) * (settings.near_bits + 1 if reason is Reason.NEAR else 1)
        buckets = max(1, -(-rows // duplicates.BUCKET))
        verdicts = self._save_verdicts()
        tasks = [
            duplicates.SearchTask(
                reason=reason,
                parts=self._directories,
                verdicts=verdicts,
                near_bits=settings.near_bits,
                bucket=bucket,
                buckets=buckets,
                found=self._directory / "step" / f"{reason.name.lower()}-{bucket:05d}.npy",
            )
            for bucket in range(buckets)
        ]
        self._stages.run(f"search for {reason}", duplicates.search, tasks)
        pairs = np.concatenate([np.load(task.found) for task in tasks])
        self._leave(reason, pairs[:, 0], pairs[:, 1])

    def split(self) -> None:
        """Drops images of validation from training."""
        pairs = find_leaks(self.facts, self.verdicts, self._settings.validation, self._settings.near_bits)
        self._leave(Reason.LEAK, pairs[:, 0], pairs[:, 1])

    def ask(self, answers: pathlib.Path) -> None:
        """Queries a vision-language model about the remaining records."""
        assert self._settings.vision
        verdicts = self._save_verdicts()
        tasks = [
            vision_filter.QuestionTask(
                vision=self._settings.vision,
                parts=self._directories,
                verdicts=verdicts,
                part=index,
                answers=answers / f"{part.name.replace('/', '+')}.sqlite",
                found=self._directory / "step" / f"vision-{index:05d}.npy",
            )
            for index, part in enumerate(self._parts)
        ]
        self._stages.run("questions", vision_filter.ask, tasks)
        found = np.concatenate([np.load(task.found) for task in tasks])
        for index, reason in enumerate(vision_filter.REASONS):
            self._leave(reason, found[found[:, 1] == index, 0])

    def write(self, out: pathlib.Path, name: str) -> None:
        """Writes the shards."""
        settings = self._settings
        plan = lay_out(self._directory, self.facts, self.verdicts, settings.validation, settings.shard_bytes)
        self._stages.run("shards", write, shard_tasks(plan, self._directories, out, name))
