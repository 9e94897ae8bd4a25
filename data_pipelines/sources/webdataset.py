"""Tars whose neighboring members belong together by the start of their names, up to the first dot."""

from collections.abc import Iterator, Sequence

from data_pipelines.sources.archives import Damage, members
from data_pipelines.sources.entries import Refused


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
