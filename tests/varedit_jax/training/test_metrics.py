"""Metrics of a run: files, TensorBoard and progress."""

import io
import json
import pathlib
import struct

import numpy as np
import PIL.Image
import pytest
from tensorboardX.proto.event_pb2 import Event

from varedit_jax.errors import UserError
from varedit_jax.training.goodput import Stopwatch
from varedit_jax.training.metrics import MetricsWriter, duration, flat_metrics, read_metrics


class Terminal(io.StringIO):
    """A screen that claims to be a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def board(workdir: pathlib.Path) -> list[Event]:
    """TensorBoard events, file by file in the order they were written."""
    events = []
    for path in sorted(workdir.glob("events.out.tfevents*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_metrics_reach_the_file_and_tensorboard(tmp_path: pathlib.Path) -> None:
    """A scalar keeps its name, a vector gets one per scale."""
    writer = MetricsWriter(tmp_path, first_step=0, steps=10)
    writer.scalars(0, {"loss": np.float32(0.5), "bit_accuracy": np.array([0.25, 0.75])})
    writer.scalars(7, {"eval/loss": float("nan")})
    writer.close()
    assert read_metrics(tmp_path) == [
        {"step": 0, "loss": 0.5, "bit_accuracy/scale_0": 0.25, "bit_accuracy/scale_1": 0.75},
        {"step": 7, "eval/loss": None},
    ]
    scalars = [
        (event.step, value.tag, value.simple_value) for event in board(tmp_path) for value in event.summary.value
    ]
    assert scalars == [(0, "loss", 0.5), (0, "bit_accuracy/scale_0", 0.25), (0, "bit_accuracy/scale_1", 0.75)]
    with pytest.raises(ValueError, match=r"metric 'loss' has shape \[2, 2\]"):
        dict(flat_metrics({"loss": np.zeros((2, 2))}))


def test_resuming_drops_repeated_steps(tmp_path: pathlib.Path) -> None:
    """Lines of the resumed step and later are dropped, as is one that a kill cut short; TensorBoard purges its own."""
    writer = MetricsWriter(tmp_path, first_step=0, steps=10)
    for step in range(6):
        writer.scalars(step, {"loss": step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    writer = MetricsWriter(tmp_path, first_step=4, steps=10)
    writer.scalars(4, {"loss": 40})
    writer.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 40),
    ]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    starts = [event.step for event in board(tmp_path) if event.WhichOneof("what") == "session_log"]
    assert starts == [4]


def test_images(tmp_path: pathlib.Path) -> None:
    """An image is a PNG file of its pixels, and an image in TensorBoard."""
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    writer = MetricsWriter(tmp_path, first_step=0, steps=10)
    writer.images(30, {"sheet": image})
    with pytest.raises(ValueError, match=r"image 'flat' is uint8\[4, 6\], not uint8\[y, x, 3\]"):
        writer.images(30, {"flat": image[..., 0]})
    writer.close()
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / "samples" / "sheet_0000030.png")), image)
    found = [value for event in board(tmp_path) for value in event.summary.value if value.HasField("image")]
    assert [(value.tag, value.image.height, value.image.width) for value in found] == [("sheet", 4, 6)]


def test_progress_off_a_terminal_is_a_line(tmp_path: pathlib.Path) -> None:
    """A line has the available metrics, and no others."""
    screen = io.StringIO()
    writer = MetricsWriter(tmp_path, first_step=0, steps=1000, screen=screen)
    writer.progress(20, {"loss": 0.69314, "bit_accuracy": 0.5, "other": 1.0}, examples_per_second=12.34, eta=7325)
    writer.progress(30, {"loss": 0.5}, examples_per_second=12.34, eta=42, mfu=0.4567)
    writer.close()
    assert screen.getvalue().splitlines() == [
        "step 20/1000, loss 0.6931, bit_accuracy 0.5, 12.3 examples/s, 2 h 02 min left",
        "step 30/1000, loss 0.5, 12.3 examples/s, MFU 45.7%, 42 s left",
    ]


def test_progress_on_a_terminal_is_a_bar(tmp_path: pathlib.Path) -> None:
    """The bar starts at the resumed step; sentences go above it."""
    screen = Terminal()
    writer = MetricsWriter(tmp_path, first_step=3, steps=5, screen=screen)
    writer.say("going on")
    for step in (4, 5):
        writer.progress(step, {"loss": 0.25}, examples_per_second=1.0, eta=300)
        writer.advance()
    writer.close()
    shown = screen.getvalue()
    assert "3/5" in shown and "5/5" in shown and "loss 0.25" in shown and "going on\n" in shown
    assert "5 min left" in shown and "?" not in shown  # no guess of the bar's own beside it


def test_a_full_disk_is_one_sentence(tmp_path: pathlib.Path) -> None:
    """/dev/full replaces a full disk."""
    writer = MetricsWriter(tmp_path, first_step=0, steps=10)
    writer._lines.close()
    with open("/dev/full", "wb", buffering=0) as writer._lines._file:
        with pytest.raises(
            UserError, match=r"writing the metrics.jsonl failed in .*: No space left on device; .* room"
        ):
            writer.scalars(0, {"loss": 1.0})
        writer.close()


def test_a_directory_that_is_a_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match=r"/run is a file, where a directory should be"):
        MetricsWriter(tmp_path / "run", first_step=0, steps=10)


def test_stopwatch_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of a part add up; a share is of the time since the start."""
    now = iter([0.0, 1.0, 2.0, 10.0, 12.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Stopwatch()  # at 0
    for _ in range(2):
        with clock.time("step"):  # from 1 to 2, and from 10 to 12
            pass
    assert clock.seconds == {"step": 3.0}
    assert clock.share("step") == 3.0 / 20.0
    clock.move("step", "data", 1.0)
    assert clock.seconds == {"step": 2.0, "data": 1.0}


def test_duration() -> None:
    """Seconds as text."""
    assert [duration(s) for s in (4, 99, 100, 5900, 7500, float("inf"))] == [
        "4 s", "99 s", "2 min", "98 min", "2 h 05 min", "?",
    ]  # fmt: skip


def test_broken_bytes_do_not_end_a_run(tmp_path: pathlib.Path) -> None:
    """As after a power cut: a resumed run keeps the good lines, whatever lies between them."""
    path = tmp_path / "metrics.jsonl"
    broken = (b"\x00" * 64, b"\xff\xfe{", b'{"step": 1, "lo', b'{"loss": 1.0}', b'{"step": "1"}', b"[" * 100_000, b"7")
    path.write_bytes(b"\n".join([b'{"step": 0}', *broken, b'{"step": 2}', b'{"step": 3}', b"\xc3"]))
    MetricsWriter(tmp_path, first_step=3, steps=5).close()
    assert read_metrics(tmp_path) == [{"step": 0}, {"step": 2}]
    assert len(path.read_bytes().splitlines()) == 2


def test_a_directory_in_place_of_the_metrics_is_one_sentence(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl is a directory"):
        read_metrics(tmp_path)
