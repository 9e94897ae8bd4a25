"""Filter by a vision-language model: the edit must have been made, and everything else kept.

Any endpoint of OpenAI's chat completions works. Answers are stored at once, by hash of the question, and reused, so a
resumed job, or one with other thresholds, pays for new questions only. If the edit was not made, the second question
is skipped.
"""

import base64
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import http.client
import io
import json
import os
import pathlib
import re
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator

import numpy as np

from data_pipelines.preparation.fingerprints import Facts, PartFiles, save_array
from data_pipelines.preparation.settings import Vision
from data_pipelines.preparation.staged import StagedRecords
from data_pipelines.reasons import Reason
from data_pipelines.record import Record
from data_pipelines.transforms import preview
from varedit_jax.errors import UserError
from varedit_jax.images import open_image

QUESTIONS = {  # in order, by the meaning of a "no"
    Reason.NOT_DONE: (
        "The second image should be the first one after this edit: {instruction}\n"
        "Was the edit made as asked? Answer with one word, yes or no."
    ),
    Reason.NOT_KEPT: (
        "The second image should be the first one after this edit: {instruction}\n"
        "Apart from what the edit asks for, is everything else in the first image kept unchanged in the second? "
        "Answer with one word, yes or no."
    ),
}
_FIRST = 20  # answers of a part after which it fails if most are unclear
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # temporary failures, which are retried
_REFUSED = (400, 413, 422)  # failures of this question alone
# No connection, an interrupted one, or a malformed answer.
_TROUBLE = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError)
_LONGEST_PAUSE = 60.0  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionTask:
    """The remaining records of one part, to ask about."""

    vision: Vision
    parts: tuple[pathlib.Path, ...]
    verdicts: pathlib.Path
    part: int
    answers: pathlib.Path  # database of answers, which outlives the job
    found: pathlib.Path  # int64 [n, 2]: number of a dropped record, and index of its reason in REASONS

    def is_done(self) -> bool:
        """Returns True if the part is finished."""
        return self.found.exists()


REASONS = (Reason.NOT_DONE, Reason.NOT_KEPT, Reason.UNCLEAR)


def ask(task: QuestionTask) -> None:
    """Asks about a part. Raises UserError if the endpoint fails, or hardly ever answers yes or no."""
    facts = Facts([PartFiles(directory) for directory in task.parts])
    start, end = facts.starts[task.part : task.part + 2]
    verdicts = np.load(task.verdicts, mmap_mode="r")
    numbers = (np.flatnonzero(verdicts[start:end] == 0) + start).tolist()
    records, found, clear = StagedRecords(facts), [], 0
    # Threads must have stored their answers before the database closes.
    with (
        Model(task.vision, task.answers) as model,
        contextlib.closing(model.reasons((number, records[number]) for number in numbers)) as asked,
    ):
        for count, (number, reason) in enumerate(asked, 1):
            clear += reason is not Reason.UNCLEAR
            if reason is not None:
                found.append((number, REASONS.index(reason)))
            if count == _FIRST and clear < _FIRST // 2:
                raise UserError(
                    f"{task.vision.model} answered {clear} of {_FIRST} questions with yes or no, the last one with "
                    f"{model.last!r}; give a model that sees images"
                )
    save_array(task.found, np.array(found, np.int64).reshape(-1, 2))


class Model:
    """The endpoint with its stored answers, as a context manager."""

    def __init__(self, vision: Vision, answers: pathlib.Path) -> None:
        """`answers` is a database to create or extend. Raises UserError if it cannot be written."""
        self._vision = vision
        self._key = os.environ.get(vision.key_variable, "").strip()
        self._lock = threading.Lock()
        self._next = 0.0  # time of the next request
        self.last = ""
        try:
            answers.parent.mkdir(parents=True, exist_ok=True)
            self._answers = sqlite3.connect(answers, check_same_thread=False, isolation_level=None)
            self._answers.execute("CREATE TABLE IF NOT EXISTS answers (question BLOB PRIMARY KEY, answer TEXT)")
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"cannot keep answers in {answers}: {error}; give another directory") from error

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._answers.close()

    def reasons(self, records: Iterator[tuple[int, Record]]) -> Generator[tuple[int, Reason | None], None, None]:
        """Yields the reason for dropping each record, or None, in order; several requests run at once."""
        with concurrent.futures.ThreadPoolExecutor(self._vision.parallel) as pool:
            waiting: list[tuple[int, concurrent.futures.Future[Reason | None]]] = []
            try:
                for number, record in records:
                    waiting.append((number, pool.submit(self.reason, record)))
                    if len(waiting) > self._vision.parallel:
                        number, future = waiting.pop(0)
                        yield number, future.result()
                while waiting:
                    number, future = waiting.pop(0)
                    yield number, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()

    def reason(self, record: Record) -> Reason | None:
        """Returns the reason for dropping a record, or None. Raises UserError if the endpoint does not answer."""
        images: list[str] = []
        for reason, question in QUESTIONS.items():
            text = question.format(instruction=record.instructions[0])
            digest = self._digest(record, text)
            answer = self._known(digest)
            if answer is None:
                images = images or [_data_url(data, self._vision.side) for data in (record.source, record.target)]
                answer = self._ask(text, images)
                with self._lock:
                    self._answers.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (digest, answer))
            word = re.search(r"\b(yes|no)\b", answer.casefold())
            if word is None:
                self.last = answer
                return Reason.UNCLEAR
            if word[1] == "no":
                return reason
        return None

    def _digest(self, record: Record, text: str) -> bytes:
        vision = self._vision
        pieces = (vision.model.encode(), str(vision.side).encode(), text.encode(), record.source, record.target)
        hashed = hashlib.sha256()
        for piece in pieces:
            hashed.update(hashlib.sha256(piece).digest())
        return hashed.digest()

    def _known(self, digest: bytes) -> str | None:
        with self._lock:
            row = self._answers.execute("SELECT answer FROM answers WHERE question = ?", (digest,)).fetchone()
        return None if row is None else row[0]

    def _ask(self, text: str, images: list[str]) -> str:
        """Returns the answer of the endpoint, "" if it refuses this question. Raises UserError if it fails."""
        vision = self._vision
        content = [{"type": "text", "text": text}]
        content += [{"type": "image_url", "image_url": {"url": url}} for url in images]  # type: ignore[dict-item]
        body = {
            "model": vision.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 8,
        }
        request = urllib.request.Request(
            f"{vision.url.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {}),
        )
        failure = ""
        for attempt in range(vision.tries):
            self._wait_for_turn()
            pause = min(2.0**attempt, _LONGEST_PAUSE)
            try:
                with urllib.request.urlopen(request, timeout=vision.timeout) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"] or "")
            except urllib.error.HTTPError as error:
                failure = f"status {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code in _REFUSED:
                    self.last = failure
                    return ""
                if error.code not in _PASSING:
                    raise UserError(
                        f"{vision.url} refused {vision.model} with {failure}; check --vision_url, --vision_model and "
                        f"the key in {vision.key_variable}"
                    ) from error
                pause = _asked_pause(error.headers.get("Retry-After"), pause)
            except _TROUBLE as error:
                failure = str(error) or type(error).__name__
            if attempt + 1 < vision.tries:
                time.sleep(pause)
        raise UserError(
            f"{vision.url} did not answer in {vision.tries} tries ({failure}); run the same command again later, "
            f"answers so far are kept"
        )

    def _wait_for_turn(self) -> None:
        if not self._vision.per_minute:
            return
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + 60 / self._vision.per_minute
        time.sleep(max(0.0, turn - time.monotonic()))


def _asked_pause(header: str | None, otherwise: float) -> float:
    """Returns the seconds in a Retry-After header, or `otherwise` if it is not a number."""
    try:
        return min(max(float(header or ""), 0.0), 10 * _LONGEST_PAUSE)
    except ValueError:
        return otherwise


def _data_url(data: bytes, side: int) -> str:
    """Returns an image as an upright JPEG in a data URL, with a long side of at most `side` pixels."""
    small = preview(open_image(io.BytesIO(data)), side, quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"
