"""Writing a file so that a reader, or a process killed half-way, never leaves or finds half of one."""

from etils import epath


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes `content` under a temporary name beside `path` and renames it."""
    path = epath.Path(path)
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)
