"""Progress: a bar on a terminal; where output goes to a file or another program, a plain line now and then."""

import sys
import time
from typing import Any

import tqdm

_SECONDS = 30.0  # between two lines
_LINE = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left{postfix}"


class Progress(tqdm.tqdm):
    """tqdm with its arguments; off a terminal, a line every 30 seconds and one at the end."""

    def __init__(self, *args: Any, **named: Any) -> None:
        """Shows nothing yet if off a terminal. `file` is standard error by default."""
        stream = named.setdefault("file", sys.stderr)
        self._is_plain = stream is None or not stream.isatty()
        if self._is_plain:
            named |= {"bar_format": _LINE, "leave": False, "disable": named.get("disable", False) or stream is None}
        self._shown, self._shown_at = named.get("initial", 0), time.monotonic()
        super().__init__(*args, **named)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Shows the state, as tqdm asks for often, and at the end with an empty `msg`, for a bar that is to vanish."""
        if not self._is_plain:
            return bool(super().display(msg, pos))
        if self.n != self._shown and (msg == "" or time.monotonic() - self._shown_at >= _SECONDS):
            self._shown, self._shown_at = self.n, time.monotonic()
            print(self, file=self.fp, flush=True)
        return False  # there is no bar to clear
