"""Kernel distance, KID with Inception features: unbiased squared MMD under a cubic kernel (arXiv:1801.01401)."""

import dataclasses
import math

import numpy as np

_SUBSETS, _SUBSET_SIZE, _SEED = 100, 1000, 2020


@dataclasses.dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation (ddof 0) of the estimates of `subsets` pairs of subsets."""

    mean: float
    std: float
    subsets: int

    @property
    def standard_error(self) -> float:
        """std/√subsets: how well the mean over subsets is known for these samples, not for others of the model."""
        return self.std / math.sqrt(self.subsets)


def kernel_distance(
    samples: np.ndarray, reference: np.ndarray, *, subsets=_SUBSETS, subset_size=_SUBSET_SIZE, seed=_SEED
) -> KernelDistance:
    """KID of features [n,D] and [m,D], each in the order of its images; may be a little below zero.

    Subsets are clipped to the smaller set, and drawn without replacement, of the samples and then of the reference in
    turn, by `RandomState(seed)`, as torch-fidelity 0.4 draws them. Where a subset is all of both sets, it is the only
    one. Raises ValueError for a set of one.
    """
    size = min(subset_size, len(samples), len(reference))
    if size < 2:
        raise ValueError(f"a kernel distance needs two samples in each set, not {len(samples)} and {len(reference)}")
    if size == len(samples) == len(reference):
        subsets = 1
    rng = np.random.RandomState(seed)
    estimates = []
    for _ in range(subsets):
        x = samples[rng.choice(len(samples), size, replace=False)].astype(np.float64)
        y = reference[rng.choice(len(reference), size, replace=False)].astype(np.float64)
        estimates.append(squared_mmd(x, y))
    return KernelDistance(float(np.mean(estimates)), float(np.std(estimates)), subsets)


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased estimate of MMD² from x f64[n,D] and y f64[m,D] (arXiv:1801.01401, eq 4)."""
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * _kernel(x, y).mean()


def _kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_pairs(x):
    values = _kernel(x, x)
    return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))
