"""Samples that lie on disk, of any program: a folder of pictures or an npz, as batches of images."""

import zipfile
import zlib

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError

from guided_distill.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_MODES = ("1", "L", "P", "RGB", "YCbCr")
_IMAGES, _LABELS = ("x", "arr_0", "samples", "images"), ("label", "arr_1", "labels")  # ours first, then ADM's


def open_samples(path: epath.PathLike):
    """`len(it)` images, and `it.batches(size)` yielding (index [b], x f32[b,H,W,C] in [-1, 1], label [b] or None).

    `path` is an npz (x or arr_0: uint8[N,H,W,C] or f32 in [-1, 1]; label or arr_1: classes), or a folder of pictures in
    the order of their names, with the classes where they lie in folders 0, 1, ... . Raises UserError, naming the file,
    for one that is missing, empty or no picture, and for pictures of several shapes.
    """
    path = epath.Path(path)
    if path.is_dir():
        return _Folder(path)
    if path.suffix != ".npz":
        raise UserError(f"--samples={path}: no such folder, and no npz")
    return _Arrays(path)


class _Arrays:
    def __init__(self, path):
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                names = list(arrays)
                image_key = next((name for name in _IMAGES if name in names), None)
                label_key = next((name for name in _LABELS if name in names), None)
                self.images = None if image_key is None else arrays[image_key]
                self.labels = None if label_key is None else arrays[label_key]
        except (OSError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"--samples={path} cannot be read as an npz of arrays ({error})") from error
        if self.images is None:
            raise UserError(f"--samples={path} holds {', '.join(names) or 'nothing'}; x or arr_0 is needed")
        if self.images.ndim != 4 or not len(self.images):
            raise UserError(f"--samples={path}: {image_key} is {self.images.shape}; images are [N, H, W, C]")
        self._check_labels(path)
        self._check_values(path, image_key)

    def _check_labels(self, path):
        labels = self.labels
        if labels is not None and (labels.shape != self.images.shape[:1] or labels.dtype.kind not in "iu"):
            raise UserError(
                f"--samples={path}: {len(self.images)} images and labels {labels.dtype} of shape {labels.shape}; one "
                "whole number for each image is needed"
            )

    def _check_values(self, path, image_key):
        images = self.images
        if images.dtype == np.uint8:
            return
        if images.dtype.kind != "f" or not np.isfinite(images).all():
            raise UserError(f"--samples={path}: {image_key} is {images.dtype}, not all numbers; save uint8 instead")
        low, high = images.min(), images.max()
        if low < -1.5 or high > 1.5 or low >= 0.0:
            raise UserError(
                f"--samples={path}: {image_key} lies in [{low:.3g}, {high:.3g}], and floats are taken as of [-1, 1]; "
                "save uint8 instead"
            )

    def __len__(self):
        return len(self.images)

    @property
    def shape(self):
        """(H, W, C)."""
        return self.images.shape[1:]

    def batches(self, size):
        for start in range(0, len(self), size):
            index = np.arange(start, min(start + size, len(self)))
            yield index, _scaled(self.images[index]), None if self.labels is None else self.labels[index]


class _Folder:
    def __init__(self, path):
        self._path = path
        self._files = sorted(f for level in ("*", "*/*") for f in path.glob(level) if f.suffix.lower() in SUFFIXES)
        if not self._files:
            raise UserError(f"--samples={path} holds no picture ({', '.join(SUFFIXES)})")
        self.shape = _read(self._files[0]).shape
        folders = ["" if f.parent == path else f.parent.name for f in self._files]
        classes = all(name.isdecimal() and len(name) < 7 for name in folders)
        self.labels = np.array(list(map(int, folders)), np.int32) if classes else None

    def __len__(self):
        return len(self._files)

    def batches(self, size):
        for start in range(0, len(self), size):
            index = np.arange(start, min(start + size, len(self)))
            images = [_read(self._files[i]) for i in index]
            for i, image in zip(index, images, strict=True):
                if image.shape != self.shape:
                    raise UserError(f"{self._files[i]} is {image.shape}, the first picture {self.shape}")
            yield index, _scaled(np.stack(images)), None if self.labels is None else self.labels[index]


def _read(file):
    try:
        with file.open("rb") as stream, Image.open(stream) as image:
            if image.mode not in _MODES or "transparency" in image.info:
                raise UserError(f"{file} is of mode {image.mode}; save it as 8-bit grey or RGB, without transparency")
            grey = image.mode in ("1", "L")
            return np.asarray(image.convert("L" if grey else "RGB")).reshape(*image.size[::-1], 1 if grey else 3)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise UserError(f"{file} cannot be read as a picture ({error}); remove it, or write it anew") from error


def read_picture(path, flag):
    """A picture file as f32[H,W,C] in [-1, 1]. Raises UserError that names the flag it came by, or the file."""
    if not epath.Path(path).is_file():
        raise UserError(f"{flag}={path}: no such file")
    return _scaled(_read(epath.Path(path)))


def _scaled(images):
    x = images.astype(np.float32)
    return x / 127.5 - 1.0 if images.dtype == np.uint8 else x
