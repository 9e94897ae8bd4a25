"""Small data sets in exactly the layouts of public ones, made by code.

Each function writes one below a directory and returns what has to come out of it: records by their ids, and reasons by
the ids or names of what is refused. Each image is drawn for a name, so that one in the wrong place is noticed.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """The expected record."""

    source: str  # name that its image was drawn for
    target: str
    instructions: tuple[str, ...]
    kind: str = ""
    turn: int = 0
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    original: str = ""
    mask: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Download:
    """A data set on disk and what it holds."""

    inputs: list[pathlib.Path]
    records: dict[str, Expected]
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # reason by id
    options: dict[str, str] = dataclasses.field(default_factory=dict)


def draw(name: str, kind: str = "JPEG") -> bytes:
    """Returns an image file of 24 x 16 pixels, distinct for each name and not a near-duplicate of others."""
    noise = PIL.Image.frombytes("RGB", (6, 4), hashlib.shake_256(name.encode()).digest(6 * 4 * 3))
    data = io.BytesIO()
    noise.resize((24, 16), PIL.Image.Resampling.NEAREST).save(data, kind)
    return data.getvalue()


def tar(files: Sequence[tuple[str, bytes]], mode: str = "w", evil: Sequence[str] = ()) -> bytes:
    """A tar of files; `evil` are names of members that must be refused, put in front."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:
        for name in evil:
            info = tarfile.TarInfo(name)
            if name == "link.jpg":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(info)
            else:
                info.size = 4
                archive.addfile(info, io.BytesIO(b"evil"))
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return data.getvalue()


def split(path: pathlib.Path, data: bytes, parts: int, name: str) -> None:
    """Writes data as files `path` + `name` formatted with each part's number, cut anywhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = -(-len(data) // parts)
    for number in range(parts):
        letters = chr(ord("a") + number // 26) + chr(ord("a") + number % 26)
        file = path.with_name(path.name + name.format(number=number, letters=letters))
        file.write_bytes(data[number * size : (number + 1) * size])


def lines(path: pathlib.Path, values: Sequence[Any]) -> None:
    """A JSONL file; text is a line as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values))


def table(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path, row_group_size=2)


def arrow(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A stream of Arrow batches of two rows, with what `datasets.save_to_disk` writes beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = pa.Table.from_pylist([dict(row) for row in rows])
    with path.open("wb") as file, pa.ipc.new_stream(file, made.schema) as stream:
        stream.write_table(made, max_chunksize=2)
    (path.parent / "state.json").write_text(json.dumps({"_data_files": [{"filename": path.name}], "_split": "train"}))
    (path.parent / "dataset_info.json").write_text("{}")


def embedded(name: str) -> dict[str, Any]:
    """An image as tables hold it."""
    return {"bytes": draw(name), "path": f"{name}.jpg"}


def ultraedit(directory: pathlib.Path) -> Download:
    scores = {"clip_sim_source": 0.5, "clip_sim_target": 0.25, "clip_sim_dir": 0.125, "clip_sim_image": 0.75}
    scores |= {"dinov2_sim": 0.875, "ssim": 0.625}

    def row(index: int, **more: Any) -> dict[str, Any]:
        return scores | {
            "source_caption": "a", "target_caption": "b", "idx": index, "edit_prompt": f" edit {index} ",
            "source_image": embedded(f"s{index}"), "edited_image": embedded(f"t{index}"), **more
        }  # fmt: skip

    masks = [{"edit_object": "cat", "mask_image": embedded("m0")}, {"edit_object": "", "mask_image": None}]
    table(directory / "data" / "FreeForm_0-00000-of-00002.parquet", [row(i, **mask) for i, mask in enumerate(masks)])
    bad = [row(0), row(1, edit_prompt="  "), row(2, source_image={"bytes": None, "path": "x"}), row(3, ssim=None)]
    table(directory / "data" / "FreeForm_1-00000-of-00002.parquet", bad)
    (directory / "data" / "FreeForm_2-00000-of-00001.parquet").write_bytes(b"PAR1 but cut short")

    def record(index: int, **more: Any) -> Expected:
        instructions = (f"edit {index}",)
        return Expected(
            **{"source": f"s{index}", "target": f"t{index}", "instructions": instructions, "scores": scores} | more
        )

    return Download(
        inputs=[directory],
        records={
            "FreeForm_0/0": record(0, mask="m0"),
            "FreeForm_0/1": record(1),
            "FreeForm_1/0": record(0),
            "FreeForm_1/3": record(3, scores={name: value for name, value in scores.items() if name != "ssim"}),
        },
        refused={
            "data/FreeForm_0-*-of-00002.parquet": "file not there",
            "data/FreeForm_1-*-of-00002.parquet": "file not there",
            "FreeForm_1/1": "empty instruction",
            "FreeForm_1/2": "missing image",
            "data/FreeForm_2-00000-of-00001.parquet": "damaged archive",
        },
    )


def magicbrush(directory: pathlib.Path) -> Download:
    rows = [
        {
            "img_id": image, "turn_index": turn, "source_img": embedded(f"{image}-{turn - 1}"),
            "mask_img": embedded("m"), "instruction": f"edit {image} {turn}", "target_img": embedded(f"{image}-{turn}"),
        }
        for image, turn in (("242679", 1), ("242679", 2), ("118", 1))
    ]  # fmt: skip
    table(directory / "data" / "train-00000-of-00002.parquet", rows[:2])
    table(
        directory / "data" / "train-00001-of-00002.parquet", [*rows[2:], rows[0] | {"img_id": "9", "instruction": None}]
    )
    return Download(
        inputs=[directory],
        records={
            f"{image}-{turn}": Expected(
                source=f"{image}-{turn - 1}",
                target=f"{image}-{turn}",
                instructions=(f"edit {image} {turn}",),
                turn=turn - 1,
                original=image,
                mask="m",
            )
            for image, turn in (("242679", 1), ("242679", 2), ("118", 1))
        },
        refused={"9-1": "empty instruction"},
    )


def omniedit(directory: pathlib.Path) -> Download:
    row = {
        "omni_edit_id": "task_obj_add_1", "task": "addition", "src_img": embedded("s"), "edited_img": embedded("t"),
        "edited_prompt_list": ["add a cat", "put a cat there", "add a cat"], "width": 24, "height": 16, "sc_score_1": 9,
        "sc_score_2": 8, "sc_reasoning": "good", "pq_score": 7, "pq_reasoning": "fine", "o_score": 7.5,
    }  # fmt: skip
    rows = [row, row | {"omni_edit_id": "x", "edited_prompt_list": []}]
    table(directory / "data" / "train-00000-of-00001.parquet", rows)
    return Download(
        inputs=[directory],
        records={
            "task_obj_add_1": Expected(
                source="s",
                target="t",
                instructions=("add a cat", "put a cat there"),
                kind="addition",
                scores={"sc_score_1": 9.0, "sc_score_2": 8.0, "pq_score": 7.0, "o_score": 7.5},
            )
        },
        refused={"x": "empty instruction"},
    )


def instruct_pix2pix_tables(directory: pathlib.Path) -> Download:
    rows = [
        {
            "original_prompt": "a", "original_image": embedded(f"s{i}"), "edit_prompt": f"edit {i}",
            "edited_prompt": "b", "edited_image": embedded(f"t{i}"),
        }
        for i in range(3)
    ]  # fmt: skip
    table(directory / "data" / "train-00000-of-00001.parquet", rows)
    return Download(
        inputs=[directory / "data"],
        records={
            f"train-00000-of-00001/{i}": Expected(source=f"s{i}", target=f"t{i}", instructions=(f"edit {i}",))
            for i in range(3)
        },
    )


def _pix2pix_files() -> tuple[list[Any], dict[str, bytes]]:
    seeds = [["0000000", ["11", "22"]], ["0000001", ["33"]], ["../up", ["1"]], ["0000002", ["44"]]]
    files: dict[str, bytes] = {}
    for name, own in seeds[:2] + seeds[3:]:
        files[f"{name}/prompt.json"] = json.dumps({"caption": "a", "edit": f"edit {name}", "output": "b"}).encode()
        files[f"{name}/metadata.jsonl"] = b"".join(
            json.dumps({"seed": int(seed), "clip_sim_0": 0.5, "clip_sim_1": 0.25}).encode() + b"\n" for seed in own
        )
        for seed in own:
            files |= {f"{name}/{seed}_{side}.jpg": draw(f"{seed}_{side}") for side in (0, 1)}
    del files["0000002/44_1.jpg"]
    return seeds, files


def _pix2pix_layout(directory: pathlib.Path) -> Download:
    return Download(
        inputs=[directory],
        records={
            f"{name}/{seed}": Expected(
                source=f"{seed}_0",
                target=f"{seed}_1",
                instructions=(f"edit {name}",),
                scores={"clip_sim_0": 0.5, "clip_sim_1": 0.25},
                original=name,
            )
            for name, seed in (("0000000", "11"), ("0000000", "22"), ("0000001", "33"))
        },
        refused={"0000002/44": "missing image", "seeds.json: ['../up', ['1']]": "unsafe name"},
    )


def instruct_pix2pix_directories(directory: pathlib.Path) -> Download:
    seeds, files = _pix2pix_files()
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    (directory / "seeds.json").write_text(json.dumps(seeds))
    return _pix2pix_layout(directory)


def instruct_pix2pix_zips(directory: pathlib.Path) -> Download:
    seeds, files = _pix2pix_files()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "seeds.json").write_text(json.dumps(seeds[:2] + seeds[3:]))
    for number, names in enumerate((("0000000",), ("0000001", "0000002"))):
        with zipfile.ZipFile(directory / f"shard-{number:02d}.zip", "w") as archive:
            for name, data in files.items():
                if name.startswith(names):
                    archive.writestr(f"clip-filtered-dataset/{name}", data)
    layout = _pix2pix_layout(directory)
    return dataclasses.replace(layout, refused={"0000002/44": "missing image"})


def varedit(directory: pathlib.Path) -> Download:
    def group(key: str) -> list[tuple[str, bytes]]:
        return [
            (f"{key}.src.jpg", draw(f"s{key}")),
            (f"{key}.tgt.jpg", draw(f"t{key}")),
            (f"{key}.txt", b"edit %s\n" % key.encode()),
        ]

    directory.mkdir(parents=True, exist_ok=True)
    evil = ["../../evil.src.jpg", "/etc/evil.src.jpg", "link.jpg"]
    (directory / "00000.tar").write_bytes(tar(group("000") + group("001")[:1] + group("002"), evil=evil))
    whole = tar(group("000") + group("001"))
    (directory / "00001.tar").write_bytes(whole[: whole.index(draw("t001")) + 100])
    return Download(
        inputs=[directory],
        records={
            f"{shard}.tar/{key}": Expected(source=f"s{key}", target=f"t{key}", instructions=(f"edit {key}",))
            for shard, key in (("00000", "000"), ("00000", "002"), ("00001", "000"))
        },
        refused={
            "../../evil.src.jpg": "unsafe name",
            "/etc/evil.src.jpg": "unsafe name",
            "link.jpg": "unsafe name",
            "00000.tar/001": "missing image",
            "00001.tar": "damaged archive",
            "00001.tar/001": "missing image",
        },
    )


def x2edit(directory: pathlib.Path) -> Download:
    def group(key: str, about: Any, dot: str = ".", mask: bool = False) -> list[tuple[str, bytes]]:
        files = [(f"{key}{dot}1.0.jpg", draw(f"s{key}"))]
        files += [(f"{key}{dot}1.1.jpg", draw(f"m{key}"))] if mask else []
        files += [(f"{key}{dot}2.jpg", draw(f"t{key}"))]
        return [*files, (f"{key}.json", json.dumps(about).encode()), (f"{key}.txt", f"text {key}".encode())]

    step = {
        "instruction": "edit a",
        "instruction_zh": "改",
        "task": "文字更改",
        "score_7b": "[4, 5]",
        "liqe_score": 3.5,
    }
    path = directory / "X2Edit_data" / "step1x" / "0" / "1.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(tar(group("a", step, mask=True) + group("b", {"label": "gpt4o"}, dot="..") + group("c", [])[:1]))
    name = "X2Edit_data/step1x/0/1.tar"
    return Download(
        inputs=[directory],
        records={
            f"{name}/a": Expected(
                source="sa",
                target="ta",
                instructions=("edit a", "text a"),
                kind="文字更改",
                scores={"score_7b_0": 4.0, "score_7b_1": 5.0, "liqe_score": 3.5},
                mask="ma",
            ),
            f"{name}/b": Expected(source="sb", target="tb", instructions=("text b",), kind="gpt4o"),
        },
        refused={f"{name}/c": "missing image"},
    )


def any_table(directory: pathlib.Path) -> Download:
    """HQ-Edit's columns, in Parquet and as `datasets.save_to_disk` writes them."""

    def rows(*numbers: int) -> list[dict[str, Any]]:
        return [
            {
                "input": f"a thing {i}",
                "input_image": embedded(f"s{i}"),
                "edit": f"turn it into {i}",
                "output_image": embedded(f"t{i}"),
            }
            for i in numbers
        ]

    table(directory / "data" / "train-00000-of-00001.parquet", [*rows(0, 1), rows(2)[0] | {"edit": "nan"}])
    for number in (0, 1):
        arrow(directory / "saved" / "train" / f"data-{number:05d}-of-00002.arrow", rows(3 + 2 * number, 4 + 2 * number))
    arrow(directory / "saved" / "test" / "data-00000-of-00001.arrow", rows(9))
    arrow(directory / "saved" / "train" / "cache-0123abcd.arrow", rows(10))
    ids = {f"train-00000-of-00001/{i}": i for i in (0, 1)}
    ids |= {f"saved/train/data-{i:05d}-of-00002/{row}": 3 + 2 * i + row for i in (0, 1) for row in (0, 1)}
    return Download(
        inputs=[directory],
        options={"source": "input_image", "target": "output_image", "instruction": "edit", "dataset": "hq_edit"},
        records={
            id: Expected(source=f"s{i}", target=f"t{i}", instructions=(f"turn it into {i}",)) for id, i in ids.items()
        },
        refused={
            "train-00000-of-00001/2": "empty instruction",
            "saved/test/data-00000-of-00001.arrow": "another split",
        },
    )
