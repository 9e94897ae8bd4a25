"""Changes of Orbax's behavior: object stores, directory names and log lines."""

import logging
import os
from typing import TYPE_CHECKING

from varedit_jax.errors import UserError
from varedit_jax.lazy import LazyModule
from varedit_jax.storage.paths import kvstore

if TYPE_CHECKING:
    import orbax.checkpoint as ocp
else:
    ocp = LazyModule("orbax.checkpoint")

__all__ = ["check_directory", "checkpointer", "ocp", "quiet_orbax", "support_object_stores"]


def quiet_orbax() -> None:
    """Keeps Orbax's log lines off the screen: whatever concerns the user is raised as an error."""
    logger = logging.getLogger("absl")
    if _not_from_orbax not in logger.filters:
        logger.addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def check_directory(directory: os.PathLike[str] | str) -> None:
    """Raises UserError for a directory in which Orbax would write checkpoints that it cannot read.

    Orbax 0.12.8 lists the directories of its processes with glob, in which "[...]" is a set of characters: it then
    merges nothing, and checkpoints have no manifest (`ocdbt_utils`, `directory.glob("ocdbt.process_*")`).
    """
    text = os.fspath(directory)
    if "[" in text:
        raise UserError(f"{text} has a [ in its name, and checkpoints there could not be read; use another directory")


def support_object_stores() -> None:
    """Makes Orbax write to s3:// like gs://, and accept names with any characters in both.

    Orbax 0.12.8 makes TensorStore specs of local paths and gs:// only ("Checkpoint path should be absolute. Got
    s3:/..."), and takes a `#` or `?` in a name for the end of a URL's path (`gcs_utils.parse_gcs_path`). It treats a
    path as an object store if it begins with `_GCS_PATH_PREFIX`: then a checkpoint is complete once its marker is
    there, and nothing is renamed.
    """
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils

    if gcs_utils.get_kvstore_for_gcs is _spec:
        return
    gcs_utils._GCS_PATH_PREFIX = _PREFIXES
    gcs_utils.get_kvstore_for_gcs = _spec
    normalize = tensorstore_utils._normalize_path
    tensorstore_utils._normalize_path = lambda path: str(normalize(path)).replace("s3:/", "s3://")
    tensorstore_utils._use_gcs_driver = lambda directory: directory.startswith(_PREFIXES)


_PREFIXES = ("gs://", "s3://")


def _spec(path: str) -> dict[str, object]:
    """Returns TensorStore's key-value store of a path, without the final slash, which Orbax adds."""
    found = kvstore(path)
    return {**found, "path": found["path"].rstrip("/")}


def checkpointer(handler: "ocp.CheckpointHandler") -> "ocp.Checkpointer":
    """Returns a synchronous checkpointer that is quiet and works on every kind of storage."""
    support_object_stores()
    return ocp.Checkpointer(handler)


quiet_orbax()  # on import: handlers write lines as soon as they are made, before `checkpointer` gets them
