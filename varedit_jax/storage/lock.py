"""One writer per directory: a lock that is released however its holder ends."""

import contextlib
import errno
import json
import os
import pathlib
import signal
import socket
import threading
import time
import uuid
from typing import Any, Self

import filelock

from varedit_jax.errors import TemporaryError, UserError
from varedit_jax.storage import disk
from varedit_jax.storage.files import make_directory, write_json
from varedit_jax.storage.paths import PathLike, is_remote, resolve
from varedit_jax.storage.ranges import read_whole

LOCK_FILE = "lock"
HEARTBEAT_SECONDS = 20.0
EXPIRY_SECONDS = 90.0  # of a lease without a heartbeat; its holder has died, or lost the network


class Lock:
    """Marks a directory as in use. A context manager.

    Locally it is a kernel lock on DIRECTORY/lock, released with the process; file systems without locks get none. In an
    object store it is a lease: an object that names its owner and is renewed by a thread. If two processes take a free
    one at once, the last writer has it; a holder that cannot renew it in time ends itself.
    """

    def __init__(self, directory: PathLike, *, flag: str = "--workdir", held: bool = True) -> None:
        """Locks nothing yet.

        Args:
          directory: created if needed.
          flag: the flag to change, for the message of a refusal.
          held: False in processes that leave the lock to another process of the same run.
        """
        self._directory, self._flag, self._held = resolve(directory), flag, held
        self._file: filelock.BaseFileLock | None = None
        self._lease: _Lease | None = None

    def __enter__(self) -> Self:
        """Takes the lock. Raises TemporaryError if another process has it, UserError if there can be no directory."""
        if not self._held:
            return self
        make_directory(self._directory)
        path = self._directory / LOCK_FILE
        if is_remote(path):
            self._lease = _Lease(path)
            with disk.explained(LOCK_FILE, self._directory):
                owner = self._lease.take()
            if owner is not None:
                raise self._refusal(owner)
            return self
        try:
            self._file = filelock.UnixFileLock(path, timeout=0, fallback_to_soft=False)
            self._file.acquire()
        except filelock.Timeout as error:
            raise self._refusal(_read(path)) from error
        except OSError as error:
            self._file = None
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # no locks on this file system
                return self
            raise UserError(f"cannot write {path}: {disk.reason(error)}") from error
        with contextlib.suppress(OSError):
            path.write_text(json.dumps(_me()))
        return self

    def __exit__(self, *exception: object) -> None:
        """Releases the lock. A local file stays: removing it could break the lock of a waiting process."""
        if self._file is not None:
            self._file.release()
        if self._lease is not None:
            self._lease.release()

    def _refusal(self, owner: dict[str, Any]) -> TemporaryError:
        who = f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another run"
        return TemporaryError(f"{self._directory} is in use by {who}; wait for it, end it, or use another {self._flag}")


def waiting_lock(path: pathlib.Path) -> filelock.BaseFileLock:
    """Returns a context manager that holds the kernel's lock on a local file, waiting for whoever has it."""
    return filelock.FileLock(path)


class _Lease:
    """An object with the owner and the time of the last renewal."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._id = uuid.uuid4().hex
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> dict[str, Any] | None:
        """Takes the lease and starts renewing it; if it is taken and has not expired, returns its owner instead."""
        owner = _read(self._path)
        if time.time() - float(owner.get("renewed", 0)) < EXPIRY_SECONDS:
            return owner
        self._write()
        time.sleep(1)  # if two found it free, the last writer has it
        owner = _read(self._path)
        if owner.get("id") != self._id:
            return owner
        self._thread.start()
        return None

    def release(self) -> None:
        """Stops the renewal and removes the lease, if it is still this one."""
        if not self._thread.is_alive():
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # without the network it expires by itself
            if _read(self._path).get("id") == self._id:
                self._path.unlink()

    def _write(self) -> None:
        write_json(self._path, {**_me(), "id": self._id, "renewed": time.time()}, indent=None)

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(HEARTBEAT_SECONDS):
            lost = time.monotonic() - renewed > EXPIRY_SECONDS
            with contextlib.suppress(Exception):  # a transient network failure; the next heartbeat may succeed
                lost = lost or _read(self._path).get("id", self._id) != self._id
                if not lost:
                    self._write()
                    renewed = time.monotonic()
            if lost:  # another process has it, or may take it: end as by SIGTERM, before both write
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Returns the holder named in a lock file; {} if the file is just being written, absent or broken.

    Raises the storage's error if the file cannot be read: it may name a holder.
    """
    try:
        return dict(json.loads(read_whole(path)))
    except (FileNotFoundError, ValueError, TypeError):
        return {}
