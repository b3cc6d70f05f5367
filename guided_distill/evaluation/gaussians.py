"""Gaussians of features: mergeable statistics in float64, and the Fréchet distance between two."""

import contextlib
import dataclasses

import numpy as np

_BLOCK = 2**24  # features that are in float64 at once: 128 MiB


@dataclasses.dataclass(frozen=True)
class GaussianStats:
    """Count, mean f64[D] and scatter f64[D,D] (summed outer products of deviations from the mean) of features."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance f64[D,D]."""
        return self.scatter / (self.count - 1)


def gaussian_stats(features: np.ndarray) -> GaussianStats:
    """Count, mean and scatter of [n,D] features of any precision; a block of rows at a time is held in float64."""
    count, dim = features.shape
    rows = max(_BLOCK // dim, 1)
    # About a point near the mean, so that nothing large cancels.
    shift = features[:rows].mean(0, dtype=np.float64)
    total, scatter = np.zeros(dim), np.zeros((dim, dim))
    for start in range(0, count, rows):
        deviation = features[start : start + rows] - shift
        total += deviation.sum(0)
        scatter += deviation.T @ deviation
    scatter -= np.outer(total, total / count)
    return GaussianStats(count, shift + total / count, scatter)


def merge_gaussians(a: GaussianStats, b: GaussianStats) -> GaussianStats:
    """The statistics of the union of two sets (Chan, Golub, LeVeque 1979, eq 2.1)."""
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(delta, delta) * (a.count * b.count / count)
    return GaussianStats(count, mean, scatter)


def covariance_factor(stats: GaussianStats) -> np.ndarray:
    """L f64[D,r] with L Lᵀ = covariance, where r is its numerical rank: at most D, and less than the count."""
    covariance, dim = stats.covariance, len(stats.mean)
    if stats.count > dim:
        with contextlib.suppress(np.linalg.LinAlgError):  # where it is singular after all
            return np.linalg.cholesky(covariance)
    values, vectors = np.linalg.eigh(covariance)
    # The root of an eigenvalue that is only rounding is 1e-8 of the largest: a thousand such would be seen.
    kept = values > dim * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def frechet_distance(a: GaussianStats, b: GaussianStats) -> float:
    """Squared 2-Wasserstein distance of the Gaussians with these moments (Dowson, Landau 1982; arXiv:1706.08500, eq 6).

    |m_a − m_b|² + tr(C_a + C_b − 2 (C_a^½ C_b C_a^½)^½), where the trace of the last root is the sum of the singular
    values of L_aᵀ L_b for any C = L Lᵀ: nothing is inverted, singular covariances do no harm. Raises ValueError for a
    set of one.
    """
    if min(a.count, b.count) < 2:
        raise ValueError(f"a Fréchet distance needs two samples in each set, not {a.count} and {b.count}")
    trace_root = nuclear_norm(covariance_factor(a).T @ covariance_factor(b))
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_root
    return float(max(distance, 0.0))


def nuclear_norm(matrix: np.ndarray) -> float:
    """The sum of the singular values of [n,m], to 1e-9 of the largest for each.

    As roots of the eigenvalues of the smaller Gram matrix, which takes a third of the time, unless they span so much
    that rounding would reach the smallest.
    """
    rows, columns = matrix.shape
    squares = np.linalg.eigvalsh(matrix @ matrix.T if rows < columns else matrix.T @ matrix)
    if squares.size and squares[0] > 1e-13 * squares[-1]:
        return float(np.sqrt(squares).sum())
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


def too_few(count: int, dim: int) -> str | None:
    """The warning that a covariance of `dim` features from so few samples is singular, in one line; None where it is
    not."""
    if count > dim:
        return None
    return (
        f"{count} samples give {dim} features a covariance of rank {count - 1}: their Fréchet distance is far too "
        f"high and compares only with others of as many samples; take more than {dim}"
    )
