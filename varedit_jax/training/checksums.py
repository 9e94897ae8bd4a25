"""Checksums of a checkpoint's files: written when it is complete, compared before it is restored.

Each process writes `manifest_I-of-N.json` in the checkpoint, of the files that it wrote; process 0 has the others, too.
Before a restore each process reads a share of the files. A checkpoint without them, of an older version or from a
process that was killed between the two, is restored as it is.
"""

import json
import pathlib
import re
from typing import Any

import jax

from varedit_jax.parallel.agreement import gather, together
from varedit_jax.storage import files
from varedit_jax.storage.disk import read_explained
from varedit_jax.storage.paths import children, files_below, size
from varedit_jax.weights.manifest import MANIFEST_VERSION, sha256_of_file

_PATTERN = "manifest_*-of-*.json"
_WRITER = re.compile(r"process_(\d+)")  # in the names of what Orbax and Grain write for each process


def write(checkpoint: pathlib.Path) -> None:
    """Writes the checksums of the files of a complete checkpoint that this process wrote."""
    index, count = jax.process_index(), jax.process_count()
    found = {}
    for path in files_below(checkpoint):
        name = path.relative_to(checkpoint).as_posix()
        writer = _WRITER.search(name)
        passing = path.name.startswith((".", "manifest_"))  # another process may be writing its own at this moment
        if (int(writer[1]) if writer else 0) == index and not passing:
            found[name] = {"bytes": size(path), "sha256": sha256_of_file(path)}
    record = {"version": MANIFEST_VERSION, "files": found}
    files.write_json(checkpoint / f"manifest_{index}-of-{count}.json", record, indent=1)


def find_damage(checkpoint: pathlib.Path) -> str:
    """Returns the first damaged file of a checkpoint and how, in a few words, in all processes alike; "" if none is.

    Raises UserError, in all processes, for an error of the machine.
    """
    found = ""
    with together(), read_explained(str(checkpoint)):
        found = _find_damage(checkpoint)
    return next(filter(None, gather(found)), "")


def _find_damage(checkpoint: pathlib.Path) -> str:
    recorded: dict[str, dict[str, Any]] = {}
    for path in children(checkpoint, _PATTERN):
        try:
            recorded |= json.loads(path.read_text())["files"]
        except (ValueError, KeyError, TypeError):
            return f"{path.name} is no manifest"
    for name in _share(recorded, jax.process_index(), jax.process_count()):
        path, entry = checkpoint / name, recorded[name]
        if not path.is_file():
            return f"{name} is missing"
        if size(path) != entry["bytes"]:
            return f"{name} has {size(path)} of {entry['bytes']} bytes"
        if sha256_of_file(path) != entry["sha256"]:
            return f"the checksum of {name} differs"
    return ""


def _share(recorded: dict[str, dict[str, Any]], index: int, count: int) -> list[str]:
    """Returns the names of the files that a process reads: of all alike many bytes, the large ones first."""
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(recorded, key=lambda name: (-recorded[name]["bytes"], name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += recorded[name]["bytes"]
    return shares[index]
