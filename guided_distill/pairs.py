"""Pictures with captions or classes as they lie about: a folder of files, webdataset shards, or a set of TFDS.

Each is a random-access source of records {"image": uint8 [size, size, C], "label": int32, "text": str}.
"""

import dataclasses
import functools
import io
import pathlib
import tarfile
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from guided_distill.errors import UserError

PREFIX = "folder:"
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def crop_and_resize(image: np.ndarray, size: int) -> np.ndarray:
    """Central square along the short side, then area resize: uint8[H,W,C] -> uint8[size,size,C].

    The convention of Salimans & Ho (arXiv 2202.00512): the crop starts at h//2 - w//2, and a new pixel is the mean of
    the old ones it covers, weighted by the covered area (tf.image.resize "area"), here rounded to the nearest integer.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = height // 2 - side // 2, width // 2 - side // 2
    square = image[top : top + side, left : left + side].astype(np.float32)
    weights = _area_weights(side, size)
    resized = np.tensordot(weights, np.tensordot(weights, square, axes=(1, 0)), axes=(1, 1))
    return np.rint(resized).astype(np.uint8).swapaxes(0, 1)


@functools.lru_cache(maxsize=32)  # of photographs a table is some MB
def _area_weights(old: int, new: int) -> np.ndarray:
    """f32[new,old]: the share of old pixel j in new pixel i, by the length of their overlap."""
    edges = np.linspace(0, old, new + 1)
    low, high = edges[:-1, None], edges[1:, None]
    overlap = np.minimum(high, np.arange(1, old + 1)) - np.maximum(low, np.arange(old))
    return (np.maximum(overlap, 0) * (new / old)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Bytes:
    """Where the bytes of a file are: the whole of `path`, or a part of it that is a member of an archive."""

    path: pathlib.Path
    offset: int = 0
    size: int = -1

    def read(self):
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclasses.dataclass(frozen=True)
class _Pair:
    name: str
    picture: _Bytes
    caption: _Bytes | None
    label: _Bytes | int


@dataclasses.dataclass(frozen=True, eq=False)
class PairSource:
    """The pairs of a folder, decoded as they are read: cut to the central square and resized to `size`."""

    pairs: list[_Pair]
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict:
        pair = self.pairs[i]
        label = pair.label if isinstance(pair.label, int) else _number(pair.label.read(), pair.name)
        text = "" if pair.caption is None else pair.caption.read().decode("utf-8", "replace").strip()
        image = read_square(pair.picture.read(), self.size, self.channels, pair.name)
        return {"image": image, "label": np.int32(label), "text": text}


@dataclasses.dataclass(frozen=True, eq=False)
class ResizedRecords:
    """The records of a TFDS split with undecoded pictures, as those of a PairSource."""

    records: Any
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        record = self.records[i]
        text = record.get("text", "")
        return {
            "image": read_square(record["image"], self.size, self.channels, f"record {i}"),
            "label": np.int32(record.get("label", 0)),
            "text": text.decode() if isinstance(text, bytes) else text,
        }


def read_square(content: bytes, size: int, channels: int, name: str) -> np.ndarray:
    """An encoded picture as uint8 [size, size, channels]. Raises UserError, naming it, for what is no picture."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image)
            pixels = np.asarray(upright.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is no picture that can be read ({error}); remove it, or replace it") from error
    return crop_and_resize(pixels.reshape(*pixels.shape[:2], channels), size)


def open_pairs(folder, size: int, channels: int = 3, *, captioned: bool = False) -> PairSource:
    """The pairs of a folder, in the order of their names.

    Pictures (.jpg, .png, .webp) with a caption of the same name (.txt) and a class (.cls, a number), in subfolders or
    in webdataset shards (.tar); a picture without .cls has the number of its subfolder among all, in order of names.
    Raises UserError for a folder that is missing or holds no pictures, archives that cannot be read, and where all are
    to be `captioned` a picture without a caption.
    """
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of pictures")
    archives = sorted(folder.glob("**/*.tar"))
    files = [*_files(folder), *(member for archive in archives for member in _members(folder, archive))]
    found = dict(files)
    pictures = sorted(name for name in found if name.lower().endswith(_PICTURES))
    if not pictures:
        raise UserError(f"{folder} holds no pictures ({', '.join(_PICTURES)}) and no .tar of some")
    pairs = _paired(pictures, found)
    bare = next((pair.name for pair in pairs if captioned and pair.caption is None), None)
    if bare is not None:
        raise UserError(f"{folder}: {bare} has no caption; write it to a file of the same name that ends in .txt")
    return PairSource(pairs, size, channels)


def _paired(pictures, found):
    beside = {name.lower(): place for name, place in found.items()}
    classes = {name: i for i, name in enumerate(sorted({_directory(name) for name in pictures}))}
    pairs = []
    for name in pictures:
        stem = name[: name.rindex(".")]
        label = beside.get(f"{stem}.cls".lower(), classes[_directory(name)])
        pairs.append(_Pair(name, found[name], beside.get(f"{stem}.txt".lower()), label))
    return pairs


def _directory(name):
    return name.rpartition("/")[0]


def _files(folder):
    wanted = (*_PICTURES, ".txt", ".cls")
    for path in folder.glob("**/*"):
        hidden = path.name.startswith(".")  # as macOS leaves one beside each file
        if path.suffix.lower() in wanted and path.is_file() and not hidden:
            yield path.relative_to(folder).as_posix(), _Bytes(path)


def _members(folder, archive):
    """(name, where it is) of the members of a tar file: uncompressed, so that each is a part of it."""
    try:
        with tarfile.open(archive, "r:") as tar:
            # The shards of a set are no classes: no name of a member has a directory.
            shard = archive.relative_to(folder).as_posix()
            members = [m for m in tar if m.isfile() and not m.name.rpartition("/")[2].startswith(".")]
            names = [f"{shard}:{member.name}".replace("/", ":") for member in members]
            places = [_Bytes(archive, member.offset_data, member.size) for member in members]
            return list(zip(names, places, strict=True))
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{archive} is no uncompressed tar file ({error})") from error


def _number(content, name):
    try:
        return int(content)
    except ValueError as error:
        raise UserError(f"the class of {name} is {content[:20]!r}; a .cls file holds one number") from error
