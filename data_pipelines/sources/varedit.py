"""The VAREdit release's own training data: WebDataset tars with `src.jpg`, `tgt.jpg` and `txt` of each triple."""

from collections.abc import Iterator, Mapping, Sequence

from data_pipelines.sources.archives import group_parts
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat, make_entry
from data_pipelines.sources.files import find, relative_name
from data_pipelines.sources.webdataset import groups
from varedit_jax.errors import UserError

_NAME = "varedit"
_IMAGES = ("jpg", "jpeg", "png", "webp")


def tar_parts(source: str, inputs: Sequence[str]) -> list[Part]:
    """A part for each tar, whose records are all in it. Raises UserError if there is none."""
    archives = group_parts(find(inputs, "*.tar", "*.tar.gz", "*.tgz"))
    if not archives:
        raise UserError(f"there is no *.tar under {', '.join(inputs)}; give the tars of {source}")
    return [
        Part(source=source, name=relative_name(name, inputs), files=tuple(files)) for name, files in archives.items()
    ]


def image(group: Mapping[str, bytes], side: str) -> bytes | None:
    """The image `side`.jpg of a group, or of another kind."""
    return next((group[f"{side}.{kind}"] for kind in _IMAGES if f"{side}.{kind}" in group), None)


def _read(part: Part) -> Iterator[Entry]:
    for item in groups(part.files, _NAME):
        if isinstance(item, Refused):
            yield item
            continue
        key, group = item
        yield make_entry(
            id=f"{part.name}/{key}",  # keys are of a tar
            dataset=_NAME,
            source=image(group, "src"),
            target=image(group, "tgt"),
            instructions=[group.get("txt", b"").decode("utf-8", "replace")],
        )


SOURCE = SourceFormat(name=_NAME, license="", parts=lambda inputs, _: tar_parts(_NAME, inputs), read=_read)
