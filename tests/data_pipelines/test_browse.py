import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from data_pipelines import browse
from data_pipelines.browse import choose, write_page
from data_pipelines.record import Record
from data_pipelines.shards import Records, ShardWriter, shard_path, write_index
from tests.data_pipelines.browser import Browser
from tests.data_pipelines.preparation.corpus import edited, jpeg, photo
from varedit_jax.errors import UserError

EVIL = '</script><script>document.title = "taken"</script> "quoted" & <b>bold</b>'

LONG = ", and then some more" * 40


def _record(number: int) -> Record:
    image = photo(number, (60 + 4 * number, 100))
    return Record(
        id=f"n{number}",
        dataset=("omniedit", "magicbrush")[number % 3 == 0],
        source=jpeg(image),
        target=b"no image" if number == 11 else jpeg(edited(image).resize((70, 70)) if number == 2 else edited(image)),
        instructions=(EVIL,)
        if number == 0
        else (f"make edit number {number}{LONG * (number == 3)}", "another wording"),
        kind=("add", "remove", "")[number % 4 % 3],
        turn=number % 2,
        scores={"quality": number / 2} if number % 3 else {},
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("browse") / "made edits"
    for split, numbers in (("train", range(12)), ("validation", range(12, 16))):
        with ShardWriter(shard_path(directory / split, "made", 0, 1)) as writer:
            for number in numbers:
                writer.write(_record(number), (60 + 4 * number, 100))
    write_index(directory)
    return directory


@pytest.fixture(scope="module")
def page(prepared: pathlib.Path) -> pathlib.Path:
    output = prepared.parent / "page"
    assert write_page(prepared, output, side=64) == 15  # all but the one with a broken image
    return output


def _data(page: pathlib.Path) -> dict[str, Any]:
    found = re.search(
        r"^const \{title, total, samples, broken\} = (.*);$", (page / "index.html").read_text(), re.MULTILINE
    )
    assert found
    return json.loads(found[1])


def test_the_page_has_every_sample_with_small_images_and_nothing_from_elsewhere(page: pathlib.Path) -> None:
    data = _data(page)
    assert data["total"] == 16 and data["title"] == "made edits"
    assert [sample["id"] for sample in data["samples"]] == [f"n{number}" for number in range(16) if number != 11]
    assert {sample["split"] for sample in data["samples"]} == {"train", "validation"}
    [broken] = data["broken"]
    assert (broken["id"], broken["dataset"], broken["split"]) == ("n11", "omniedit", "train")
    assert "not an image" in broken["reason"]
    assert data["samples"][1]["sizes"] == {"source": [64, 100], "target": [64, 100]}
    assert data["samples"][2]["sizes"] == {"source": [68, 100], "target": [70, 70]}
    for sample in data["samples"]:
        with Image.open(page / sample["source"]) as source, Image.open(page / sample["target"]) as target:
            assert max(source.size) == max(target.size) == 64
    text = (page / "index.html").read_text()
    assert "://" not in text and EVIL not in text


def test_each_kind_of_each_data_set_is_shown_as_often_as_it_can_be(prepared: pathlib.Path) -> None:
    records = Records(prepared, "train")
    chosen = choose(records, 5, seed=0)
    groups = {(_record(number).dataset, _record(number).kind) for number in range(12)}
    assert len(groups) == 6 and len(chosen) == 5
    assert len({(_record(number).dataset, _record(number).kind) for number in chosen}) == 5
    assert choose(records, 100, seed=0) == list(range(12))
    assert choose(records, 5, seed=0) == chosen


def test_a_page_that_was_ended_leaves_nothing_and_one_without_a_place_is_told(
    prepared: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, where a directory should be"):
        write_page(prepared, tmp_path / "file" / "page")

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(browse, "_entry", end)
    with pytest.raises(KeyboardInterrupt):
        write_page(prepared, tmp_path / "page")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_page_is_not_written_over_another(prepared: pathlib.Path, page: pathlib.Path) -> None:
    with pytest.raises(UserError, match="exists; give a new directory"):
        write_page(prepared, page)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        missing = "needs the programs chromium and chromedriver"
        pytest.fail(f"{missing}, which .ci/run installs") if os.environ.get("CI") == "true" else pytest.skip(missing)
    with Browser(chromium, driver, tmp_path_factory.mktemp("profile"), (1280, 900)) as opened:
        yield opened


def _shown(browser: Browser) -> list[str]:
    return browser.run("return [...document.querySelectorAll('article p')].map(p => p.textContent)")


@pytest.mark.subprocess
def test_filters_work_in_a_browser(browser: Browser, page: pathlib.Path) -> None:
    browser.open(page / "index.html")
    assert len(_shown(browser)) == 15
    assert browser.run("return document.title") == "made edits"
    assert EVIL in _shown(browser)  # as text, which did nothing
    browser.run("""
        const images = [...document.querySelectorAll("article img")];
        images.forEach(image => { image.loading = "eager"; });
        return Promise.all(images.map(image => image.decode()));
    """)  # fails if one cannot be

    def texts(wanted: Any) -> list[str]:
        numbers = [number for number in range(16) if number != 11 and wanted(_record(number))]
        return [_record(number).instructions[0] for number in numbers]

    browser.click("#dataset button[data-value=magicbrush]")
    assert _shown(browser) == texts(lambda record: record.dataset == "magicbrush")
    browser.click("#kind button[data-value=add]")
    assert _shown(browser) == texts(lambda record: record.dataset == "magicbrush" and record.kind == "add")
    browser.click("#dataset button[data-value=magicbrush]")  # off again
    assert _shown(browser) == texts(lambda record: record.kind == "add")
    browser.click("#everything")
    assert len(_shown(browser)) == 15

    browser.click("#split button[data-value=validation]")
    assert _shown(browser) == texts(lambda record: int(record.id[1:]) >= 12)
    browser.click("#everything")
    browser.type("#words", "NUMBER 1")
    assert _shown(browser) == texts(lambda record: "number" in record.instructions[0] and "1" in record.id)
    browser.click("#everything")

    browser.click("#score option[value=quality]")
    scored = texts(lambda record: "quality" in record.scores)
    assert _shown(browser) == scored
    browser.run("document.querySelector('#least').value = 50; document.querySelector('form').oninput()")
    assert _shown(browser) == texts(lambda record: record.scores.get("quality", 0) >= 0.5 + 0.5 * (7 - 0.5))
    browser.click("#everything")
    browser.run("document.querySelector('#side').value = 90; document.querySelector('form').oninput()")
    assert _shown(browser) == texts(lambda record: min(60 + 4 * int(record.id[1:]), 100) >= 90)
    browser.type("#words", "nobody wrote this")
    assert browser.run("return document.querySelector('#none').textContent") == "No sample matches these filters."
    assert browser.errors() == []


@pytest.mark.subprocess
def test_what_is_of_no_use_is_hidden_long_texts_are_folded_and_differences_are_marked(
    browser: Browser, page: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    browser.open(page / "index.html")
    visible = "return [...document.querySelectorAll('{}')].map(e => e.offsetParent !== null)"
    assert browser.run(visible.format("#side-label, #score, #least-label")) == [True, True, False]  # in this order
    marks = browser.run("return [...document.querySelectorAll('article mark')].map(mark => mark.textContent)")
    assert marks == ["68 × 100 → 70 × 70"]
    heights = "return [...document.querySelectorAll('article p')].map(p => p.offsetHeight)"
    folded = browser.run(heights)[3]
    browser.click("article:nth-child(4) .more")
    assert browser.run(heights)[3] > 2 * folded
    browser.click("article:nth-child(4) .more")
    assert browser.run(heights)[3] == folded
    listed = browser.run("return [...document.querySelectorAll('#broken li')].map(li => li.textContent)")
    assert len(listed) == 1 and "omniedit/n11 (train): not an image" in listed[0]
    with ShardWriter(shard_path(tmp_path / "one" / "train", "one", 0, 1)) as writer:
        writer.write(_record(3), (72, 100))
    write_index(tmp_path / "one")
    write_page(tmp_path / "one", tmp_path / "page")
    browser.open(tmp_path / "page" / "index.html")  # controls for one sample would choose nothing
    assert browser.run(visible.format("#side-label, #score, #broken, .chips")) == [False] * 6
    assert browser.errors() == []


@pytest.mark.subprocess
def test_two_images_are_compared_in_a_browser(browser: Browser, page: pathlib.Path) -> None:
    browser.open(page / "index.html")
    browser.click("article:nth-child(2) > button")
    assert browser.run("return document.querySelector('dialog').open")
    assert browser.run("return document.querySelector('dialog p').textContent") == "make edit number 1"
    facts = browser.run("return document.querySelector('dialog dl').textContent")
    assert "another wording" in facts and "64 × 100 pixels" in facts and "quality 0.5" in facts
    assert browser.errors() == []
