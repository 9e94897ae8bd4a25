import dataclasses
import http.server
import json
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from data_pipelines.preparation import vision_filter
from data_pipelines.preparation.pipeline import prepare
from data_pipelines.preparation.settings import Settings, Vision
from data_pipelines.preparation.vision_filter import Model
from data_pipelines.reasons import Reason
from data_pipelines.record import Record
from tests.data_pipelines.preparation.corpus import edited, jpeg, photo
from varedit_jax.errors import UserError
from varedit_jax.storage.jsonl import read_lines

CUT = 0  # in place of a status: an answer that ends too early


class Endpoint:
    """A chat endpoint on this machine, whose answers depend on the instruction and on which question it is."""

    def __init__(self) -> None:
        self.questions: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.statuses: list[int] = []  # of the next answers; afterwards 200
        self.times: list[float] = []
        self.answers: dict[str, tuple[str, str]] = {}  # by instruction: was it made, was the rest kept
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.times.append(time.monotonic())
                outer.headers.append(self.headers)
                status = outer.statuses.pop(0) if outer.statuses else 200
                cut, status = status == CUT, 200 if status == CUT else status
                reply = b'{"error": "of that status"}'
                if status == 200:
                    outer.questions.append(body)
                    text = body["messages"][0]["content"][0]["text"]
                    made = [answers for name, answers in outer.answers.items() if name in text]
                    answer = (made[0] if made else ("Yes.", "yes"))["unchanged" in text]
                    reply = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(reply[:5] if cut else reply)

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision_filter, "_LONGEST_PAUSE", 0.01)


def _record(instruction: str = "make it red") -> Record:
    source = photo(1, (640, 480))
    return Record(id="1", dataset="d", source=jpeg(source), target=jpeg(edited(source)), instructions=(instruction,))


def _model(endpoint: Endpoint, directory: pathlib.Path, **fields: Any) -> Model:
    return Model(Vision(url=endpoint.url, model="seer", **fields), directory / "answers.sqlite")


def test_two_questions_decide_and_the_second_is_not_asked_where_the_first_is_enough(
    endpoint: Endpoint, tmp_path: pathlib.Path
) -> None:
    endpoint.answers = {
        "undone": ("No, it was not.", "yes"),
        "careless": ("yes", "**No**"),
        "vague": ("It is a nice image, now and then", "yes"),
    }
    with _model(endpoint, tmp_path) as model:
        for instruction, reason, asked in (
            ("undone", Reason.NOT_DONE, 1),
            ("careless", Reason.NOT_KEPT, 2),
            ("vague", Reason.UNCLEAR, 1),
            ("sound", None, 2),
        ):
            endpoint.questions.clear()
            assert model.reason(_record(instruction)) is reason
            assert len(endpoint.questions) == asked


def test_a_question_has_the_instruction_and_both_images_in_a_size_that_can_be_paid(
    endpoint: Endpoint, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    with _model(endpoint, tmp_path, key_variable="MY_KEY", side=100) as model:
        model.reason(_record())
    question = endpoint.questions[0]
    text, *images = question["messages"][0]["content"]
    assert question["model"] == "seer" and question["temperature"] == 0 and "make it red" in text["text"]
    assert [part["image_url"]["url"][:23] for part in images] == ["data:image/jpeg;base64,"] * 2
    assert all(len(part["image_url"]["url"]) < 10_000 for part in images)
    assert endpoint.headers[0]["Authorization"] == "Bearer secret"


def test_answers_are_kept_and_not_asked_for_again(endpoint: Endpoint, tmp_path: pathlib.Path) -> None:
    for _ in range(2):
        with _model(endpoint, tmp_path) as model:
            assert model.reason(_record()) is None
    assert len(endpoint.questions) == 2
    with _model(endpoint, tmp_path) as model:
        model.reason(_record("something else"))
    assert len(endpoint.questions) == 4


def test_passing_troubles_are_tried_again_and_others_told(endpoint: Endpoint, tmp_path: pathlib.Path) -> None:
    endpoint.statuses = [429, 503, CUT, 500]
    with _model(endpoint, tmp_path) as model:
        assert model.reason(_record()) is None
        endpoint.statuses = [401]
        with pytest.raises(UserError, match=r"refused seer with status 401.*OPENAI_API_KEY"):
            model.reason(_record("another"))
        endpoint.statuses = [400]  # of what this one record asks
        assert model.reason(_record("a third")) is Reason.UNCLEAR
    with (
        Model(Vision(url="http://127.0.0.1:9/v1", model="seer", tries=2), tmp_path / "other.sqlite") as model,
        pytest.raises(UserError, match="did not answer in 2 tries"),
    ):
        model.reason(_record())


@pytest.mark.parametrize("url", ["server/v1", "localhost:8000/v1", "http://", "http://host:port/v1", "http://[::1/v1"])
def test_an_address_that_is_none_is_told_at_once(url: str) -> None:
    with pytest.raises(UserError, match="give an address like"):
        Vision(url=url, model="seer")


def test_questions_keep_to_the_rate(endpoint: Endpoint, tmp_path: pathlib.Path) -> None:
    with _model(endpoint, tmp_path, per_minute=1200, parallel=4) as model:
        asked = model.reasons((n, _record(f"edit {n}")) for n in range(3))
        assert list(asked) == [(0, None), (1, None), (2, None)]
    assert len(endpoint.times) == 6
    assert max(endpoint.times) - min(endpoint.times) > 5 * 60 / 1200 - 0.05


def _write(directory: pathlib.Path, count: int) -> str:
    directory.mkdir()
    values = []
    for number in range(count):
        image = photo(number)
        (directory / f"{number}-s.jpg").write_bytes(jpeg(image))
        (directory / f"{number}-t.jpg").write_bytes(jpeg(edited(image)))
        names = {"source": f"{number}-s.jpg", "target": f"{number}-t.jpg"}
        values.append({"id": f"n{number}", "instruction": f"Edit-{number}.", **names})
    (directory / "list.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(directory / "list.jsonl")


def test_prepare_leaves_out_what_the_model_refuses_and_goes_on_after_the_endpoint_was_away(
    endpoint: Endpoint, tmp_path: pathlib.Path
) -> None:
    source = _write(tmp_path / "in", 6)
    endpoint.answers = {"Edit-1.": ("no", "yes"), "Edit-3.": ("yes", "no")}
    settings = Settings(validation=0, vision=Vision(url=endpoint.url, model="seer", parallel=1, tries=1))
    endpoint.statuses = [200] * 5 + [503]
    with pytest.raises(UserError, match="run the same command again later"):
        prepare("manifest", [source], tmp_path / "out", settings)
    assert len(endpoint.questions) >= 5
    assert prepare("manifest", [source], tmp_path / "out", settings) == {"train": 4}
    assert len(endpoint.questions) == 2 * 4 + 1 + 2  # none of them twice
    left = read_lines(tmp_path / "out" / "report" / "quarantine.jsonl")
    assert {line["id"]: line["reason"] for line in left} == {"n1": Reason.NOT_DONE, "n3": Reason.NOT_KEPT}
    asked = len(endpoint.questions)
    stricter = dataclasses.replace(settings, min_side=8)
    assert prepare("manifest", [source], tmp_path / "other", stricter) == {"train": 4}
    assert len(endpoint.questions) == 2 * asked  # another output has answers of its own


def test_a_model_that_does_not_understand_stops_the_job(
    endpoint: Endpoint, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision_filter, "_FIRST", 4)
    endpoint.answers = {"Edit": ("As a language model I cannot see", "yes")}
    settings = Settings(vision=Vision(url=endpoint.url, model="seer"))
    with pytest.raises(UserError, match="answered 0 of 4 questions.*'As a language model I cannot see'"):
        prepare("manifest", [_write(tmp_path / "in", 6)], tmp_path / "out", settings)
