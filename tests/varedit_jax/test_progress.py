"""Progress on a terminal and elsewhere."""

import io
import sys
import time

import pytest

from varedit_jax.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as its only entry."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_off_a_terminal_are_seldom(clock: list[float]) -> None:
    """One after 30 seconds, however often something is done, and one at the end."""
    screen = io.StringIO()
    with Progress(total=100, desc="edits", unit="edit", file=screen, mininterval=0) as progress:
        for _ in range(50):
            progress.update()
            progress.set_postfix_str("busy")
            clock[0] += 1
        for _ in range(50):
            progress.update()
    shown = screen.getvalue()
    assert "\r" not in shown and "%|" not in shown
    first, last = shown.splitlines()
    assert first.startswith("edits: 31 of 100 in ") and first.endswith(" left, busy")
    assert last.startswith("edits: 100 of 100 in ")


def test_a_loop_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress(range(3), desc="rounds", unit="round")) == [0, 1, 2]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("rounds: 3 of 3 in ")


def test_what_was_done_before_is_no_line() -> None:
    screen = io.StringIO()
    with Progress(total=5, initial=5, desc="stage", unit="task", file=screen):
        pass
    assert screen.getvalue() == ""


def test_an_interrupted_loop_says_how_far_it_came() -> None:
    screen = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(total=5, desc="stage", unit="task", file=screen) as progress:
        progress.update(2)
        raise KeyboardInterrupt
    assert screen.getvalue().startswith("stage: 2 of 5 in ")


def test_a_terminal_has_a_bar() -> None:
    screen = Terminal()
    with Progress(total=2, desc="edits", unit="edit", file=screen) as progress:
        progress.update(2)
    assert "\redits: 100%|" in screen.getvalue() and " of " not in screen.getvalue()


def test_a_program_without_standard_error_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that was started with `2>&-`."""
    monkeypatch.setattr(sys, "stderr", None)
    assert list(Progress(range(2), desc="rounds", unit="round")) == [0, 1]
