"""Orbax on object stores, and quiet: the places where its own behavior has to be changed."""

import logging
import os

import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from varedit_jax.errors import UserError
from varedit_jax.storage.paths import kvstore


def quiet_orbax() -> None:
    """Keeps Orbax's log lines off the screen: what it has to say to the user reaches him as an error."""
    logger = logging.getLogger("absl")
    if _not_from_orbax not in logger.filters:
        logger.addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def check_directory(directory: os.PathLike[str] | str) -> None:
    """Raises UserError for a directory in which Orbax would write checkpoints that it cannot read.

    Orbax 0.12.8 lists the directories of its processes with glob, in which "[...]" is a set of characters: it then
    merges nothing, and what was saved has no manifest (`ocdbt_utils`, `directory.glob("ocdbt.process_*")`).
    """
    text = os.fspath(directory)
    if "[" in text:
        raise UserError(f"{text} has a [ in its name, and checkpoints there could not be read; use another directory")


def support_object_stores() -> None:
    """Makes Orbax write to s3:// as it does to gs://, and to names with any characters in both.

    Orbax 0.12.8 makes specs for TensorStore of local paths and gs:// alone ("Checkpoint path should be absolute. Got
    s3:/..."), and takes a `#` or `?` in a name for the end of a URL's path (`gcs_utils.parse_gcs_path`). A store is one
    to it if `_GCS_PATH_PREFIX` has its prefix: then a checkpoint is complete when its marker is there, and
    nothing is renamed.
    """
    if gcs_utils.get_kvstore_for_gcs is _spec:
        return
    gcs_utils._GCS_PATH_PREFIX = _PREFIXES
    gcs_utils.get_kvstore_for_gcs = _spec
    normalize = tensorstore_utils._normalize_path
    tensorstore_utils._normalize_path = lambda path: str(normalize(path)).replace("s3:/", "s3://")
    tensorstore_utils._use_gcs_driver = lambda directory: directory.startswith(_PREFIXES)


_PREFIXES = ("gs://", "s3://")


def _spec(path: str) -> dict[str, object]:
    """Returns TensorStore's key-value store of a path, without the slash that Orbax adds itself."""
    found = kvstore(path)
    return {**found, "path": found["path"].rstrip("/")}


def checkpointer(handler: ocp.CheckpointHandler) -> ocp.Checkpointer:
    """Returns a synchronous checkpointer that is quiet and works on every kind of storage."""
    quiet_orbax()
    support_object_stores()
    return ocp.Checkpointer(handler)
