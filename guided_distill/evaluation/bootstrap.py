"""Intervals of figures of few samples, by a bootstrap without replacement.

The plain bootstrap repeats samples, which lowers the rank of their covariance and raises a Fréchet distance by itself:
its percentiles lay above the figure in every trial, and moved back they were 5 times too wide for 100 samples of 400
features. Subsets without repeats, scaled to the whole (Shao, Wu 1989, the delete-d jackknife), were 1.05 to 1.4 times
as wide as the spread over new samples, from 50 samples of 64 features to 1,000 (benchmarks/metrics.py --intervals).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from guided_distill.evaluation.gaussians import GaussianStats, covariance_factor, nuclear_norm

FEWEST_SAMPLES = 10
MOST_SAMPLES = 5000  # above, the interval is narrow, and its decompositions cost more than it says
_LEFT_OUT = 5  # one sample in so many
_SMALL_RANK, _MANY, _FEW = 1000, 200, 50  # a decomposition of higher rank takes from .2 to 1.5 s of one core


@dataclasses.dataclass(frozen=True)
class Interval:
    """A 95 % interval and the number of subsets it was made of."""

    low: float
    high: float
    resamples: int


def interval(figure: Callable[[np.ndarray], float], count: int, *, seed: int, resamples: int = _MANY) -> Interval:
    """How `figure`, a function of rows i64[k] of 0 .. count - 1, would differ for `count` other samples of the model.

    Percentiles 2.5 and 97.5 of its deviations over random subsets of four fifths, about the figure of all rows. The
    width says nothing of what the figure is wrong by for being made of few samples. Subsets are drawn by `seed` alone.
    Raises ValueError of fewer than 10 samples.
    """
    if count < FEWEST_SAMPLES:
        raise ValueError(f"{count} samples are too few for an interval; take {FEWEST_SAMPLES}")
    rng = np.random.default_rng(seed)
    kept = count - count // _LEFT_OUT
    drawn = np.array([figure(rng.choice(count, kept, replace=False)) for _ in range(resamples)])
    # A subset varies about the whole by the part left out alone, (count − kept) / kept of a new sample's variance.
    deviations = (drawn - drawn.mean()) * np.sqrt(kept / (count - kept))
    low, high = figure(np.arange(count)) + np.percentile(deviations, (2.5, 97.5))
    return Interval(float(low), float(high), resamples)


def frechet_interval(features: np.ndarray, reference: GaussianStats, *, seed: int) -> Interval:
    """The interval of the Fréchet distance of features [n,D] to a reference that counts as exact; 200 subsets, or 50
    where min(n, D) is above 1,000."""
    resamples = _MANY if min(features.shape) <= _SMALL_RANK else _FEW
    found = interval(frechet_of_rows(features, reference), len(features), seed=seed, resamples=resamples)
    return dataclasses.replace(found, low=max(found.low, 0.0))


def frechet_of_rows(features: np.ndarray, reference: GaussianStats) -> Callable[[np.ndarray], float]:
    """The Fréchet distance of features[rows] to the reference, as a function of rows i64[k] without repeats.

    With L Lᵀ the reference's covariance and Y the rows' deviations from their mean, over √(k − 1), the trace of the
    root is the sum of the singular values of Y L, which come from the smaller of its Gram matrices.
    """
    centre = features.mean(0, dtype=np.float64)
    x = features.astype(np.float64) - centre
    projected = x @ covariance_factor(reference)
    squares = np.square(x).sum(1)
    shift, trace = centre - reference.mean, float(np.trace(reference.covariance))

    def distance(rows):
        mean, count = x[rows].mean(0), len(rows)
        variance = (squares[rows].sum() - count * (mean @ mean)) / (count - 1)
        deviations = projected[rows]
        deviations -= deviations.mean(0)
        trace_root = nuclear_norm(deviations) / np.sqrt(count - 1)
        return float(np.sum((mean + shift) ** 2) + variance + trace - 2 * trace_root)

    return distance
