"""Which process of a run is slow: each reports its times at logged steps, and process 0 compares them.

A late host shows here, for its own waits differ from those of the others. A slow chip does not: within a step all wait
for it in collectives, the last of which comes after nearly all of the work, so that it is ready everywhere at once.
"""

import math
import time
from collections.abc import Mapping

import jax

from varedit_jax.parallel import processes

_PREFIX = "varedit_jax/hosts/"
_WAIT_SECONDS = 10.0  # for reports of the others; who has not reported by then is late
_RETRY_SECONDS = 0.05


def gather(step: int, step_seconds: float, data_seconds: float, seconds: float = _WAIT_SECONDS) -> dict[str, float]:
    """Reports the means of this process since the last logged step; process 0 returns what `compare` finds.

    The others return {} at once, and so does a process that is alone. It uses no devices; process 0 waits at most
    `seconds`.
    """
    count = jax.process_count()
    if count == 1:
        return {}
    processes.report(f"{_PREFIX}{jax.process_index()}", f"{step} {step_seconds!r} {data_seconds!r}")
    if jax.process_index() != 0:
        return {}
    end = time.monotonic() + seconds
    while len(found := _of_step(step)) < count and time.monotonic() < end:
        time.sleep(_RETRY_SECONDS)
    return compare(found, count)


def compare(found: Mapping[int, tuple[float, float]], count: int) -> dict[str, float]:
    """Returns the metrics of the reports (step seconds, data seconds) by process, of a run of `count` processes.

    All processes wait for the slowest in every step, so it is known by its wait for data, not by its step time.
    `late_host` is the first without a report, -1 if there is none; `slowest_host` is a late one, if there is one.
    """
    late = [index for index in range(count) if index not in found]
    waits = {index: data for index, (_, data) in found.items()}
    slowest = late[0] if late else max(waits, key=lambda index: waits[index])
    return {
        "time/host_step_seconds_max": max((step for step, _ in found.values()), default=math.nan),
        "time/host_data_wait_max": max(waits.values(), default=math.nan),
        "time/slowest_host": float(slowest),
        "time/late_host": float(late[0]) if late else -1.0,
    }


def _of_step(step: int) -> dict[int, tuple[float, float]]:
    """Returns the reports of a step by process."""
    found = {}
    for name, text in processes.reports(_PREFIX).items():
        number, step_seconds, data_seconds = text.split()
        if int(number) == step:
            found[int(name.rpartition("/")[2])] = float(step_seconds), float(data_seconds)
    return found
