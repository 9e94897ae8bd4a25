"""Checksums of a checkpoint's files: written when it is complete, compared before it is restored.

Each process writes `manifest_I-of-N.json` in the checkpoint, of the files that it wrote; process 0 has the others, too.
Before a restore each process reads a share of the files. Those that no manifest lists, because the checkpoint is of an
older version or a process was killed before it wrote its own, are restored as they are; when that has succeeded they
get their checksums, in `manifest_resumed_I-of-N.json`: what changes from then on is noticed.
"""

import json
import pathlib
import re
from collections.abc import Iterator, Sequence
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
    index = jax.process_index()
    names = []
    for name in _names(checkpoint):
        writer = _WRITER.search(name)
        if (int(writer[1]) if writer else 0) == index:
            names.append(name)
    _write(checkpoint, "manifest", names)


def unlisted(checkpoint: pathlib.Path) -> list[str]:
    """Returns the files of a checkpoint that no manifest lists, in all processes alike.

    Raises UserError, in all processes, for an error of the machine.
    """
    found: list[str] = []
    with together(), read_explained(str(checkpoint)):
        listed = {name for path in children(checkpoint, _PATTERN) for name in _entries(path) or ()}
        found = [name for name in _names(checkpoint) if name not in listed]
    return found


def write_unlisted(checkpoint: pathlib.Path, names: Sequence[str]) -> None:
    """Writes the checksums of this process's share of `names`, the files that were unlisted."""
    sizes = {name: size(checkpoint / name) for name in names}
    _write(checkpoint, "manifest_resumed", _share(sizes, jax.process_index(), jax.process_count()))


def _write(checkpoint: pathlib.Path, manifest: str, names: Sequence[str]) -> None:
    """Writes the checksums of files, beside those that the manifest of this process may have already."""
    target = checkpoint / f"{manifest}_{jax.process_index()}-of-{jax.process_count()}.json"
    found = _entries(target) or {}
    for name in names:
        found[name] = {"bytes": size(checkpoint / name), "sha256": sha256_of_file(checkpoint / name)}
    files.write_json(target, {"version": MANIFEST_VERSION, "files": found}, indent=1)


def _names(checkpoint: pathlib.Path) -> Iterator[str]:
    """Yields the files of a complete checkpoint, without manifests: another process may be writing its own."""
    for path in files_below(checkpoint):
        if not path.name.startswith((".", "manifest_")):
            yield path.relative_to(checkpoint).as_posix()


def _entries(manifest: pathlib.Path) -> dict[str, dict[str, Any]] | None:
    """Returns bytes and checksums by file; {} if there is no such manifest, None if it is broken."""
    try:
        return dict(json.loads(manifest.read_text())["files"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        return None


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
        entries = _entries(path)
        if entries is None:
            return f"{path.name} is no manifest"
        recorded |= entries
    sizes = {name: int(entry["bytes"]) for name, entry in recorded.items()}
    for name in _share(sizes, jax.process_index(), jax.process_count()):
        path, entry = checkpoint / name, recorded[name]
        if not path.is_file():
            return f"{name} is missing"
        if size(path) != entry["bytes"]:
            return f"{name} has {size(path)} of {entry['bytes']} bytes"
        if sha256_of_file(path) != entry["sha256"]:
            return f"the checksum of {name} differs"
    return ""


def _share(sizes: dict[str, int], index: int, count: int) -> list[str]:
    """Returns the names of the files that a process reads: of all alike many bytes, the large ones first."""
    shares: list[list[str]] = [[] for _ in range(count)]
    loads = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    return shares[index]
