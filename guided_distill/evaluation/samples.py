"""Samples as they are measured: collected from batches and hosts in any order, and put in the order of the images."""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Samples:
    """What is known of images: index i64[n], features [n,D], logits [n,K], label i32[n] asked for or None, and figures
    of each image, {name: f64[n]}."""

    index: np.ndarray
    features: np.ndarray
    logits: np.ndarray
    label: np.ndarray | None = None
    figures: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self):
        return len(self.index)


def merge(parts: Iterable[Samples]) -> Samples:
    """The samples of batches, devices or hosts as one. Raises ValueError where there are none, or some lack a label or
    a figure that others have."""
    parts = list(parts)
    if not parts:
        raise ValueError("no samples")
    names, labelled = set(parts[0].figures), parts[0].label is not None
    if any(set(part.figures) != names or (part.label is not None) != labelled for part in parts):
        raise ValueError("some samples have labels or figures that others lack")
    return Samples(
        index=np.concatenate([part.index for part in parts]),
        features=np.concatenate([part.features for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
        label=np.concatenate([part.label for part in parts]) if labelled else None,
        figures={name: np.concatenate([part.figures[name] for part in parts]) for name in parts[0].figures},
    )


def in_order(samples: Samples) -> Samples:
    """The samples of images 0 .. n - 1 in their order, so that no figure depends on how they came.

    Raises ValueError where an index is missing or there twice, and where features or logits are not finite: argmax
    would count NaN as class 0.
    """
    order = np.argsort(samples.index, kind="stable")
    index = samples.index[order]
    _check_indices(index)
    ordered = Samples(
        index=index,
        features=samples.features[order],
        logits=samples.logits[order],
        label=None if samples.label is None else samples.label[order],
        figures={name: values[order] for name, values in samples.figures.items()},
    )
    _check_finite(ordered)
    return ordered


def collect(batches: Iterable[Samples]) -> Samples:
    """`merge` and `in_order`."""
    return in_order(merge(batches))


def _check_indices(index):
    twice = index[1:][index[1:] == index[:-1]]
    if len(twice):
        raise ValueError(f"{len(twice)} of {len(index)} samples are there twice, the first is image {twice[0]}")
    wrong = np.flatnonzero(index != np.arange(len(index)))
    if len(wrong):
        raise ValueError(f"image {wrong[0]} is missing among {len(index)} samples up to image {index[-1]}")


def _check_finite(samples):
    finite = np.isfinite(samples.features).all(axis=1) & np.isfinite(samples.logits).all(axis=1)
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise ValueError(
            f"{len(bad)} of {len(finite)} samples have features or logits that are not finite, the first is "
            f"image {bad[0]}"
        )
