"""Writing a file so that a reader, or a process killed half-way, never leaves or finds half of one; reading JSON."""

import contextlib
import json
import os

from etils import epath

from guided_distill.errors import UserError


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that does not depend on the working directory, as Orbax wants it; buckets stay as they are."""
    return epath.Path(path if "://" in os.fspath(path) else os.path.abspath(os.path.expanduser(path)))


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
