"""Writing files so that a reader, or a process killed half-way, never leaves or finds half of one; JSON, npz."""

import contextlib
import io
import json
import os
import pathlib
import time

import numpy as np
from etils import epath

from guided_distill.errors import UserError

_PUT_EVERY_SECONDS = 60.0


def in_bucket(path: epath.PathLike) -> bool:
    """Whether a path is of an object store, such as gs://, where nothing can be appended to or is seen half written."""
    return "://" in os.fspath(path)


class BucketFile:
    """A binary file of an object store, open for writing: kept in memory and put there whole, again and again.

    flush() puts it there at most once a minute and MiB, put() at once.
    """

    def __init__(self, path: epath.PathLike, clock=time.monotonic):
        self._path, self._content, self._clock = epath.Path(path), io.BytesIO(), clock
        self._put, self._put_at = 0, clock()

    def write(self, data: bytes) -> None:
        """Appends."""
        self._content.write(data)

    def flush(self) -> None:
        """Puts it there if that is due."""
        if self._clock() - self._put_at >= _PUT_EVERY_SECONDS * max(1, self._content.tell() / 2**20):
            self.put()

    def put(self) -> None:
        """Puts it there, unless it is."""
        if self._content.tell() != self._put:
            self._path.write_bytes(self._content.getvalue())
            self._put = self._content.tell()
        self._put_at = self._clock()

    def close(self) -> None:
        """Puts it there."""
        self.put()


def cache_directory() -> pathlib.Path:
    """Where this user keeps what can be made again: of XDG_CACHE_HOME, or ~/.cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "guided_distill"


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that does not depend on the working directory, as Orbax wants it; buckets stay as they are."""
    return epath.Path(path if in_bucket(path) else os.path.abspath(os.path.expanduser(path)))


def write_json(path, value):
    """Writes `value` as JSON, as `write_whole` writes."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_npz(path, **arrays):
    """Writes arrays as one npz, as `write_whole` writes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def read_json(path: epath.PathLike):
    """What a JSON file holds. Raises UserError where it is not JSON."""
    try:
        return json.loads(epath.Path(path).read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it, or delete it") from error


@contextlib.contextmanager
def naming(path: epath.PathLike):
    """Makes an OSError, such as of a full disk, name `path`: what a failed write raises names no file by itself."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes `content` under a temporary name beside `path` and renames it. Raises OSError that names it."""
    path = epath.Path(path)
    temporary = path.parent / (path.name + ".tmp")
    with naming(path):
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
