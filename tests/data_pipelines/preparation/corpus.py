"""A manifest of made edits, of which some have to be left out, each for one reason."""

import io
import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.preparation.settings import Settings
from data_pipelines.reasons import Reason

SETTINGS = Settings(
    min_side=32, max_side=100, max_ratio=2, min_scores=(("quality", 5.0),), first_turn=True, min_change=8, near_bits=3,
    validation=0.3, shard_bytes=20_000
)  # fmt: skip


def photo(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Returns soft blots, different for each seed."""
    blots = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(blots).resize(size, Image.Resampling.BICUBIC)


def edited(image: Image.Image, level: int = 250) -> Image.Image:
    """Returns the image with a gray square."""
    image = image.copy()
    image.paste((level, level, level), (20, 10, 36, 26))
    return image


def jpeg(image: Image.Image, quality: int = 90, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


def write_corpus(directory: pathlib.Path, lists: int = 3) -> tuple[list[pathlib.Path], set[str], dict[str, str]]:
    """Writes images and lists; returns the lists, ids that stay, and why each other one leaves."""
    directory.mkdir(parents=True)
    values: list[dict[str, Any]] = []
    left: dict[str, str] = {}

    def add(id: str, source: bytes, target: bytes, instruction: str, reason: str = "", **fields: Any) -> None:
        for side, data in (("source", source), ("target", target)):
            (directory / f"{len(values)}-{side}.jpg").write_bytes(data)
        names = {side: f"{len(values)}-{side}.jpg" for side in ("source", "target")}
        values.append({"id": id, "instruction": instruction, **names, **fields})
        if reason:
            left[id] = reason

    for seed in range(20):
        image = photo(seed)
        kind = ("add", "remove")[seed % 2]
        scores = {"quality": 5 + seed % 5}
        add(f"good-{seed}", jpeg(image), jpeg(edited(image)), f"Edit {seed}!", kind=kind, scores=scores)
    image = photo(100)
    sound = jpeg(image), jpeg(edited(image))
    tiny, huge, long = (photo(seed, size) for seed, size in ((101, (31, 40)), (102, (101, 90)), (103, (80, 38))))
    add("small", jpeg(tiny), jpeg(tiny), "x", Reason.SMALL)
    add("large", jpeg(huge), jpeg(huge), "x", Reason.LARGE)
    add("long", jpeg(long), jpeg(long), "x", Reason.RATIO)
    add("poor", *sound, "x", Reason.SCORE, scores={"quality": 4.5})
    add("second", *sound, "x", Reason.TURN, turn=1)
    add("idle", jpeg(image, 95), jpeg(image, 90), "x", Reason.UNCHANGED)
    add("broken", sound[0], sound[1][:1000], "x", "cut short")
    add("silent", *sound, " ", "empty instruction")
    sides = [edited(photo(110 + number)) for number in range(4)]
    add("turned", jpeg(photo(110)), jpeg(sides[0].transpose(Image.Transpose.ROTATE_90)), "x", Reason.ASPECT)
    add("stretched", jpeg(photo(111, (90, 46))), jpeg(sides[1].resize((60, 50))), "x", Reason.ASPECT)
    add("square", jpeg(photo(112)), jpeg(sides[2].resize((60, 60))), "x")
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned counterclockwise, which gives what it was before
    add("by-exif", jpeg(photo(113)), jpeg(sides[3].transpose(Image.Transpose.ROTATE_270), exif=exif), "x")
    add("without-score", jpeg(photo(104)), jpeg(edited(photo(104))), "y")
    for name, quality, instruction in (("exact", 90, "Edit 3!"), ("near", 91, "edit 4")):
        image = photo(int(instruction.strip("!")[-1]))
        add(f"{name}-copy", jpeg(image, quality), jpeg(edited(image), quality), instruction)
    other_edit = photo(5)
    add("same-source", jpeg(other_edit), jpeg(edited(other_edit, 0)), "Another edit")
    files = []
    for index in range(lists):
        files.append(directory / f"list-{index}.jsonl")
        files[-1].write_text("".join(json.dumps(value) + "\n" for value in values[index::lists]))
    return files, {value["id"] for value in values} - left.keys(), left
