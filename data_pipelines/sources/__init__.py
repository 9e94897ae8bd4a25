"""Public data sets of edit triples, read as they are downloaded, without unpacking anything to disk.

    for part in find_parts("ultraedit", ["downloads/UltraEdit"]):    # cheap; each can go to another process
        for entry in read_part(part):                                # a stream
            ...                                                      # Record, or Refused with a reason

A source is a file here with a `SOURCE`; SOURCES has them by name. Every triple that a data set lists comes back exactly
once, as a Record or as Refused, and in the same order every time. Names in archives and lists that lead out of their
directory are refused, and never used as a path. Images are not decoded here.

What is in memory at a time is one triple, and beside it what a source's own text says:

 - tables: a group of rows, as the publisher made them
 - tars whose neighbors belong together (varedit, x2edit): one group
 - uncompressed archives of which a table names the members (imgedit): where each member of an archive lies
 - compressed archives that lists name the members of (seed, gpt_image_edit, packed files of pico_banana): `join`, with
   bounds in memory and in temporary files
"""

from collections.abc import Iterator, Mapping, Sequence

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
    tfds,
    ultraedit,
    varedit,
    x2edit,
)  # fmt: skip
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat
from data_pipelines.sources.files import ReadError
from varedit_jax.errors import UserError
from varedit_jax.storage.paths import PathLike, resolve

__all__ = ["SOURCES", "Entry", "Part", "Refused", "SourceFormat", "find_parts", "read", "read_part"]

SOURCES: dict[str, SourceFormat] = {
    module.SOURCE.name: module.SOURCE
    for module in (
        seed, imgedit, ultraedit, magicbrush, instruct_pix2pix, omniedit, gpt_image_edit, nhr_edit, x2edit, pico_banana,
        varedit, manifest, tfds
    )
}  # fmt: skip


def find_parts(source: str, inputs: Sequence[PathLike], options: Mapping[str, str] = {}) -> list[Part]:
    """Parts of a data set, in order: each is read on its own, and its name stays the same from run to run.

    Raises UserError for an unknown source or option, and where nothing of the format is found.
    """
    if source not in SOURCES:
        raise UserError(f"unknown source {source!r}; known are {', '.join(SOURCES)}")
    known = SOURCES[source].options
    options = options or {}
    for name in options:
        if name not in known:
            raise UserError(f"{source} has no option {name!r}; it has {', '.join(known) or 'none'}")
    try:
        return SOURCES[source].parts([str(resolve(path)) for path in inputs], options)
    except ReadError as error:
        raise UserError(str(error)) from error


def read_part(part: Part) -> Iterator[Entry]:
    """Entries of a part, in the same order every time.

    Raises UserError if its files are of another format, or cannot be read for a reason that is not in them.
    """
    try:
        yield from SOURCES[part.source].read(part)
    except ReadError as error:
        raise UserError(str(error)) from error


def read(source: str, inputs: Sequence[PathLike], options: Mapping[str, str] = {}) -> Iterator[Entry]:
    """Entries of all parts, one after the other."""
    for part in find_parts(source, inputs, options):
        yield from read_part(part)
