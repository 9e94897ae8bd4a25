"""Small data sets in the layouts of public ones whose lists and images lie apart; see `layouts`."""

import dataclasses
import json
import pathlib
import posixpath
from typing import Any

from data_pipelines.sources.archives import Member, group_parts, members
from tests.data_pipelines.sources.layouts import Download, Expected, draw, lines, split, table, tar


def seed_openimages(directory: pathlib.Path) -> Download:
    base = directory / "SEED-Data-Edit-Part1-Openimages" / "auto_editing" / "openimages"

    def pair(source: str, target: str, instruction: str) -> dict[str, str]:
        return {"source_image": source, "target_image": target, "instruction": instruction}

    pairs = [
        pair("source_images/0001/a.jpg", "target_images/0001/a_0.jpg", "edit a"),
        pair("source_images/0001/a.jpg", "target_images/0001/a_1.jpg", "edit a again"),
        # Added instead of removed: the images have changed sides.
        pair("target_images/0001/a_0.jpg", "source_images/0001/a.jpg", "undo a"),
        pair("source_images/0002/b.jpg", "target_images/0002/b_0.jpg", "edit b"),
        pair("source_images/0002/b.jpg", "target_images/0002/none.jpg", "edit b again"),
        pair("source_images/0002/b.jpg", "target_images/0002/b_0.jpg", "  "),
        pair("source_images/../../b.jpg", "target_images/0002/b_0.jpg", "edit"),
    ]
    lines(base / "annotations" / "split_0001.jsonl", pairs[:3])
    lines(base / "annotations" / "split_0002.jsonl", ["{not json", *pairs[3:], '"text"'])
    new = {"instruction_new": "edit a, but better", "response": "done"}
    lines(base / "annotations_GPT4V" / "split_0001.jsonl", [pairs[0] | new])
    sources = ["source_images/0001/a.jpg", "source_images/0002/b.jpg", "source_images/0003/unlisted.jpg"]
    targets = ["target_images/0002/b_0.jpg", "target_images/0001/a_1.jpg", "target_images/0001/a_0.jpg"]
    packed = tar([(name, draw(name)) for name in sources], "w:gz", evil=["../source_images/0002/b.jpg"])
    split(base / "source_images.tar.gz", packed, 3, ".part-{letters}")
    split(base / "target_images.tar.gz", tar([(name, draw(name)) for name in targets], "w:gz"), 2, ".part-{letters}")

    def record(number: int, *instructions: str) -> Expected:
        source, target = pairs[number]["source_image"], pairs[number]["target_image"]
        return Expected(source=source, target=target, instructions=instructions, original=source.split("_images/")[1])

    return Download(
        inputs=[directory / "SEED-Data-Edit-Part1-Openimages"],
        records={
            "openimages/split_0001/1": record(0, "edit a, but better", "edit a"),
            "openimages/split_0001/2": record(1, "edit a again"),
            "openimages/split_0001/3": record(2, "undo a"),
            "openimages/split_0002/2": record(3, "edit b"),
        },
        refused={
            "split_0002.jsonl:1": "damaged annotation",
            "openimages/split_0002/3": "missing image",
            "openimages/split_0002/4": "empty instruction",
            "openimages/split_0002/5": "unsafe name",
            "split_0002.jsonl:6": "damaged annotation",
            "../source_images/0002/b.jpg": "unsafe name",
        },
    )


def seed_unsplash(directory: pathlib.Path) -> Download:
    """Sources and targets in one archive, which has all of the one before any of the other."""
    base = directory / "auto_editing" / "unsplash"
    names = [(f"unsplash_images/source/{i}.jpg", f"unsplash_images/target/{i}.jpg") for i in range(4)]
    values = [{"source_image": s, "target_image": t, "instruction": f"edit {i}"} for i, (s, t) in enumerate(names)]
    lines(base / "annotations" / "split_0001.jsonl", values)
    files = [(name, draw(name)) for side in (0, 1) for name in (pair[side] for pair in names)]
    split(base / "unsplash_images.tar.gz", tar(files, "w:gz"), 2, ".part-{letters}")
    return Download(
        inputs=[directory],
        records={
            f"unsplash/split_0001/{i + 1}": Expected(
                source=source, target=target, instructions=(f"edit {i}",), original=f"source/{i}.jpg"
            )
            for i, (source, target) in enumerate(names)
        },
    )


def seed_real_and_multi_turn(directory: pathlib.Path) -> Download:
    real, multi = directory / "real_editing", directory / "multi_turn_editing"
    value = {"source_image": "x/1.png", "target_image": "x/1_edited.png", "instruction": "real edit"}
    lines(real / "annotations" / "split_0001.jsonl", [value])
    (real / "images").mkdir()
    files = [(f"images/{name}", draw(name)) for name in ("x/1_edited.png", "x/1.png")]
    (real / "images" / "images.tar.gz").write_bytes(tar(files, "w:gz"))

    above = "20240330_315P_1323turns/Data"
    good = {"source_image": f"{above}/207/0.jpg", "edit_image_1": f"{above}/207/1.jpg", "instruction_1": "first"}
    good |= {"edit_image_2": f"{above}/207/2.jpg", "instruction_2": "second"}
    good |= {"edit_image_3": f"{above}/207/3.jpg", "instruction_3": ""}
    bad = {"source_image": f"{above}/208/0.jpg", "edit_image_1": f"{above}/208/1.jpg", "instruction_1": "never"}
    odd = {"source_image": f"{above}/209/0.jpg"}
    fine = {"source_image": f"{above}/2080/0.jpg", "edit_image_1": f"{above}/2080/1.jpg", "instruction_1": "one"}
    lines(multi / "annotations" / "split_0001.jsonl", [good, bad, odd, fine])
    names = [f"{above}/{name}.jpg" for name in ("207/0", "207/1", "207/2", "207/3", "208/0", "2080/0", "2080/1")]
    files = [(f"multi_turn/{name}", b"broken" if "/208/" in name else draw(name)) for name in names]
    split(multi / "images" / "multi_turn.tar.gz", tar(files, "w:gz"), 2, ".part-{letters}")

    def turn(session: str, number: int, instruction: str) -> Expected:
        source, target = (f"{above}/{session}/{number + i}.jpg" for i in (0, 1))
        first = f"{above}/{session}/0.jpg"
        return Expected(source=source, target=target, instructions=(instruction,), turn=number, original=first)

    session = "multi_turn_editing/split_0001"
    return Download(
        inputs=[directory],
        records={
            "real_editing/split_0001/1": Expected(
                source="x/1.png", target="x/1_edited.png", instructions=("real edit",), original="x/1.png"
            ),
            f"{session}/1/0": turn("207", 0, "first"),
            f"{session}/1/1": turn("207", 1, "second"),
            f"{session}/4/0": turn("2080", 0, "one"),
        },
        refused={
            f"{session}/1/2": "empty instruction",
            f"{session}/2/0": "known to be corrupt",
            f"{session}/3": "damaged annotation",
        },
    )


def imgedit(directory: pathlib.Path) -> Download:
    """One table whose directory is that of the archive, one whose archive has another, and sessions."""
    tables = directory / "Parquet"

    def single(above: str, sample: str, prompt: str) -> dict[str, Any]:
        return {
            "input_images": [f"{above}/{sample}/original.png"],
            "output_images": [f"{above}/{sample}/result.png"],
            "prompt": prompt,
        }

    add = [single("results_add_laion_part0", sample, f"add {sample}") for sample in ("00094_1", "00094_2", "none")]
    two = single("results_add_laion_part0", "00094_1", "use both")
    two["input_images"] = two["input_images"] * 2
    out = single("results_add_laion_part0/..", "00094_1", "leave")
    table(tables / "add_part0.parquet", [*add, two, out])
    table(tables / "replace_part0.parquet", [single("replace", "00094_1", "replace 00094_1")])
    bare = {"input_images": ["9_in.jpg"], "output_images": ["9_out.jpg"], "prompt": "run"}
    table(tables / "action_part1.parquet", [bare])
    table(tables / "adjust_canny_part2.parquet", [single("results_adjust_canny_laion_part2", "00094_1", "adjust")])
    above = "results_content_memory_part2/s"
    turns = [{"input_images": [], "output_images": [], "prompt": "All that is added must be red."}]
    turns += [
        {
            "input_images": [f"{above}/origin_{i}.png"],
            "output_images": [f"{above}/result_{i}.png"],
            "prompt": f"turn {i}",
        }
        for i in (1, 2)
    ]
    table(tables / "content_memory_part2.parquet", [{"data": turns}])

    def members(top: str, samples: dict[str, list[str]]) -> list[tuple[str, bytes]]:
        names = [f"{top}{sample}/{name}" for sample in samples for name in samples[sample]]
        return [(name, draw(name)) for name in names]

    both = ["result.png", "result.json", "original.png"]
    packed = members("results_add_laion_part0/", {"00094_2": both, "00094_1": both})
    singles = directory / "Singleturn"
    split(singles / "results_add_laion_part0.tar", tar(packed, evil=["../x.png"]), 11, ".split.{number:03d}")
    packed = members("results/", {"00094_1": both})
    split(singles / "results_replace_part0.tar", tar(packed), 2, ".split.{number:03d}")
    packed = [(f"part1/9_{side}.jpg", draw(f"9_{side}")) for side in ("out", "in")]
    split(singles / "action_part1.tar", tar(packed), 2, ".split.{number:03d}")
    packed = members("./", {"00094_1": both})
    split(singles / "results_adjust_canny_laion_part2.tar", tar(packed), 1, ".split.{number:03d}")
    names = [f"{side}_{i}.png" for i in (1, 2) for side in ("origin", "result")]
    packed = members("mnt/data/results_content_memory_part2/", {"s": names})
    split(directory / "Multiturn" / "results_content_memory_part2.tar", tar(packed), 2, ".split.{number:03d}")
    (directory / "Benchmark.tar").write_bytes(tar([("Benchmark/singleturn/1.png", draw("benchmark"))]))
    scores = {"results_add_laion_part0/00094_1": 4.5, "results/00094_1": {"score": "[5, 4, 4]"}, "other/00094_2": 1}
    (directory / "all_dataset_gpt_score.json").write_text(json.dumps(scores, indent=1))

    def record(top: str, sample: str, kind: str, **more: Any) -> Expected:
        instructions = (f"{kind} {sample}",)
        source, target = (f"{top}/{sample}/{name}.png" for name in ("original", "result"))
        return Expected(source=source, target=target, instructions=instructions, kind=kind, original=sample, **more)

    memory = "mnt/data/results_content_memory_part2/s"
    return Download(
        inputs=[directory],
        records={
            "add_part0/0": record("results_add_laion_part0", "00094_1", "add", scores={"gpt": 4.5}),
            "add_part0/1": record("results_add_laion_part0", "00094_2", "add"),
            "replace_part0/0": record(
                "results", "00094_1", "replace", scores={"gpt_score_0": 5.0, "gpt_score_1": 4.0, "gpt_score_2": 4.0}
            ),
            "action_part1/0": Expected(source="9_in", target="9_out", instructions=("run",), kind="action"),
            "adjust_canny_part2/0": Expected(
                source="./00094_1/original.png",
                target="./00094_1/result.png",
                instructions=("adjust",),
                kind="adjust_canny",
                original="00094_1",
            ),
            **{
                f"content_memory_part2/0/{i}": Expected(
                    source=f"{memory}/origin_{i}.png",
                    target=f"{memory}/result_{i}.png",
                    instructions=(f"All that is added must be red. turn {i}",),
                    kind="content_memory",
                    turn=i,
                    original="s",
                )
                for i in (1, 2)
            },
        },
        refused={
            "add_part0/2": "missing image",
            "add_part0/3": "several sources",
            "add_part0/4": "unsafe name",
            "../x.png": "unsafe name",
            "content_memory_part2/0/0": "no images",
        },
    )


def _gpt_image_edit_files() -> dict[str, list[tuple[str, bytes]]]:
    """Members of each family: all inputs, then all outputs."""
    tasks = {"hqedit": ("hqedit/edit", "hqedit/generate"), "omniedit": ("omniedit/addition", "omniedit/complex-edit")}
    return {
        family: [
            (f"{task}/{side}/{i}.png", draw(f"{task}/{side}/{i}.png"))
            for task in own
            for side in ("input", "output")
            for i in range(2)
        ]
        for family, own in tasks.items()
    }


def _gpt_image_edit_record(task: str, number: int, instruction: str) -> Expected:
    source, target = (f"{task}/{side}/{number}.png" for side in ("input", "output"))
    kind = task.split("/")[1]
    return Expected(source=source, target=target, instructions=(instruction,), kind=kind, original=source)


def gpt_image_edit_training(directory: pathlib.Path) -> Download:
    for family, files in _gpt_image_edit_files().items():
        split(directory / "gpt-edit" / f"{family}.tar.gz", tar(files, "w:gz"), 2, ".part{number:03d}")

    def value(above: str, number: int | str, text: str) -> dict[str, Any]:
        said = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "<image>"}]
        return {"image": [f"{above}input/{number}.png", f"{above}output/{number}.png"], "conversations": said}

    lists = {
        "hqedit_gpt_edit": [value("", 0, "edit 0"), value("", 1, "edit 1"), value("", 7, "none")],
        "hqedit_gpt_generate": [value("", 0, "generate 0")],
        "omniedit_gpt": [value("addition/", 1, "add"), value("addition/", 1, " ")],
        "omniedit_gpt_rewrite": [value("addition/", 1, "add, rewritten")],
        "complexedit_gpt": [value("", 0, "complex"), {"image": ["a", "b", "c"], "conversations": []}],
    }
    (directory / "training_json").mkdir()
    for name, values in lists.items():
        (directory / "training_json" / f"{name}.json").write_text(json.dumps(values))
    return Download(
        inputs=[directory],
        records={
            "hqedit_gpt_edit/0": _gpt_image_edit_record("hqedit/edit", 0, "edit 0"),
            "hqedit_gpt_edit/1": _gpt_image_edit_record("hqedit/edit", 1, "edit 1"),
            "hqedit_gpt_generate/0": _gpt_image_edit_record("hqedit/generate", 0, "generate 0"),
            "omniedit_gpt/0": _gpt_image_edit_record("omniedit/addition", 1, "add"),
            "omniedit_gpt_rewrite/0": _gpt_image_edit_record("omniedit/addition", 1, "add, rewritten"),
            "complexedit_gpt/0": _gpt_image_edit_record("omniedit/complex-edit", 0, "complex"),
        },
        refused={
            "hqedit_gpt_edit/2": "missing image",
            "omniedit_gpt/1": "empty instruction",
            "complexedit_gpt/1": "several sources",
        },
    )


def gpt_image_edit_metadata(directory: pathlib.Path) -> Download:
    """Without training lists: those in the archive, which also say more."""
    task = "hqedit/edit"
    values = [
        {"id": f"hqedit_edit_{i}", "task": "edit", "input": f"input/{i}.png", "output": f"output/{i}.png",
         "instruction": f"edit {i}", "instruction_type": "original"}
        for i in range(2)
    ]  # fmt: skip
    values.append(values[0] | {"id": "hqedit_edit_up", "input": "../../../up.png"})
    files = [*_gpt_image_edit_files()["hqedit"], (f"{task}/metadata/hqedit_edit.json", json.dumps(values).encode())]
    split(directory / "gpt-edit" / "hqedit.tar.gz", tar(files, "w:gz"), 3, ".part{number:03d}")
    return Download(
        inputs=[directory / "gpt-edit"],
        records={f"hqedit_edit_{i}": _gpt_image_edit_record(task, i, f"edit {i}") for i in range(2)},
        refused={"hqedit_edit_up": "unsafe name"},
    )


def nhr_edit(directory: pathlib.Path) -> Download:
    def value(id: str, source: str, target: str, instruction: str = "edit") -> dict[str, Any]:
        return {
            "sample_id": id, "source_file_name": f"images/00/{source}", "edited_file_name": f"images/00/{target}",
            "edit_instruction": f"{instruction} {id}", "augmented_instructions": [f"please {instruction} {id}"],
            "img_width": 24, "img_height": 16, "category": "add", "style": "photo",
        }  # fmt: skip

    images = directory / "train" / "images" / "00"
    images.mkdir(parents=True)
    for name in ("image_7_original.jpg", "image_7_edited_0.jpg", "image_7_edited_1.jpg"):
        (images / name).write_bytes(draw(name))
    (images / "link.jpg").symlink_to("/etc/passwd")
    values = [
        value("a", "image_7_original.jpg", "image_7_edited_0.jpg"),
        value("b", "image_7_edited_0.jpg", "image_7_edited_1.jpg"),
        value("c", "image_7_original.jpg", "image_8_edited_0.jpg"),
        value("d", "../../../../../etc/passwd", "image_7_edited_0.jpg"),
        value("e", "link.jpg", "image_7_edited_0.jpg"),
    ]
    lines(directory / "train" / "metadata.jsonl", values)
    row = {"source_image": {"bytes": draw("s"), "path": None}, "edited_image": {"bytes": draw("t"), "path": None}}
    table(directory / "other" / "train-00000.parquet", [row | {"edit_instruction": "third"}])

    def record(id: str, source: str, target: str) -> Expected:
        instructions = (f"edit {id}", f"please edit {id}")
        return Expected(source=source, target=target, instructions=instructions, kind="add", original="image_7")

    return Download(
        inputs=[directory],
        records={
            "a": record("a", "image_7_original.jpg", "image_7_edited_0.jpg"),
            "b": record("b", "image_7_edited_0.jpg", "image_7_edited_1.jpg"),
            "train-00000/0": Expected(source="s", target="t", instructions=("third",)),
        },
        refused={"c": "missing image", "d": "unsafe name", "e": "unsafe name"},
    )


def _pico_lists(directory: pathlib.Path) -> Download:
    """Lists and edited images; sources are elsewhere."""

    def value(source: str, output: str, **more: Any) -> dict[str, Any]:
        return {
            "open_image_input_url": f"https://farm.example/{source}_o.jpg", "text": f"long {output}",
            "output_image": f"images/positive-edit/{output}.png", "edit_type": "Remove an existing object",
            "summarized_text": f"short {output}", "local_input_image": f"openimages/train_0/{source}.jpg", **more
        }  # fmt: skip

    values = [value("p", "1"), value("p", "2"), value("q", "3"), value("p", "4"), value("q", "4"), value("r", "5")]
    lines(directory / "sft.jsonl", [*values, value("p", "none"), value("p", "", output_image=["a", "b"])])
    lines(directory / "preference.jsonl", [value("p", "6")])
    session = {
        "files": [
            {"id": "edit_turn1", "url": "images/multi-turn/9_turn1.png"},
            {"id": "final_image", "url": "images/multi-turn/9_turn2.png"},
            {
                "id": "original_input_image",
                "url": "https://farm.example/p_o.jpg",
                "local_input_image": "openimages/train_0/p.jpg",
            },
        ],
        "metadata_edit_turn_prompts": ["warmer", "zoom in"],
    }  # fmt: skip
    lines(directory / "multi_turn.jsonl", [session, session | {"files": []}])
    for name in [f"positive-edit/{i}" for i in range(1, 6)] + ["multi-turn/9_turn1", "multi-turn/9_turn2"]:
        path = directory / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw(name))

    def record(source: str, output: str) -> Expected:
        instructions = (f"long {output}", f"short {output}")
        kind, target = "Remove an existing object", f"positive-edit/{output}"
        return Expected(source=source, target=target, instructions=instructions, kind=kind, original=f"{source}_o.jpg")

    first, second, original = "multi-turn/9_turn1", "multi-turn/9_turn2", "p_o.jpg"
    return Download(
        inputs=[directory],
        records={
            "sft/1": record("p", "1"),
            "sft/2": record("p", "2"),
            "sft/3": record("q", "3"),
            "multi_turn/1/0": Expected(source="p", target=first, instructions=("warmer",), original=original),
            "multi_turn/1/1": Expected(
                source=first, target=second, instructions=("zoom in",), turn=1, original="p_o.jpg"
            ),
        },
        refused={
            "sft/4": "ambiguous image",
            "sft/5": "ambiguous image",
            "sft/6": "missing image",
            "sft/7": "missing image",
            "sft/8": "missing image",
            "preference/1": "failed edit",
            "multi_turn/2": "damaged annotation",
        },
    )


def pico_banana(directory: pathlib.Path) -> Download:
    """Sources unpacked: one where the list says, one under the name in its URL."""
    layout = _pico_lists(directory)
    for path, name in (("openimages/train_0/p.jpg", "p"), ("openimage_source_images/q_o.jpg", "q")):
        (directory / path).parent.mkdir(parents=True)
        (directory / path).write_bytes(draw(name))
    return layout


def pico_banana_packed(directory: pathlib.Path) -> Download:
    """Sources in the packed files of Open Images."""
    layout = _pico_lists(directory)
    (directory / "train_0.tar.gz").write_bytes(tar([(f"train_0/{name}.jpg", draw(name)) for name in "pq"], "w:gz"))
    return layout


def manifest(directory: pathlib.Path) -> Download:
    (directory / "images").mkdir(parents=True)
    for name in ("a", "b", "m"):
        (directory / "images" / f"{name}.jpg").write_bytes(draw(name))
    plain = {"source": "images/a.jpg", "target": "images/b.jpg", "instruction": "edit"}
    full = plain | {"id": "mine", "instructions": ["other words"], "kind": "add", "turn": 2, "scores": {"q": 0.5}}
    full |= {"source": str(directory / "images" / "b.jpg"), "mask": "images/m.jpg", "license": "CC0", "original": "b"}
    lines(
        directory / "list.jsonl",
        [
            plain,
            full,
            plain | {"target": "no.jpg"},
            plain | {"source": "/etc/passwd"},
            plain | {"instruction": 7},
            "",
            "[]",
        ],
    )
    return Download(
        inputs=[directory / "list.jsonl"],
        options={"dataset": "own"},
        records={
            "list.jsonl:1": Expected(source="a", target="b", instructions=("edit",)),
            "mine": Expected(
                source="b",
                target="b",
                instructions=("edit", "other words"),
                kind="add",
                turn=2,
                scores={"q": 0.5},
                mask="m",
                original="b",
            ),
        },
        refused={
            "list.jsonl:3": "missing image",
            "list.jsonl:4": "unsafe name",
            "list.jsonl:5": "empty instruction",
            "list.jsonl:7": "damaged annotation",
        },
    )


def unpacked(download: Download, *names: str, into: str = "") -> Download:
    """The same data set with the archives of these names unpacked where they lie, or in a directory there."""
    files = [str(path) for top in download.inputs for path in top.rglob("*") if path.is_file()]
    for archive, parts in group_parts(files).items():
        if posixpath.basename(archive).split(".tar")[0] in names:
            for member in members(parts):
                if isinstance(member, Member):
                    path = pathlib.Path(archive).parent / into / member.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(member.data)
            for part in parts:
                pathlib.Path(part).unlink()
    refused = {id: reason for id, reason in download.refused.items() if not id.startswith("..")}  # members of archives
    return dataclasses.replace(download, refused=refused)


def seed_openimages_unpacked(directory: pathlib.Path) -> Download:
    return unpacked(seed_openimages(directory), "source_images", "target_images")


def seed_openimages_half_unpacked(directory: pathlib.Path) -> Download:
    return unpacked(seed_openimages(directory), "source_images")


def seed_unsplash_unpacked(directory: pathlib.Path) -> Download:
    return unpacked(seed_unsplash(directory), "unsplash_images")


def seed_real_and_multi_turn_unpacked(directory: pathlib.Path) -> Download:
    return unpacked(seed_real_and_multi_turn(directory), "images", "multi_turn")


def imgedit_unpacked(directory: pathlib.Path) -> Download:
    """Archives with a directory of their own, and those without, which need one."""
    made = unpacked(imgedit(directory), "results_add_laion_part0")
    made = unpacked(made, "results_replace_part0", into="results_replace_part0")
    made = unpacked(made, "action_part1", into="action_part1")
    made = unpacked(made, "results_adjust_canny_laion_part2", into="adjust_canny_part2")
    return unpacked(made, "results_content_memory_part2")


def imgedit_half_unpacked(directory: pathlib.Path) -> Download:
    return unpacked(imgedit(directory), "results_add_laion_part0")
