"""Kernel distance, KID with Inception features: unbiased squared MMD under a cubic kernel (arXiv:1801.01401)."""

import dataclasses

import numpy as np

_SUBSETS, _SUBSET_SIZE, _SEED = 100, 1000, 2020
_BLOCK = 1024  # rows whose kernel with all others is in memory


@dataclasses.dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation (ddof 0) of the estimates of `subsets` pairs of subsets.

    `standard_error` is that of the distance for other samples of the same model against the same reference. (Not
    std/√subsets: that falls to nothing with the number of subsets, however few the samples are.)
    """

    mean: float
    std: float
    subsets: int
    standard_error: float


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
    drawn = [[rng.choice(len(a), size, replace=False) for a in (samples, reference)] for _ in range(subsets)]
    of_samples, of_reference = (np.array(rows) for rows in zip(*drawn, strict=True))
    if (len(samples) + len(reference)) ** 2 < subsets * (2 * size) ** 2:
        estimates = _of_small_sets(samples, reference, of_samples, of_reference)
    else:
        estimates = [
            squared_mmd(samples[x].astype(np.float64), reference[y].astype(np.float64))
            for x, y in zip(of_samples, of_reference, strict=True)
        ]
    error = _standard_error(samples[of_samples[0]].astype(np.float64), reference.astype(np.float64), len(samples))
    return KernelDistance(float(np.mean(estimates)), float(np.std(estimates)), subsets, error)


def _of_small_sets(samples, reference, of_samples, of_reference):
    """The estimates of subsets of sets so small that pairs are in many of them: each pair's kernel is taken once.

    `of_samples` and `of_reference` i64[subsets,size] are the rows of each subset.
    """
    x, y = samples.astype(np.float64), reference.astype(np.float64)
    in_x, in_y = _membership(of_samples, len(x)), _membership(of_reference, len(y))
    size = of_samples.shape[1]
    xx, yy = (
        (_pair_sums(z, z, within, within) - within.T @ _own_kernel(z)) / (size * (size - 1))
        for z, within in ((x, in_x), (y, in_y))
    )
    return xx + yy - 2 * _pair_sums(x, y, in_x, in_y) / size**2


def _membership(rows, count):
    """f64[count,subsets]: 1 where a row is in a subset."""
    within = np.zeros((count, len(rows)))
    np.put_along_axis(within, rows.T, 1.0, axis=0)
    return within


def _pair_sums(x, y, in_x, in_y):
    """For each subset the sum of the kernel over its pairs, a block of rows of x at a time."""
    blocks = (slice(start, start + _BLOCK) for start in range(0, len(x), _BLOCK))
    return sum(np.einsum("is,is->s", in_x[rows], _kernel(x[rows], y) @ in_y) for rows in blocks)


def _own_kernel(x):
    """k(x, x) of each row."""
    return (np.square(x).mean(1) + 1.0) ** 3


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased estimate of MMD² from x f64[n,D] and y f64[m,D] (arXiv:1801.01401, eq 4)."""
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * _kernel(x, y).mean()


def _standard_error(x: np.ndarray, y: np.ndarray, count: int) -> float:
    """Standard deviation of MMD² over draws of `count` samples, told by x f64[n,D] of them; the reference stays y.

    2 std(h)/√count, h(x) = E k(x, x') - E k(x, y): the first term of Hoeffding's decomposition. Taken as a mean
    over n, E k(x, x') brings noise of its own: where the model is close to the data the result is too large.
    """
    own = _kernel(x, x)
    h = (own.sum(1) - own.diagonal()) / (len(x) - 1) - _kernel(x, y).mean(1)
    return float(2 * h.std() / np.sqrt(count))


def _kernel(x, y):
    values = x @ y.T
    values /= x.shape[1]
    values += 1.0
    return values * values * values  # NumPy's ** takes ten times as long


def _mean_of_pairs(x):
    values = _kernel(x, x)
    return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))
