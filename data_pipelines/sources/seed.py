"""SEED-Data-Edit: automatic edits of Open Images and Unsplash, real edits, and sessions of several turns.

    auto_editing/openimages/{annotations,annotations_GPT4V}/split_0001.jsonl     {source,target}_images.tar.gz.part-aa
    auto_editing/unsplash/{annotations,annotations_GPT4V}/split_0001.jsonl       unsplash_images.tar.gz.part-aa
    real_editing/annotations/split_0001.jsonl                                    images/images.tar.gz
    multi_turn_editing/annotations/split_0001.jsonl                              images/multi_turn.tar.gz.part-aa

Each of the four is a part, since its archives are compressed as a whole; `join` reads them. Archives may be unpacked
where they lie, all or some. An instruction rewritten by GPT-4V precedes the original one. Each turn of a session is a
record, with the first image of the session as `original`.
"""

import itertools
import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.reasons import Reason
from data_pipelines.sources.archives import PATTERNS, group_parts
from data_pipelines.sources.entries import Entry, Part, Refused, SourceFormat, make_entry
from data_pipelines.sources.files import distinct, find, read_below, reading, safe_name
from data_pipelines.sources.instructions import wordings
from data_pipelines.sources.join import Found, Lost, Stream, Wanted, join
from data_pipelines.sources.lists import is_list, read_lines
from varedit_jax.errors import UserError
from varedit_jax.storage.paths import resolve

_NAME, _LICENSE = "seed", "CC-BY-NC-4.0"
_CORRUPT = tuple(f"20240330_315P_1323turns/Data/{number}/" for number in range(208, 213))
# Directories that annotations and archives name inconsistently; those in _TOP may have others above them.
_TOP = frozenset(("source_images", "target_images", "unsplash_images", "real_editing", "multi_turn_editing"))
_LISTS = ("annotations/*.jsonl", "annotations/*.jsonl.*")
_REWRITTEN = ("annotations_GPT4V/*.jsonl", "annotations_GPT4V/*.jsonl.*")
_SIDES = ("source_images", "target_images")
_ABOVE = _TOP | {"auto_editing", "openimages", "unsplash", "images", "multi_turn"}


def _parts(inputs: Sequence[str], options: Mapping[str, str]) -> list[Part]:
    lists = find(inputs, *_LISTS)
    directories = sorted({posixpath.dirname(posixpath.dirname(file)) for file in lists})
    if not directories:
        raise UserError(
            f"there is no annotations/*.jsonl under {', '.join(inputs)}; "
            f"give directories of SEED-Data-Edit as they were downloaded, annotations and archives"
        )
    distinct(directories)
    parts = []
    for directory in directories:
        archives, images = find([directory], *PATTERNS), _image_directories(directory)
        if not archives and not images:
            raise UserError(f"there is no *.tar.gz.part-* or *.tar.gz under {directory}; download the images too")
        lists = find([directory], *_LISTS, *_REWRITTEN)
        parts.append(Part(source=_NAME, name=posixpath.basename(directory), files=(*lists, *archives, *images)))
    return parts


def _image_directories(directory: str) -> list[str]:
    """Returns the directories that archives have been unpacked to, below the one of a part."""
    above = [directory]
    for path in above:
        with reading(path):
            above += [f"{path}/{name}" for name in sorted(_ABOVE) if (resolve(path) / name).is_dir()]
    return [path for path in above[1:] if _holds_images(path)]


def _holds_images(directory: str) -> bool:
    """Returns True unless nothing but archives, and directories with a name in _ABOVE, are in a directory."""
    with reading(directory):
        return any(".tar" not in path.name and path.name not in _ABOVE for path in resolve(directory).iterdir())


def _read(part: Part) -> Iterator[Entry]:
    lists = [file for file in part.files if is_list(file)]
    archives = group_parts([file for file in part.files if not is_list(file)])
    packed = {file for files in archives.values() for file in files}
    directories = [file for file in part.files if not is_list(file) and file not in packed]
    rewritten = _rewritten(file for file in lists if "annotations_GPT4V" in file)
    lists = [file for file in lists if "annotations_GPT4V" not in file]

    def annotations() -> Iterator[Wanted | Refused]:
        return itertools.chain.from_iterable(_annotations(part.name, file, rewritten) for file in lists)

    read = bytearray()  # 1 for each pair of which nothing is packed
    for item in annotations():
        if isinstance(item, Refused):
            yield item
        else:
            images = [_unpacked(directories, image) for image in item.images]
            read.append(not archives or Reason.MISSING not in images)
            if read[-1]:
                yield _entry(item.key, item.images, images)
    if archives:
        pairs = (item for item in annotations() if isinstance(item, Wanted))
        yield from _joined(archives, directories, (pair for pair, done in zip(pairs, read, strict=True) if not done))


def _joined(
    archives: Mapping[str, Sequence[str]], directories: Sequence[str], pairs: Iterable[Wanted]
) -> Iterator[Entry]:
    """Yields the records of pairs whose images are in archives, both or one of them."""

    def packed() -> Iterator[Wanted]:
        for pair in pairs:
            images = [image for image in pair.images if _unpacked(directories, image) is Reason.MISSING]
            yield Wanted(json.dumps([pair.key, pair.images]), tuple(images))

    for event in join(_streams(archives), packed()):
        if isinstance(event, (Found, Lost)):
            key, names = json.loads(event.key)
            images = [_unpacked(directories, name) for name in names]
            if isinstance(event, Found):
                arrived = iter(event.images)
                images = [next(arrived) if image is Reason.MISSING else image for image in images]
            yield _entry(key, names, images)
        else:
            yield Refused(id=event.name, dataset=_NAME, reason=event.reason, detail=event.detail)


def _unpacked(directories: Sequence[str], image: Sequence[Any]) -> bytes | Reason:
    """Returns an image (stream, name) from the directories of its side."""
    side, name = image
    own = [path for path in directories if posixpath.basename(path) == _SIDES[side]]
    return read_below(own or [path for path in directories if posixpath.basename(path) not in _SIDES], name)


def _entry(key: str, names: Sequence[Sequence[Any]], images: Sequence[bytes | Reason]) -> Entry:
    about = json.loads(key)
    lost = ", ".join(name for (_, name), image in zip(names, images, strict=True) if isinstance(image, Reason))
    for image in images:
        if isinstance(image, Reason):
            return Refused(id=about["id"], dataset=_NAME, reason=image, detail=lost)
    return make_entry(dataset=_NAME, source=images[0], target=images[1], license=_LICENSE, **about)


def _streams(archives: Mapping[str, Sequence[str]]) -> list[Stream]:
    """Returns streams of sources and targets; an archive with both is read at two positions at once."""
    sides = []
    for side in _SIDES:
        own = [files for name, files in archives.items() if posixpath.basename(name).startswith(side)]
        sides.append(Stream(own or list(archives.values()), _canonical))
    return sides


def _canonical(name: str) -> str:
    """Returns an image's name without the directories that may be above it."""
    pieces = name.split("/")
    start = next((place for place, piece in enumerate(pieces[:-1]) if piece in _TOP), 0)
    return "/".join(itertools.dropwhile(lambda piece: piece in _ABOVE, pieces[start:]))


def _rewritten(files: Iterator[str]) -> dict[tuple[Any, Any], str]:
    """Returns instructions rewritten by GPT-4V, by source and target; a small part of all."""
    found = {}
    for _, value in itertools.chain.from_iterable(read_lines(file, _NAME) for file in files):
        if not isinstance(value, Refused) and isinstance(value.get("instruction_new"), str):
            found[str(value.get("source_image")), str(value.get("target_image"))] = value["instruction_new"]
    return found


def _annotations(part: str, file: str, rewritten: Mapping[tuple[str, str], str]) -> Iterator[Wanted | Refused]:
    for place, value in read_lines(file, _NAME):
        if isinstance(value, Refused):
            yield value
            continue
        id = f"{part}/{place.replace('.jsonl:', '/')}"
        if "target_image" in value:
            pair = (value.get("source_image"), value["target_image"])
            instructions = [rewritten.get((str(pair[0]), str(pair[1]))), value.get("instruction")]
            yield _wanted(id, pair, instructions, turn=0, first=value.get("source_image"))
        else:
            yield from _turns(id, value)


def _turns(id: str, value: Mapping[str, Any]) -> Iterator[Wanted | Refused]:
    numbers = {int(match[1]): name for name in value if (match := re.fullmatch(r"edit_image_(\d+)", name))}
    if not numbers:
        yield Refused(id=id, dataset=_NAME, reason=Reason.ANNOTATION, detail="neither target_image nor edit_image_1")
    source, first = value.get("source_image"), value.get("source_image")
    for turn, number in enumerate(sorted(numbers)):
        target = value[numbers[number]]
        instruction = value.get(numbers[number].replace("edit_image", "instruction"))
        yield _wanted(f"{id}/{turn}", (source, target), [instruction], turn, first, one=True)
        source = target


def _wanted(
    id: str, pair: tuple[Any, Any], instructions: list[Any], turn: int, first: Any, one: bool = False
) -> Wanted | Refused:
    """Returns a pair to join; with `one`, both are in the same stream, since neighboring turns share images."""
    names = [safe_name(name) for name in pair]
    start = safe_name(first)
    if names[0] is None or names[1] is None or start is None:
        reason = Reason.UNSAFE if all(isinstance(name, str) and name for name in (*pair, first)) else Reason.MISSING
        return Refused(id=id, dataset=_NAME, reason=reason, detail=f"{pair[0]!r}, {pair[1]!r}"[:200])
    canonical = [_canonical(str(name)) for name in names]
    if any(name.startswith(_CORRUPT) for name in (*canonical, _canonical(start))):
        return Refused(id=id, dataset=_NAME, reason=Reason.CORRUPT, detail=canonical[1])
    texts, fault = wordings(instructions)
    if not texts:
        return Refused(id=id, dataset=_NAME, reason=Reason.INSTRUCTION, detail=fault)
    about = {"id": id, "instructions": texts, "turn": turn, "original": _canonical(start)}
    sides = (0, 0) if one else (int(str(names[0]).startswith("target_images/")), _side_of_target(str(names[1])))
    return Wanted(json.dumps(about), ((sides[0], canonical[0]), (sides[1], canonical[1])))


def _side_of_target(name: str) -> int:
    """Returns the stream that has a target. Reversed edits have their target among the sources."""
    return 0 if name.startswith("source_images/") else 1


SOURCE = SourceFormat(name=_NAME, license=_LICENSE, parts=_parts, read=_read)
