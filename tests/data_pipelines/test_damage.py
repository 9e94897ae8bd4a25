"""Every kind of damage is told by its reason, and written down once."""

import base64
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

from data_pipelines.damage import Damaged, Quarantine, check_image, check_record, read_quarantine
from data_pipelines.reasons import Reason
from data_pipelines.record import Record
from tests.data_pipelines.images import DAMAGE, encoded


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_by_its_reason(name: str) -> None:
    data, reason = DAMAGE[name]
    with pytest.raises(Damaged) as caught:
        check_image(data)
    assert caught.value.reason is reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_good_images_tell_their_size_upright(kind: str) -> None:
    assert check_image(encoded(kind=kind)) == (40, 30)
    turned = Image.Exif()
    turned[0x0112] = 6
    if kind in ("JPEG", "PNG", "WEBP"):
        assert check_image(encoded(kind=kind, exif=turned)) == (30, 40)


def test_a_record_says_which_of_its_images_is_broken() -> None:
    good = Record(id="1", dataset="d", source=encoded(), target=encoded((50, 30)), instructions=("do it",))
    assert check_record(good) == (40, 30)
    for fields, said in (
        ({"target": encoded()[:700]}, "cut short: target: "),
        ({"source": b""}, "empty file: source"),
        ({"instructions": (" ",)}, "empty instruction"),
    ):
        with pytest.raises(Damaged, match=f"^{said}"):
            check_record(Record(**(vars(good) | fields)))


def test_quarantine_keeps_each_record_once_and_goes_on(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "bad.jsonl"
    with Quarantine(path) as first:
        first.add(id="1", dataset="d", reason=Reason.BOMB, detail="9000 x 9000")
        first.add(id="2\u2028\x85", dataset="d", reason=Reason.SIZE)  # what else ends a line
        first.add(id="1", dataset="d", reason=Reason.BOMB)
        assert first.summary() == "2 too many pixels, 1 absurd size"
    path.write_bytes(path.read_bytes() + b'{"id": "cut')
    with Quarantine(path) as second:
        second.add(id="2\u2028\x85", dataset="d", reason=Reason.SIZE)
        second.add(id="2", dataset="e", reason="of another step")
        assert second.counts == {"absurd size": 1, "of another step": 1}
    assert [(line["dataset"], line["id"], line["reason"]) for line in read_quarantine(path)] == [
        ("d", "1", "too many pixels"), ("d", "2\u2028\x85", "absurd size"), ("e", "2", "of another step")
    ]  # fmt: skip


@pytest.mark.subprocess
def test_kinds_of_images_are_known_where_one_was_imported_before_the_others() -> None:
    data = base64.b64encode(encoded(kind="WEBP")).decode()
    code = (
        "import base64, PIL.PngImagePlugin; from data_pipelines.damage import check_image; "
        f"print(check_image(base64.b64decode('{data}')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(40, 30)"
