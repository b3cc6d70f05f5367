"""Writing a file so that a reader, or a process killed half-way, never leaves or finds half of one."""

import os

from etils import epath


def absolute(path: epath.PathLike) -> epath.Path:
    """A path that does not depend on the working directory, as Orbax wants it; buckets stay as they are."""
    return epath.Path(path if "://" in os.fspath(path) else os.path.abspath(os.path.expanduser(path)))


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes `content` under a temporary name beside `path` and renames it."""
    path = epath.Path(path)
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
