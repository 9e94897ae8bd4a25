"""The report on a data set: counts of records read, dropped by reason and kept, and samples of them.

    report/report.json       counts by data set: read, each reason, train, validation
    report/report.md         the same as a table
    report/quarantine.jsonl  one line per dropped record: id, data set, reason, detail
    report/samples.png       some records of each data set and reason, and some that were kept

The same records give the same bytes: no dates, no durations.
"""

import collections
import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.geometry import SIZES, pair_kinds
from data_pipelines.preparation.fingerprints import PARTLY_UNKNOWN, Facts
from data_pipelines.preparation.samples import EACH, SampleKeeper, read_samples
from data_pipelines.preparation.split import SPLITS, in_validation
from data_pipelines.preparation.staged import StagedRecords
from data_pipelines.reasons import Reason
from varedit_jax.contact_sheet import contact_sheet

_QUARANTINE = "quarantine.jsonl"
_LONGEST = 160  # characters of an example
_SHEET_ROWS = 40  # of the image sheet, to limit its length
_ORDER = [*map(str, Reason)]

Twins = Mapping[int, tuple[NDArray[np.int64], NDArray[np.int64]]]
Counts = dict[str, collections.Counter[str]]


def write_report(
    directory: pathlib.Path, facts: Facts, verdicts: NDArray[np.uint8], twins: Twins, validation: float
) -> None:
    """Writes the report of a data set.

    Args:
      directory: an empty one, to write to.
      facts: rows of the N records that passed the filters.
      verdicts: uint8 [N]; 0 for kept records, else 1 + index of the Reason.
      twins: by verdict, sorted numbers of dropped records, and of the records that they duplicate.
      validation: share of source images.
    """
    counts, unknown = count(facts, verdicts, validation), _partly_unknown(facts)
    text = json.dumps(_as_json(counts, unknown), indent=1, ensure_ascii=False) + "\n"
    (directory / "report.json").write_text(text, encoding="utf-8")
    text = _as_markdown(counts, sum(unknown.values()), _pairs(facts, verdicts))
    (directory / "report.md").write_text(text, encoding="utf-8")
    _write_quarantine(directory / _QUARANTINE, facts, verdicts, twins)
    _draw_samples(directory / "samples.png", facts, verdicts)


def first_examples(directory: pathlib.Path) -> dict[str, str]:
    """Returns data set, id and detail of the first record that left for each reason, from a report."""
    found: dict[str, str] = {}
    with (directory / _QUARANTINE).open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            if line["reason"] not in found:
                text = " ".join(f"{line['dataset']}/{line['id']}: {line['detail']}".split()).removesuffix(":")
                found[line["reason"]] = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return found


def count(facts: Facts, verdicts: NDArray[np.uint8], validation: float) -> Counts:
    """Returns counts by data set: "read", dropped for each reason, and kept in each split."""
    counts: Counts = collections.defaultdict(collections.Counter)
    names = []
    for part in facts.parts:
        scanned = json.loads(part.counts.read_text())
        names.append(scanned["datasets"])
        for dataset, some in scanned["counts"].items():
            counts[dataset].update(some)
    labels = [*SPLITS, *map(str, Reason)]
    for first, rows in facts.pieces():
        verdict = verdicts[first : first + len(rows)].astype(np.int64)
        split = in_validation(rows["original"], validation).astype(np.int64)
        label = np.where(verdict == 0, split, verdict + len(SPLITS) - 1)
        for dataset, name in enumerate(names[facts.place(first)[0]]):
            found = np.bincount(label[rows["dataset"] == dataset], minlength=len(labels))
            counts[name].update({labels[n]: int(found[n]) for n in np.flatnonzero(found)})
    return counts


def _pairs(facts: Facts, verdicts: NDArray[np.uint8]) -> collections.Counter[str]:
    """Returns how many kept records have sides of the same size, the same aspect, another aspect."""
    pairs: collections.Counter[str] = collections.Counter()
    for first, rows in facts.pieces():
        kept = rows[verdicts[first : first + len(rows)] == 0]
        pairs.update(pair_kinds(*(kept[name] for name in SIZES)))
        pairs["turned by EXIF"] += int(np.count_nonzero((kept["source_turn"] > 1) | (kept["target_turn"] > 1)))
    return pairs


def _reasons(counts: Counts) -> list[str]:
    """Returns the reasons that occur, in the order of the stages."""
    found = {name for some in counts.values() for name in some} - {"read", *SPLITS}
    return [*(name for name in _ORDER if name in found), *sorted(found.difference(_ORDER))]


def _partly_unknown(facts: Facts) -> collections.Counter[str]:
    """Returns how many instructions of each data set have letters that the text encoder does not know."""
    counts: collections.Counter[str] = collections.Counter()
    for part in facts.parts:
        counts.update(json.loads(part.counts.read_text()).get(PARTLY_UNKNOWN, {}))
    return counts


def _as_json(counts: Counts, unknown: Mapping[str, int]) -> dict[str, Any]:
    reasons = _reasons(counts)
    return {
        dataset: {
            "read": counts[dataset]["read"],
            **{split: counts[dataset][split] for split in SPLITS},
            **({PARTLY_UNKNOWN: unknown[dataset]} if unknown.get(dataset) else {}),
            "left": {name: counts[dataset][name] for name in reasons if counts[dataset][name]},
        }
        for dataset in sorted(counts)
    }


def _as_markdown(counts: Counts, unknown: int, pairs: collections.Counter[str]) -> str:
    names = sorted(counts)
    table = [("read", "read"), *((name, name) for name in _reasons(counts)), *((f"**{s}**", s) for s in SPLITS)]
    total: collections.Counter[str] = sum((counts[name] for name in names), collections.Counter())
    columns = [*((name, counts[name]) for name in names), *([("all", total)] if len(names) > 1 else [])]
    lines = ["# What came in, what left and why", ""]
    lines.append("| | " + " | ".join(name for name, _ in columns) + " |")
    lines.append("|---" * (len(columns) + 1) + "|")
    for title, name in table:
        lines.append(f"| {title} | " + " | ".join(f"{some[name]:,}" for _, some in columns) + " |")
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in pairs.items())
    lines += ["", f"Sides of the records that stayed: {kinds}. Training resizes a target to its source's size."]
    if unknown:
        lines += [
            "",
            f"Of the records that passed the filters, {unknown:,} have a {PARTLY_UNKNOWN}: the text encoder does "
            f"not know all of its letters.",
        ]
    lines += ["", "Each record that left is in `quarantine.jsonl` with what was found; `samples.png` shows some."]
    return "\n".join(lines) + "\n"


def _write_quarantine(path: pathlib.Path, facts: Facts, verdicts: NDArray[np.uint8], twins: Twins) -> None:
    with path.open("w", encoding="utf-8") as file:
        for index, part in enumerate(facts.parts):
            with part.left.open(encoding="utf-8") as lines:
                file.writelines(lines)
            start, end = facts.starts[index : index + 2]
            for number in (np.flatnonzero(verdicts[start:end]) + start).tolist():
                verdict = int(verdicts[number])
                detail = ""
                if verdict in twins:
                    numbers, others = twins[verdict]
                    detail = "of " + "/".join(facts.key(int(others[np.searchsorted(numbers, number)])))
                dataset, id = facts.key(number)
                line = {"id": id, "dataset": dataset, "reason": list(Reason)[verdict - 1], "detail": detail}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _draw_samples(path: pathlib.Path, facts: Facts, verdicts: NDArray[np.uint8]) -> None:
    keeper = SampleKeeper()
    for part in facts.parts:
        keeper.add(read_samples(part.samples))
    records = StagedRecords(facts)
    for verdict, name in enumerate(("stayed", *map(str, Reason))):
        # The first of each part are enough candidates.
        for start, end in zip(facts.starts[:-1], facts.starts[1:], strict=True):
            for number in (np.flatnonzero(verdicts[start:end] == verdict)[:EACH] + start).tolist():
                keeper.offer(records[number], name)
    samples = sorted(
        keeper, key=lambda sample: ((*_ORDER, "stayed").index(sample.reason), sample.dataset, sample.order)
    )
    if samples:
        # If there is not room for all, every group gets its first rows before any gets more.
        groups = itertools.groupby(range(len(samples)), lambda place: (samples[place].reason, samples[place].dataset))
        ranked = sorted((rank, place) for _, group in groups for rank, place in enumerate(group))
        rows = [samples[place].row() for place in sorted(place for _, place in ranked[:_SHEET_ROWS])]
        contact_sheet(rows, ["source", "target"], scale=1, heading="What left, why, and what stayed").save(path)
