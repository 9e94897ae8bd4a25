"""Pictures that lie unpacked in folders, found by the names that annotations have for them."""

import pathlib
from collections.abc import Sequence

from data_pipelines.sources.entries import MAX_FILE_BYTES, Reason, safe_name


def read_below(folders: Sequence[pathlib.Path], name: object) -> bytes | Reason:
    """Bytes of the file `name` in the first folder that has it; MISSING, UNSAFE or SIZE if there are none.

    A name never leads out of the folders, not over links either.
    """
    plain = safe_name(name)
    if plain is None:
        return Reason.UNSAFE if name else Reason.MISSING
    for folder in folders:
        path = folder / plain
        if path.is_file():
            if not path.resolve().is_relative_to(folder.resolve()):
                return Reason.UNSAFE
            return path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else Reason.SIZE
    return Reason.MISSING
