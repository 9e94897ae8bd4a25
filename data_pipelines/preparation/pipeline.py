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
from data_pipelines.preparation.staged import BUCKETS, give_back
from data_pipelines.preparation.stages import StageRunner
from data_pipelines.preparation.staging import Staging
from data_pipelines.preparation.summary import count, first_examples, write_report
from data_pipelines.preparation.write import ShardTask, lay_out, shard_tasks, write
from data_pipelines.reasons import Reason
from data_pipelines.shards import INDEX, read_index, remove_notes, write_index
from data_pipelines.sources import Part, find_parts, sentences
from varedit_jax.errors import UserError
from varedit_jax.storage import disk, files
from varedit_jax.storage.paths import PathLike, is_remote, resolve, size, stamp

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
    runner_timeout: float = 600.0,
    staging_directory: str = "",
    check_disk: bool = True,
    say: Callable[[str], object] = print,
) -> dict[str, int]:
    """Turns a downloaded data set into shards with an index and a report; returns record counts by split.

    The same inputs and settings give the same bytes with any runner and number of workers. Another call resumes an
    interrupted one. Answers of a vision-language model are stored beside the output, in OUTPUT.answers.

    Raises UserError for inputs that cannot be read, too small a disk, a runner that fails, an output that exists or is
    below an input, and settings that leave no record; OUTPUT.report then has the report.
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
            out = staging.directory / "out"
            if (out / INDEX).exists():  # an earlier attempt was ended while it moved the complete data set
                remove_notes(out)
            else:
                if check_disk:
                    nbytes = _input_bytes(parts, inputs)
                    staging.check_room(nbytes, _most_bytes(nbytes, workers, settings.shard_bytes))
                with StageRunner(runner, workers, runner_options, runner_timeout, staging.directory) as stages:
                    steps = _Steps(staging, parts, settings, stages)
                    steps.read()
                    say(f"read: {len(steps.facts)} records passed the filters")
                    steps.check_some_are_left()
                    for reason in (Reason.SAME_ID, Reason.EXACT, Reason.NEAR):
                        steps.compare(reason)
                    steps.split()
                    if settings.vision:
                        steps.ask(staging.beside("answers"))
                    steps.check_some_are_left()
                    steps.write(out, source)
                write_index(out)
            counts = {split: entry["records"] for split, entry in read_index(out)["splits"].items()}
            staging.finish()
    return counts


def _real(path: PathLike) -> str:
    return str(path) if is_remote(path) else os.path.realpath(path)


def _check_apart(inputs: Sequence[str], output: pathlib.Path) -> None:
    """Raises UserError if the output is below an input."""
    for path in map(resolve, inputs):
        if f"{_real(output)}/".startswith(f"{_real(path)}/"):
            raise UserError(
                f"{output} lies below {path}, and would be taken for a part of it when the same command resumes; "
                f"give a directory beside it"
            )


def _input_bytes(parts: Sequence[Part], inputs: Sequence[PathLike]) -> int:
    """Returns the size of the files that parts read, each counted once.

    Images beside a list count if its directory was given, not the list alone; loose images in a bucket do not.
    """
    files = {file for part in parts for file in part.files}
    given = [f"{_real(path)}/" for path in (*inputs, *filter(None, (part.options.get("root") for part in parts)))]
    above = {_real(file) for file in files if not is_remote(file) and os.path.isdir(file)}
    above = {path for path in above if f"{path}/".startswith(tuple(given))}
    above = {path for path in above if not any(path.startswith(f"{other}/") for other in above)}
    total = sum(
        os.lstat(os.path.join(directory, name)).st_size
        for path in above
        for directory, _, names in os.walk(path)
        for name in names
    )
    below = tuple(f"{path}/" for path in above)
    rest = (resolve(file) for file in files if is_remote(file) or not os.path.isdir(file))
    return total + sum(size(path) for path in rest if not _real(path).startswith(below))


def _most_bytes(inputs: int, workers: int, shard_bytes: int) -> int:
    """Returns how much space `inputs` bytes of images take up at most, staged and in shards."""
    # Facts, and records in buckets of which not all shards are written yet; and the shards in work.
    return inputs * 11 // 10 + min(inputs, (workers + 1) * shard_bytes)


def _stamps(part: Part) -> list[Any]:
    """Returns the stamps of a part's files; directories, in which some parts look up names, have no size or time."""
    return [[str(path), 0, 0] if path.is_dir() else stamp(path) for path in map(resolve, part.files)]


class _Steps:
    """The stages of one job, and the verdicts on its records so far."""

    def __init__(self, staging: Staging, parts: Sequence[Part], settings: Settings, stages: StageRunner) -> None:
        self._directory = directory = staging.directory
        self._parts, self._settings, self._stages, self._left_report = parts, settings, stages, staging.report
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
        """Raises UserError if no record remains, and leaves the report."""
        if (self.verdicts == 0).any():
            return
        files.remove_directory(self._left_report)
        self._report(self._left_report)
        total = sum(count(self.facts, self.verdicts, 0.0).values(), collections.Counter[str]())
        read = total.pop("read", 0)
        examples = first_examples(self._left_report)
        reasons = "; ".join(f"{number} {reason} ({examples[reason]})" for reason, number in total.most_common())
        raise UserError(
            f"nothing is left of {read} records: {reasons or 'the data set is empty'}; leave out less, "
            f"{self._left_report / 'quarantine.jsonl'} names each"
        )

    def _report(self, directory: pathlib.Path) -> None:
        with files.new_directory(directory) as draft:
            write_report(draft, self.facts, self.verdicts, self.twins, self._settings.validation)

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
        """Writes the report and the shards, and deletes staged records as soon as they are in all shards they go to."""
        settings, staged = self._settings, set(range(BUCKETS))
        if not (out / "report").exists():  # some records that it shows may be gone
            self._report(out / "report")
        plan = lay_out(self._directory, self.facts, self.verdicts, settings.validation, settings.shard_bytes)

        def after(left: Sequence[ShardTask]) -> None:
            done = staged.difference(*(task.buckets for task in left))
            give_back(self.facts.parts, done)
            staged.difference_update(done)

        self._stages.run("shards", write, shard_tasks(plan, self._directories, out, name), after=after)
