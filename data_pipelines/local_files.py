"""Local copies of the files of a prepared data set: memory maps and shard readers need a local disk."""

import dataclasses
import pathlib

from varedit_jax.errors import UserError
from varedit_jax.storage.disk import explained, read_explained
from varedit_jax.storage.files import copy, make_directory
from varedit_jax.storage.lock import waiting_lock
from varedit_jax.storage.paths import is_remote, local, size


@dataclasses.dataclass(frozen=True)
class LocalFiles:
    """The files of one data set. Those of a bucket are copied to a local directory on first use.

    A copy appears complete or not at all, and is made once per machine, however many threads and processes use it.
    """

    directory: pathlib.Path  # of the data set, anywhere
    digest: str  # of its index: a data set that is prepared again gets new copies
    cache_directory: str = ""  # local directory for the copies; only for a data set in a bucket

    def get(self, name: str, expected: int | None = None) -> pathlib.Path:
        """Returns a local path of DIRECTORY/`name`; in a local data set, it may not exist.

        Args:
          name: path relative to the data set, with slashes.
          expected: size in bytes, or None; a file in the bucket of another size is not copied.

        Raises UserError if there is no directory for copies, no room, or the network fails; FileNotFoundError if the
        bucket has no such file, and ValueError if its size differs.
        """
        source = self.directory / name
        if not is_remote(self.directory):
            return source
        if not self.cache_directory:
            raise UserError(
                f"{self.directory} is in an object store, and is read through copies on a local disk: give a directory "
                f"for them (--config.data.cache_directory, or --cache_directory), or mount the bucket (gcsfuse, "
                f"mountpoint-s3) and give the path of the mount"
            )
        target = local(self.cache_directory, "the directory for copies") / self.digest / name
        if not target.exists():
            with read_explained(str(source)):
                found = size(source)
            if expected not in (None, found):
                raise ValueError(f"{source} has {found} bytes, not {expected}")
            with explained(f"copy of {source}", target.parent):
                _copy(source, target, found)
        return target


def _copy(source: pathlib.Path, target: pathlib.Path, expected: int) -> None:
    make_directory(target.parent)
    with waiting_lock(target.with_name(f".{target.name}.lock")):
        if target.exists():  # another process was faster
            return
        copy(source, target)
        if (found := size(target)) != expected:
            target.unlink()
            raise ConnectionError(f"{found} of {expected} bytes came")
