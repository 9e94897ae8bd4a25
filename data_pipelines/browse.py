"""Writes a page of samples of a prepared data set that opens in any browser, without a server or a network.

    python -m data_pipelines.browse --input=data/omniedit --output=page     then open page/index.html

The page filters by data set, kind, split, size, score and words of the instruction; a click compares source and target.
"""

import itertools
import json
import pathlib
import random
from typing import Any

import numpy as np
from absl import flags

from data_pipelines.damage import Damaged, check_record
from data_pipelines.record import BrokenRecord
from data_pipelines.shards import Records, read_index
from data_pipelines.transforms import preview
from varedit_jax import command
from varedit_jax.images import orientation, upright_size
from varedit_jax.progress import Progress
from varedit_jax.storage.disk import explained
from varedit_jax.storage.files import new_directory
from varedit_jax.storage.paths import PathLike, resolve

_INPUT = command.DEFINE_path("input", None, "directory that prepare wrote", required=True)
_OUTPUT = command.DEFINE_path("output", None, "new directory for the page", required=True)
_CACHE = command.DEFINE_path("cache_directory", "", "for copies of shards, where --input is a bucket", local=True)
_SAMPLES = flags.DEFINE_integer("samples", 400, "records to show", lower_bound=1)
_SIDE = flags.DEFINE_integer("side", 384, "pixels of the long side of images on the page", lower_bound=16)
_SEED = flags.DEFINE_integer("seed", 0, "of the choice of records")

_TEMPLATE = pathlib.Path(__file__).parent / "page" / "browse.html"


def choose(records: Records, count: int, seed: int) -> list[int]:
    """Returns indices of `count` records, or all of them, spread evenly over the kinds of each data set."""
    groups: dict[tuple[int, int], list[int]] = {}
    kinds = np.asarray(records.columns.dataset).astype(np.int64) * len(records.columns.kinds) + records.columns.kind
    draw = random.Random(seed)
    for kind in np.unique(kinds).tolist():
        members = np.flatnonzero(kinds == kind)
        groups[kind] = members[draw.sample(range(len(members)), min(count, len(members)))].tolist()
    turns = itertools.zip_longest(*groups.values())
    chosen = (index for turn in turns for index in turn if index is not None)
    return sorted(itertools.islice(chosen, count))


def write_page(
    directory: PathLike,
    output: PathLike,
    *,
    samples: int = 400,
    side: int = 384,
    seed: int = 0,
    cache_directory: str = "",
) -> int:
    """Writes index.html and its images for the prepared data set in `directory`; returns the number of samples.

    Records that cannot be drawn are listed on the page with the reason. Raises UserError if `output` exists or cannot
    be written, or if `directory` holds no data set.
    """
    splits = {split: Records(directory, split, cache_directory) for split in read_index(directory)["splits"]}
    total = sum(map(len, splits.values()))
    entries: list[dict[str, Any]] = []
    broken: list[dict[str, str]] = []
    with explained("page", resolve(output)), new_directory(resolve(output)) as partial:
        (partial / "images").mkdir()
        for split, records in splits.items():
            share = max(1, round(samples * len(records) / max(total, 1)))
            for index in Progress(choose(records, share, seed), desc=split, unit="record", leave=False):
                try:
                    entries.append(_entry(partial, len(entries), records, index, side) | {"split": split})
                except (BrokenRecord, Damaged) as error:
                    name = {"id": records.id(index), "dataset": records.dataset(index)}
                    broken.append(name | {"split": split, "reason": str(error)})
        data = {"title": resolve(directory).name, "total": total, "samples": entries, "broken": broken}
        text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")  # no text may end the script
        page = _TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/null", text)
        (partial / "index.html").write_text(page, encoding="utf-8")
    return len(entries)


def _entry(page: pathlib.Path, number: int, records: Records, index: int, side: int) -> dict[str, Any]:
    """Writes the images of a record; returns its entry in the page's data."""
    record = records[index]
    seen = check_record(
        record, lambda _, image: (upright_size(image), orientation(image), preview(image, side, quality=85))
    )
    paths = {name: f"images/{number:05d}-{name}.jpg" for name in seen}
    for name, (_, _, data) in seen.items():
        (page / paths[name]).write_bytes(data)
    return {
        "id": record.id,
        "dataset": record.dataset,
        "kind": record.kind,
        "turn": record.turn,
        "instructions": record.instructions,
        "scores": dict(record.scores),
        "license": record.license,
        "sizes": {name: size for name, (size, _, _) in seen.items()},
        "turns": {name: turn for name, (_, turn, _) in seen.items()},
        **paths,
    }


def main(argv: list[str]) -> None:
    """Writes the page."""
    del argv
    count = write_page(
        _INPUT.value,
        _OUTPUT.value,
        samples=_SAMPLES.value,
        side=_SIDE.value,
        seed=_SEED.value,
        cache_directory=_CACHE.value,
    )
    print(f"{count} samples: open {resolve(_OUTPUT.value) / 'index.html'} in a browser")


if __name__ == "__main__":
    command.run(main)
