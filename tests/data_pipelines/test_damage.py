"""Every kind of damage is told by its reason, and written down once."""

import base64
import contextlib
import dataclasses
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image

from data_pipelines.damage import Damaged, Quarantine, check_record
from data_pipelines.reasons import Reason
from data_pipelines.record import Record
from tests.data_pipelines.images import DAMAGE, encoded
from varedit_jax.images import load_image, upright_size
from varedit_jax.storage.jsonl import read_lines


def _record(**fields: Any) -> Record:
    good = Record(id="1", dataset="d", source=encoded(), target=encoded((50, 30)), instructions=("do it",))
    return dataclasses.replace(good, **fields)


def _size(side: str, image: Image.Image) -> tuple[int, int]:
    load_image(image)
    return upright_size(image)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_by_its_reason(name: str) -> None:
    data, reason = DAMAGE[name]
    for side in ("source", "target"):
        with pytest.raises(Damaged, match=f"^{reason}: {side}") as caught:
            check_record(_record(**{side: data}), _size)
        assert caught.value.reason is reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_good_images_tell_their_size_upright(kind: str) -> None:
    assert check_record(_record(source=encoded(kind=kind)), _size) == {"source": (40, 30), "target": (50, 30)}
    turned = Image.Exif()
    turned[0x0112] = 6
    if kind in ("JPEG", "PNG", "WEBP"):
        assert check_record(_record(source=encoded(kind=kind, exif=turned)), _size)["source"] == (30, 40)


def test_a_record_has_to_say_what_to_do() -> None:
    for instructions in ((), (" ",)):
        with pytest.raises(Damaged, match="^empty instruction$"):
            check_record(_record(instructions=instructions), _size)


def test_lack_of_memory_is_no_damage() -> None:
    def decode(side: str, image: Image.Image) -> None:
        image.load = lambda: (_ for _ in ()).throw(MemoryError)  # type: ignore[method-assign]
        load_image(image)

    with pytest.raises(MemoryError):
        check_record(_record(), decode)


def test_quarantine_keeps_each_record_once_and_goes_on(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "bad.jsonl"
    with contextlib.closing(Quarantine(path)) as first:
        first.add(id="1", dataset="d", reason=Reason.BOMB, detail="9000 x 9000")
        first.add(id="2\u2028\x85", dataset="d", reason=Reason.SIZE)  # what else ends a line
        first.add(id="1", dataset="d", reason=Reason.BOMB)
        assert first.summary() == "2 too many pixels, 1 absurd size"
    path.write_bytes(path.read_bytes() + b'{"id": "cut')
    with contextlib.closing(Quarantine(path)) as second:
        second.add(id="2\u2028\x85", dataset="d", reason=Reason.SIZE)
        second.add(id="2", dataset="e", reason="of another step")
        assert second.counts == {"absurd size": 1, "of another step": 1}
    assert [(line["dataset"], line["id"], line["reason"]) for line in read_lines(path)] == [
        ("d", "1", "too many pixels"), ("d", "2\u2028\x85", "absurd size"), ("e", "2", "of another step")
    ]  # fmt: skip


@pytest.mark.subprocess
def test_kinds_of_images_are_known_where_one_was_imported_before_the_others() -> None:
    data = base64.b64encode(encoded(kind="WEBP")).decode()
    code = (
        "import base64, io, PIL.PngImagePlugin; from varedit_jax.images import open_image; "
        f"print(open_image(io.BytesIO(base64.b64decode('{data}'))).size)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(40, 30)"
