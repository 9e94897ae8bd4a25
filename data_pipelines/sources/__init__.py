"""Public data sets of edit triples, read as downloaded, without unpacking to disk.

    for part in find_parts("ultraedit", ["downloads/UltraEdit"]):    # cheap; parts can go to different processes
        for entry in read_part(part):                                # a stream
            ...                                                      # Record, or Refused with a reason

A source is a module here with a `SOURCE`; SOURCES has them by name. Every triple that a data set lists is yielded
exactly once, as Record or Refused, always in the same order. Names in archives and lists that lead out of their
directory are refused and never used as a path. Images are not decoded here.

One triple is in memory at a time, and in addition:

 - tables: a row group, as published
 - tars whose triples are neighboring members (varedit, x2edit): a triple, and names in 4 GiB of the archive
 - uncompressed archives whose members are named by a table (imgedit): offsets of all members
 - compressed archives whose members are named by lists (seed, gpt_image_edit, packed files of pico_banana): `join`,
   with bounds in memory and in temporary files
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from data_pipelines.sources import (
    gpt_image_edit,
    imgedit,
    instruct_pix2pix,
    magicbrush,
    manifest,
    nhr_edit,
    omniedit,
    pico_banana,
    seed,
    table,
    tfds,
    ultraedit,
    varedit,
    x2edit,
)  # fmt: skip
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat
from data_pipelines.sources.files import ReadError
from data_pipelines.sources.search import check_splits, searching, sentences
from varedit_jax.errors import UserError
from varedit_jax.storage.paths import PathLike, resolve

__all__ = ["SOURCES", "Entry", "Part", "Refused", "SourceFormat", "find_parts", "read", "read_part", "sentences"]

SOURCES: dict[str, SourceFormat] = {
    module.SOURCE.name: module.SOURCE
    for module in (
        seed, imgedit, ultraedit, magicbrush, instruct_pix2pix, omniedit, gpt_image_edit, nhr_edit, x2edit, pico_banana,
        varedit, manifest, table, tfds
    )
}  # fmt: skip


def find_parts(
    source: str, inputs: Sequence[PathLike], options: Mapping[str, str] = {}, splits: Iterable[str] = ("train",)
) -> list[Part]:
    """Returns the parts of a data set, in order: each is read independently, and its name is the same in every run.

    Files whose names say that they are of other splits than `splits` are left out; "all" takes them too.

    Raises UserError for an unknown source, option or split, and if nothing of the format is found.
    """
    if source not in SOURCES:
        raise UserError(f"unknown source {source!r}; known are {', '.join(SOURCES)}")
    known = SOURCES[source].options
    options = options or {}
    for name in options:
        if name not in known:
            raise UserError(f"{source} has no option {name!r}; it has {', '.join(known) or 'none'}")
    with searching(source, check_splits(splits)) as search:
        try:
            parts = SOURCES[source].parts([str(resolve(path)) for path in inputs], options)
        except ReadError as error:
            raise UserError(str(error)) from error
        except UserError as error:
            raise UserError("; ".join([str(error), *sentences(search.left_out.values())])) from error
    if parts:
        parts[0] = dataclasses.replace(parts[0], left_out=tuple(search.left_out.values()))
    return parts


def read_part(part: Part) -> Iterator[Entry]:
    """Yields the entries of a part, always in the same order, behind what was left out when it was found.

    Raises UserError if its files have another format, or if the machine cannot read them.
    """
    yield from part.left_out
    try:
        yield from SOURCES[part.source].read(part)
    except ReadError as error:
        raise UserError(str(error)) from error


def read(
    source: str, inputs: Sequence[PathLike], options: Mapping[str, str] = {}, splits: Iterable[str] = ("train",)
) -> Iterator[Entry]:
    """Yields the entries of all parts, in order."""
    for part in find_parts(source, inputs, options, splits):
        yield from read_part(part)
