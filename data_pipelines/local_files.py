"""Files of a prepared data set on a local disk, where memory maps and readers of shards need them."""

import dataclasses
import pathlib

import filelock

from varedit_jax.errors import UserError
from varedit_jax.storage.disk import explained, read_explained
from varedit_jax.storage.files import copy, make_directory
from varedit_jax.storage.paths import is_remote, local, size


@dataclasses.dataclass(frozen=True)
class LocalFiles:
    """The files of one data set. Those of a bucket are copied into a local directory when they are first asked for.

    A copy appears whole or not at all, and once on a machine, however many threads and processes ask for it.
    """

    directory: pathlib.Path  # of the data set, anywhere
    digest: str  # of its index, so that a data set that was prepared anew has other copies
    cache_directory: str = ""  # local, for the copies; nothing needs it where the data set is local

    def get(self, name: str, expected: int | None = None) -> pathlib.Path:
        """Returns a local file with the content of DIRECTORY/`name`, which may not exist where the data set is local.

        Args:
          name: with slashes.
          expected: bytes that it has to have, or None. A file in the bucket of another size is not copied.

        Raises UserError if there is no directory for copies, no room, or the network fails; FileNotFoundError,
        ValueError if the bucket has no such file, or one of another size.
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
    with filelock.FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():  # by another process, meanwhile
            return
        copy(source, target)
        if (found := size(target)) != expected:
            target.unlink()
            raise ConnectionError(f"{found} of {expected} bytes came")
