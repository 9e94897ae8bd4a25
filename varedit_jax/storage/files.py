"""Files and directories that appear complete or not at all.

Local files and directories are written beside their destination, made durable, and renamed. In an object store a single
object is atomic; a directory is written in place, with a marker in it until it is complete.
"""

import contextlib
import errno
import io
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from varedit_jax.errors import UserError
from varedit_jax.storage import disk
from varedit_jax.storage.paths import child_names, files_below, is_remote, size
from varedit_jax.storage.pointers import what_instead

INCOMPLETE = "_INCOMPLETE"  # in an object store: the directory is still being written, or its writer has died


def followed(path: pathlib.Path) -> pathlib.Path:
    """Returns where a symbolic link at `path` points to, whether that exists or not; `path` itself if it is no link.

    Whatever is written to a link is written there, and the link stays. Raises UserError for a link to itself.
    """
    if is_remote(path) or not path.is_symlink():
        return path
    target = pathlib.Path(os.path.realpath(path))
    if target.is_symlink():
        raise UserError(f"{path} is a link that leads back to itself; remove it")
    return target


def make_directory(directory: pathlib.Path) -> None:
    """Creates a directory where needed; for a link, the one it points to. Raises UserError if that fails."""
    try:
        followed(directory).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        above = (directory, *directory.parents)
        if link := next((path for path in above if path.is_symlink() and not path.exists()), None):
            raise UserError(f"{link} is a link to {os.readlink(link)}, which does not exist; create that") from error
        file = next((path for path in above if path.is_file()), directory)
        raise UserError(f"{file} is a file, where a directory should be") from error
    except Exception as error:
        if not isinstance(error, OSError) and not disk.is_machine_error(error):
            raise
        raise UserError(f"cannot create {directory}: {disk.reason(error)}") from error


def make_durable(file: BinaryIO | io.FileIO) -> None:
    """Returns when what was written to an open local file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def take_place(draft: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a complete local file its name, at once, in place of whatever has it."""
    draft.replace(path)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Yields a binary file that replaces `path`, or what a link points to, when the block ends without an error."""
    path = followed(path)
    if is_remote(path):
        with tempfile.TemporaryFile() as file:
            yield cast(BinaryIO, file)
            file.seek(0)
            with path.open("wb") as target:
                shutil.copyfileobj(file, target, 2**24)
        return
    draft = path.with_name(f".{uuid.uuid4().hex}.draft")
    try:
        with draft.open("xb") as file:
            yield file
            make_durable(file)
        take_place(draft, path)
    finally:
        with contextlib.suppress(OSError):  # it was renamed if all went well
            draft.unlink()


def write_bytes(path: pathlib.Path, data: bytes | memoryview) -> None:
    """Replaces a file atomically."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: pathlib.Path, value: Any, indent: int | None = 2) -> None:
    """Replaces a JSON file atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def read_json(path: pathlib.Path) -> Any:
    """Returns the value in a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises ValueError if it is no JSON, and UserError if it is what a download left instead.
    """
    data = path.read_bytes()
    if instead := what_instead(data):
        raise UserError(f"{path} {instead}")
    return json.loads(data)


def staging_of(target: pathlib.Path) -> pathlib.Path:
    """Returns the directory that `target` is written in until `commit`: beside it, or, in an object store, itself."""
    target = followed(target)
    return target if is_remote(target) else target.with_name(f".{target.name}.partial")


def begin(target: pathlib.Path) -> pathlib.Path:
    """Creates the staging directory of `target`, unless an earlier attempt left it, and returns it."""
    staging = staging_of(target)
    make_directory(staging)
    if is_remote(target):
        (staging / INCOMPLETE).write_text("incomplete: run the same command again, or delete the directory\n")
    return staging


def commit(target: pathlib.Path) -> None:
    """Completes `target`, atomically, with the contents of its staging directory."""
    if is_remote(target):
        (target / INCOMPLETE).unlink()
    else:
        staging_of(target).rename(followed(target))


def is_complete(directory: pathlib.Path) -> bool:
    """Returns True unless a directory of an object store is still being written, or its writer has died."""
    return not is_remote(directory) or not (directory / INCOMPLETE).exists()


def check_complete(directory: pathlib.Path) -> None:
    """Raises UserError if a directory of an object store is still being written, or its writer has died."""
    if not is_complete(directory):
        raise UserError(
            f"{directory} is incomplete: it is still being written, or what wrote it was interrupted; run the command "
            f"that writes it again"
        )


def exists(target: pathlib.Path) -> bool:
    """Returns True if a complete file or directory is at `target`."""
    return target.exists() and is_complete(target)


@contextlib.contextmanager
def new_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty local directory that becomes `target` when the block ends without an error.

    Raises UserError if `target` exists.
    """
    target = followed(target)
    if exists(target):
        raise UserError(f"{target} exists; give a new directory or remove it first")
    if is_remote(target):
        with tempfile.TemporaryDirectory() as name:
            yield pathlib.Path(name)
            upload(pathlib.Path(name), target)
        return
    staging = staging_of(target)
    shutil.rmtree(staging, ignore_errors=True)  # of a writer that was killed
    try:
        make_directory(staging)
        yield staging
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def task_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields an empty local directory that becomes `target` when the block ends without an error.

    Any number of processes may do the same task at once: the first to end gives its directory the name.
    """
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        make_directory(draft)
        yield draft
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def move_directory(source: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a directory: a local one at once or, to another file system, by way of a directory beside `target`.

    In an object store its files are moved one by one.
    """
    if is_remote(source):
        for path in files_below(source):
            copy(path, target / path.relative_to(source).as_posix())
        remove_directory(source)
        return
    try:
        take_place(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with new_directory(target) as staging:
            shutil.copytree(source, staging, dirs_exist_ok=True)
        shutil.rmtree(source)


def upload(source: pathlib.Path, target: pathlib.Path, *, keep: bool = False) -> None:
    """Copies a local directory to an object store, where it is incomplete until all files are there.

    What an interrupted attempt left is removed, or with `keep` stays, and what is there in its size is not copied.
    """
    if not keep:
        remove_directory(target)
    begin(target)
    for path in files_below(source):
        there = target / path.relative_to(source).as_posix()
        if not (keep and there.exists() and size(there) == size(path)):
            copy(path, there)
    commit(target)


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file between any kinds of storage, atomically."""
    with source.open("rb") as data, replacing(target) as file:
        shutil.copyfileobj(data, file, 2**24)


def remove_directory(directory: pathlib.Path) -> None:
    """Removes a directory and its contents, if it exists."""
    if is_remote(directory):
        if directory.exists():
            cast(Any, directory).rmtree()
    else:
        shutil.rmtree(directory, ignore_errors=True)


def listing(directory: pathlib.Path) -> str:
    """Returns the contents of a directory, in a few words."""
    names = child_names(directory)
    if not names:
        return "nothing"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
