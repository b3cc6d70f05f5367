"""Sets of latents on disk: what --mode=encode writes and training reads.

A folder with latents.json and shards <split>-00000-of-00004.array_record. A record is a safetensors of "mean" f16
[h, w, C], "label" i32 [1], "caption" u8 [n], and where there are any "std" f16 [h, w, C] of the posterior, "text" f16
[L, D] of its caption, "mask" u8 [h, w, 1] and "masked" f16 [h, w, C] of what is to be painted in; those of the flipped
picture end in "_flipped". Latents are scaled, as diffusion runs on them.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from guided_distill.errors import UserError
from guided_distill.files import read_json

PREFIX = "latents:"
ABOUT, UNFINISHED = "latents.json", "encoding.json"
VERSION = 1
FLIPPED = "_flipped"
_OF_COND = ("text", "mask", "masked")  # fields of a record that the network is given, under these names


@dataclasses.dataclass(frozen=True)
class About:
    """What a set of latents was made with, latents.json."""

    shape: tuple[int, ...]  # of a latent
    source: str
    model_hash: str  # SHA-256 of the weights that encoded
    posterior: bool  # whether records have "std"
    flips: bool
    text: tuple[int, int] | None  # [L, D] of an embedded caption
    null_text: list[float] | None  # the empty caption embedded, [L * D]
    inpainting: bool
    num_classes: int  # labels are 0 .. num_classes - 1
    counts: dict[str, int]  # records of each split
    shards: dict[str, int]
    version: int = VERSION


def read_about(folder) -> About:
    """latents.json of a folder. Raises UserError where there is none, it is unfinished, or of another version."""
    folder = local(folder)
    if (folder / UNFINISHED).exists() and not (folder / ABOUT).exists():
        raise UserError(f"{folder} is not finished; give the same --mode=encode command again, and it goes on")
    if not (folder / ABOUT).exists():
        raise UserError(f"data.name: {folder} holds no {ABOUT}; make it with --mode=encode")
    said = read_json(folder / ABOUT)
    if said.get("version") != VERSION:
        raise UserError(f"{folder / ABOUT} is of version {said.get('version')}, this program reads {VERSION}")
    try:
        about = About(**said)
    except TypeError as error:
        raise UserError(f"{folder / ABOUT} is not this program's ({error}); encode the set again") from error
    return dataclasses.replace(about, shape=tuple(about.shape), text=about.text and tuple(about.text))


def local(folder) -> pathlib.Path:
    """A folder of this machine, or of storage that is mounted here. Raises UserError for a bucket."""
    if "://" in str(folder):
        raise UserError(f"{folder}: latents lie in a folder; mount the bucket, and name the folder it is mounted at")
    return pathlib.Path(folder).expanduser()


def shard_path(folder, split: str, k: int, count: int) -> pathlib.Path:
    """Where shard k of `count` of a split lies."""
    return pathlib.Path(folder) / f"{split}-{k:05d}-of-{count:05d}.array_record"


def open_latents(folder, split: str):
    """The LatentSource of a split. Raises UserError for what is missing."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    folder, about = local(folder), read_about(folder)
    if not about.counts.get(split):
        known = ", ".join(name for name, count in about.counts.items() if count)
        raise UserError(f"data: {folder} has no split {split!r}; it has {known}")
    paths = [shard_path(folder, split, k, about.shards[split]) for k in range(about.shards[split])]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is missing: the set of latents is incomplete; give --mode=encode again")
    null_text = None
    if about.text is not None:
        null_text = np.asarray(about.null_text, np.float32).reshape(about.text)
    return LatentSource(ArrayRecordDataSource([str(path) for path in paths]), about, null_text)


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSource:
    """Records of a split, in the order of the pictures they were made of."""

    records: Any
    about: About
    null_text: np.ndarray | None  # f32 [L, D]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def posterior(self) -> bool:
        """Whether a latent is drawn anew each time it is read."""
        return self.about.posterior

    def texts(self, count: int) -> list[str]:
        """The first captions."""
        return [bytes(safetensors.numpy.load(self.records[i])["caption"]).decode() for i in range(count)]

    def read(self, indices, flip, seeds) -> dict:
        """The batch {"x", "label"[, "text", "null_text", "mask", "masked"]} f32 of the records `indices`.

        With `flip` that of the mirrored picture; x is a sample of the posterior by `seeds`, its mean where None.
        """
        found = [safetensors.numpy.load(content) for content in self._read(indices)]
        seeds = [None] * len(found) if seeds is None else seeds
        x = [self._sample(*row) for row in zip(found, flip, seeds, strict=True)]
        batch = {"x": np.stack(x), "label": np.array([record["label"][0] for record in found], np.int32)}
        for name in _OF_COND:
            if name in found[0]:
                rows = [_of(record, name, f) for record, f in zip(found, flip, strict=True)]
                batch[name] = np.stack(rows).astype(np.float32)
        if self.null_text is not None:
            batch["null_text"] = np.broadcast_to(self.null_text, (len(found), *self.null_text.shape))
        return batch

    def _read(self, indices):
        return self.records.__getitems__([int(i) for i in indices])

    def _sample(self, record, flip, seed):
        mean = _of(record, "mean", flip).astype(np.float32)
        if seed is None or not self.posterior:
            return mean
        noise = np.random.default_rng(int(seed)).standard_normal(mean.shape, np.float32)
        return mean + _of(record, "std", flip).astype(np.float32) * noise


def _of(record, name, flip):
    """A field as of the mirrored picture, where that makes a difference to it."""
    return record.get(name + FLIPPED, record[name]) if flip else record[name]
