"""Paths: the only place that turns a user's text into one; no character acts as a pattern or part of a URL."""

import fnmatch
import importlib.resources
import importlib.util
import os
import pathlib
import posixpath
import re
from collections.abc import Iterator
from typing import Any, cast

import fsspec
from etils import epath

from varedit_jax.errors import UserError
from varedit_jax.starting import needs

PathLike = str | os.PathLike[str]

EXTRAS = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}  # scheme -> (extra to install, its module)
SHIPPED = ("varedit_jax/data", "experiments/configs")  # directories that come with the packages
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/+)")
_LONGEST_NAME = 255  # bytes of one name in a path


def resolve(path: PathLike) -> pathlib.Path:
    """Returns the absolute path of a user's text, of any scheme; nothing is created.

    In local paths `~` is expanded and `..` resolved. A path into one of `SHIPPED` is that of the installed packages if
    the working directory has nothing there. gs://BUCKET/... and s3://BUCKET/... are kept. Raises UserError for
    a scheme that is unknown or whose extra is not installed, and for names that no file can have.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise UserError(f"the path {text!r} is bytes; give text")
    _check_names(text)
    scheme = _SCHEME.match(text)
    if scheme is None:
        try:
            return _shipped(text) or pathlib.Path(os.path.abspath(pathlib.Path(text).expanduser()))
        except RuntimeError as error:
            raise UserError(f"{text}: {error}; give the path without ~") from error
    name, slashes = scheme.groups()
    if name not in EXTRAS or slashes != "//":
        raise UserError(
            f"{text!r} has the scheme {name}:{slashes}; paths are local, gs://BUCKET/... or s3://BUCKET/..."
        )
    extra, module = EXTRAS[name]
    if importlib.util.find_spec(module) is None:
        raise UserError(needs(text, module, extra))
    bucket, _, key = text[scheme.end() :].partition("/")
    if not bucket:
        raise UserError(f"{text!r} names no bucket; give {name}://BUCKET/...")
    key = posixpath.normpath(f"/{key}").lstrip("/")
    return cast(pathlib.Path, epath.Path(f"{name}://{bucket}/{key}".rstrip("/")))


def _shipped(text: str) -> pathlib.Path | None:
    """Returns the installed file or directory of this name, unless the working directory has one; None if none is."""
    parts = pathlib.PurePath(text).parts
    if "/".join(parts[:2]) not in SHIPPED or os.path.lexists(text):
        return None
    path = pathlib.Path(str(importlib.resources.files(parts[0]).joinpath(*parts[1:])))
    return path if path.exists() else None


def _check_names(text: str) -> None:
    """Raises UserError for text that cannot name a file."""
    if not text:
        raise UserError("the path is empty; name a file or directory")
    try:
        names = text.encode().split(b"/")
    except UnicodeEncodeError as error:
        raise UserError(f"the path {text!r} is not valid UTF-8; rename the file or directory") from error
    if "\0" in text:
        raise UserError(f"the path {text!r} has a null character; take it out")
    longest = max(names, key=len)
    if len(longest) > _LONGEST_NAME:
        raise UserError(
            f"the path has a name of {len(longest)} bytes, {longest[:20].decode(errors='ignore')}..., and "
            f"{_LONGEST_NAME} are possible; choose a shorter one"
        )


def is_remote(path: PathLike) -> bool:
    """Returns True if a path lies in an object store."""
    match = _SCHEME.match(os.fspath(path))
    return match is not None and match.group(1) in EXTRAS


def local(path: PathLike, what: str) -> pathlib.Path:
    """Returns `resolve` of a path that must be local. Raises UserError, naming `what`, for an object store."""
    if is_remote(path):
        raise UserError(f"{what} is {os.fspath(path)}, but it has to be on a local disk; give a local path")
    return resolve(path)


def child_names(directory: pathlib.Path, pattern: str = "*") -> list[str]:
    """Returns the sorted names in a directory that match `pattern`; [] if there is no such directory.

    The directory's own name is not a pattern.
    """
    try:
        names = [path.name for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in names if name and fnmatch.fnmatchcase(name, pattern))


def children(directory: pathlib.Path, pattern: str = "*") -> list[pathlib.Path]:
    """Returns the paths in a directory whose names match `pattern`, sorted by name."""
    return [directory / name for name in child_names(directory, pattern)]


def files_below(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields every file in a directory and its subdirectories, in the order of their paths."""
    if is_remote(directory):  # one listing instead of a request per object
        scheme, _, root = os.fspath(directory).partition("://")
        names = sorted(fsspec.filesystem(scheme).find(root)) if directory.exists() else []
        yield from (directory / name.removeprefix(f"{root}/") for name in names)
        return
    for path in children(directory):
        if path.is_dir():
            yield from files_below(path)
        else:
            yield path


def size(path: pathlib.Path) -> int:
    """Returns the size of a file in bytes."""
    stat = path.stat()
    return int(stat.st_size if hasattr(stat, "st_size") else cast(Any, stat).length)


def stamp(path: pathlib.Path) -> list[Any]:
    """Returns path, size and modification time of a file, which change when the file does."""
    stat = path.stat()
    changed = stat.st_mtime_ns if hasattr(stat, "st_mtime_ns") else cast(Any, stat).mtime
    return [str(path), size(path), changed]


def kvstore(directory: PathLike) -> dict[str, Any]:
    """Returns TensorStore's key-value store of a directory as fields, in which no character is special.

    An endpoint of S3 other than Amazon's is read from AWS_ENDPOINT_URL, the region from AWS_REGION.
    """
    text = os.fspath(directory)
    if not is_remote(text):
        return {"driver": "file", "path": f"{os.path.abspath(text)}/"}
    scheme, _, rest = text.partition("://")
    bucket, _, key = rest.partition("/")
    place = {"bucket": bucket, "path": f"{key.rstrip('/')}/" if key else ""}
    if scheme == "gs":
        return {"driver": "gcs", **place}
    spec = {"driver": "s3", **place}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        spec["aws_region"] = region
    return spec
