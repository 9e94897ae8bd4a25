"""Tars whose neighboring members belong together by the start of their names, up to the first dot."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from data_pipelines.sources.archives import Damage, group_parts, members
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat
from data_pipelines.sources.files import find, relative_name
from varedit_jax.errors import UserError

_IMAGES = ("jpg", "jpeg", "png", "webp")


def tar_source(name: str, license: str, convert: Callable[[str, Mapping[str, bytes]], Entry]) -> SourceFormat:
    """A data set of tars, a part each, whose groups are its records. `convert` gets an id, of the tar, and a group."""

    def parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
        archives = group_parts(find(inputs, "*.tar", "*.tar.gz", "*.tgz"))
        if not archives:
            raise UserError(f"there is no *.tar under {', '.join(inputs)}; give the tars of {name}")
        return [
            Part(source=name, name=relative_name(archive, inputs), files=tuple(files))
            for archive, files in archives.items()
        ]

    def read(part: Part) -> Iterator[Entry]:
        for item in groups(part.files, name):
            yield item if isinstance(item, Refused) else convert(f"{part.name}/{item[0]}", item[1])

    return SourceFormat(name=name, license=license, parts=parts, read=read)


def image(group: Mapping[str, bytes], side: str) -> bytes | None:
    """The image `side`.jpg of a group, or of another kind."""
    return next((group[f"{side}.{kind}"] for kind in _IMAGES if f"{side}.{kind}" in group), None)


def groups(files: Sequence[str], dataset: str) -> Iterator[tuple[str, dict[str, bytes]] | Refused]:
    """(key, file by what comes after the first dot of its name) of each group, and what was refused.

    The key is the path up to that dot. A group is as long as its members follow each other; one is in memory at a time.
    """
    current, group = "", dict[str, bytes]()
    for member in members(files):
        if isinstance(member, Damage):
            yield Refused(id=member.name, dataset=dataset, reason=member.reason, detail=member.detail)
            continue
        directory, _, name = member.name.rpartition("/")
        stem, _, kind = name.partition(".")
        key = f"{directory}/{stem}" if directory else stem
        if key != current and group:
            yield current, group
            group = {}
        current = key
        group[kind.lstrip(".").lower()] = member.data  # some names have two dots there
    if group:
        yield current, group
