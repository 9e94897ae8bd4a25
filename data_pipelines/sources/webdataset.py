"""WebDataset tars: neighboring members whose names are equal up to the first dot form a group."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from data_pipelines.sources.archives import Damage, group_parts, members
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat
from data_pipelines.sources.files import find, relative_name
from varedit_jax.errors import UserError

_IMAGES = ("jpg", "jpeg", "png", "webp")


def tar_source(name: str, license: str, convert: Callable[[str, Mapping[str, bytes]], Entry]) -> SourceFormat:
    """Returns the format of a data set of tars: groups are records, tars parts. `convert` gets an id and a group."""

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
    """Returns the image `side`.jpg of a group, or one with another suffix; None if there is none."""
    return next((group[f"{side}.{kind}"] for kind in _IMAGES if f"{side}.{kind}" in group), None)


def groups(files: Sequence[str], dataset: str) -> Iterator[tuple[str, dict[str, bytes]] | Refused]:
    """Yields (key, files by suffix after the first dot) of each group, and refusals.

    The key is the path up to that dot. Only adjacent members form a group; one group is in memory at a time.
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
        group[kind.lstrip(".").lower()] = member.data  # some names have two dots
    if group:
        yield current, group
