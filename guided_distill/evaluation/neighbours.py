"""Precision, recall, density and coverage: samples inside the neighbourhoods of real images, and the other way round.

Distances are Euclidean and computed in float64 by |x|² + |y|² − 2x·y, a block at a time, after the mean of the
neighbourhood's features is taken off. A point on the rim of a neighbourhood is inside it, as is one that rounding
cannot tell from such: a copy of a point is inside its neighbourhood whatever the radius, and so is one of its k-th
neighbour.
"""

import dataclasses

import numpy as np

PRECISION_K, DENSITY_K = 3, 5
_RIM = 1 + 1e-11  # times the radius: a hundred times what rounding does to a distance
_VALUES = 2**25  # of a block of distances, or of features in float64: 256 MiB


@dataclasses.dataclass(frozen=True)
class Neighbourhood:
    """Features [m,D] of a set, and {k: f64[m], the distance of each to its k-th nearest other}."""

    features: np.ndarray
    radii: dict[int, np.ndarray]


def neighbourhood(features: np.ndarray, ks=(PRECISION_K, DENSITY_K)) -> Neighbourhood:
    """The neighbourhoods of features [m,D]. Raises ValueError where a point has fewer than max(ks) others."""
    if len(features) <= max(ks):
        raise ValueError(f"{len(features)} samples have no {max(ks)} nearest others each; take more")
    centre = _centre(features)
    radii = {k: np.empty(len(features)) for k in ks}
    for rows in _blocks(features, len(features)):
        squares = _squared_distances(features[rows], features, centre)
        squares.partition(sorted(ks), axis=1)  # the nearest of all is the point itself
        for k in ks:
            radii[k][rows] = np.sqrt(squares[:, k])
    return Neighbourhood(features, radii)


def compare(samples: np.ndarray, reference: Neighbourhood) -> dict[str, float]:
    """Of features [n,D]: `precision` and `recall` (k = 3; arXiv:1904.06991, eq 2), `density` and `coverage` (k = 5;
    arXiv:2002.09797, eq 3 and 4). Raises ValueError of fewer than 4 samples.
    """
    own = np.square(_RIM * neighbourhood(samples, (PRECISION_K,)).radii[PRECISION_K])
    near, dense = (np.square(_RIM * reference.radii[k]) for k in (PRECISION_K, DENSITY_K))
    centre = _centre(reference.features)
    precise, inside = 0, 0
    recalled, covered = np.zeros(len(near), bool), np.zeros(len(near), bool)
    for rows in _blocks(samples, len(near)):
        squares = _squared_distances(samples[rows], reference.features, centre)
        precise += int((squares <= near).any(axis=1).sum())
        recalled |= (squares <= own[rows, None]).any(axis=0)
        within = squares <= dense
        inside += int(within.sum())
        covered |= within.any(axis=0)
    return {
        "precision": precise / len(samples),
        "recall": float(recalled.mean()),
        "density": inside / (DENSITY_K * len(samples)),
        "coverage": float(covered.mean()),
    }


def nearest(samples: np.ndarray, features: np.ndarray, k: int) -> np.ndarray:
    """The places i64[n,k] of the k nearest among features [m,D] of each of samples [n,D], the nearest first."""
    centre, found = _centre(features), np.empty((len(samples), min(k, len(features))), int)
    for rows in _blocks(samples, len(features)):
        squares = _squared_distances(samples[rows], features, centre)
        found[rows] = np.argsort(squares, axis=1, kind="stable")[:, :k]
    return found


def _centre(features):
    return features.mean(0, dtype=np.float64)


def _blocks(features, width):
    """Slices of rows, of which the distances to `width` points, and the features in float64, are a block."""
    size = max(_VALUES // max(width, features.shape[1]), 1)
    return [slice(start, min(start + size, len(features))) for start in range(0, len(features), size)]


def _squared_distances(x, y, centre):
    """f64[n,m] of x [n,D] and y [m,D]."""
    x = x.astype(np.float64) - centre
    x_norms = np.square(x).sum(1)[:, None]
    rounding = 4 * x.shape[1] * np.finfo(np.float64).eps
    squares = np.empty((len(x), len(y)))
    for columns in _blocks(y, len(x)):
        part = y[columns].astype(np.float64) - centre
        block = x @ part.T
        block *= -2
        norms = x_norms + np.square(part).sum(1)
        block += norms
        norms *= rounding
        block[block < norms] = 0.0
        squares[:, columns] = block
    return squares
