"""Statistics of samples: Fréchet distance and score by a classifier, label agreement, diversity, saturation, distance
to reference images.

Pure functions on the host in float64. What a batch of samples has to tell is a `Stats`; those of several batches or
hosts merge in any order, and `finish` turns the whole into the numbers of a row of `summary.json`.
"""

from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class GaussianStats:
    """Count, mean f64[D] and scatter f64[D,D] (summed outer products of deviations from the mean) of features."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance f64[D,D]."""
        return self.scatter / (self.count - 1)


@dataclass(frozen=True)
class Stats:
    """What merges of a set of samples: the Gaussian of its features, and sums over samples."""

    gaussian: GaussianStats
    sum_p: np.ndarray  # f64[num_classes], of p(y|x)
    sum_p_log_p: float  # of Σ_y p(y|x) log p(y|x)
    label_hits: int
    label_counts: np.ndarray  # f64[num_classes], of the labels asked for
    label_features: np.ndarray  # f64[num_classes,D], sums of the features of each
    saturated: float  # samples' shares of values at an end of the data's range; NaN where it has no ends
    sum_distance: float  # of the mean squared distance per value to the reference image
    references: int  # samples that have a reference image


def gaussian_stats(features: np.ndarray) -> GaussianStats:
    """Count, mean and scatter of [n,D] features."""
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    deviation = features - mean
    return GaussianStats(len(features), mean, deviation.T @ deviation)


def merge_gaussians(a: GaussianStats, b: GaussianStats) -> GaussianStats:
    """The statistics of the union of two sets (Chan, Golub, LeVeque 1979, eq 2.1)."""
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(delta, delta) * (a.count * b.count / count)
    return GaussianStats(count, mean, scatter)


def frechet_distance(a: GaussianStats, b: GaussianStats) -> float:
    """Squared 2-Wasserstein distance of the Gaussians with these moments (Dowson, Landau 1982; arXiv:1706.08500, eq 6).

    |m_a − m_b|² + tr(C_a + C_b − 2 (C_a^½ C_b C_a^½)^½), where the trace of the last root is the sum of the singular
    values of C_a^½ C_b^½: nothing is inverted, singular covariances do no harm. Raises ValueError for a set of one.
    """
    if min(a.count, b.count) < 2:
        raise ValueError(f"a Fréchet distance needs two samples in each set, not {a.count} and {b.count}")
    root_a = _symmetric_root(a.covariance)
    trace_root = np.linalg.svd(root_a @ _symmetric_root(b.covariance), compute_uv=False).sum()
    distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_root
    return float(max(distance, 0.0))


def collect(features, logits, labels, images, reference_images=None, data_range=None) -> Stats:
    """The statistics of a batch: features [n,D], logits [n,num_classes], requested labels [n], images [n,*S].

    Values from .98 `data_range` on count as saturated. `reference_images` [n,*S] are the images that those of the same
    index are compared to; None where there are none. Raises ValueError when a feature or logit is not finite: argmax
    would count NaN as class 0.
    """
    finite = np.isfinite(features).all(axis=1) & np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise ValueError(f"{int((~finite).sum())} of {len(finite)} samples have features or logits that are not finite")
    features, images = np.asarray(features, np.float64), np.asarray(images, np.float64)
    log_p = _log_softmax(np.asarray(logits, np.float64))
    asked = np.eye(log_p.shape[1])[np.asarray(labels)]
    p = np.exp(log_p)
    sum_distance, references = 0.0, 0
    if reference_images is not None:
        difference = images - np.asarray(reference_images, np.float64)
        sum_distance, references = float(np.mean(difference.reshape(len(p), -1) ** 2, axis=1).sum()), len(p)
    return Stats(
        gaussian=gaussian_stats(features),
        sum_p=p.sum(0),
        sum_p_log_p=float((p * log_p).sum()),
        label_hits=int((log_p.argmax(1) == np.asarray(labels)).sum()),
        label_counts=asked.sum(0),
        label_features=asked.T @ features,
        saturated=_saturated(images, data_range),
        sum_distance=sum_distance,
        references=references,
    )


def merge(a: Stats, b: Stats) -> Stats:
    """The statistics of the union of two sets of samples."""
    sums = {f.name: getattr(a, f.name) + getattr(b, f.name) for f in fields(Stats) if f.name != "gaussian"}
    return Stats(gaussian=merge_gaussians(a.gaussian, b.gaussian), **sums)


def finish(stats: Stats, reference: GaussianStats) -> dict[str, float]:
    """The values of a row: `frechet_classifier` to the reference features, `score_classifier`, `label_agreement` in
    [0, 1], `diversity` (variance of the features within a label, summed over them), where the data have a range
    `saturation` (share of an image's values at an end of it), and where samples had reference images
    `distance_to_reference` (mean square per value of an image)."""
    n = stats.gaussian.count
    values = {
        "frechet_classifier": frechet_distance(stats.gaussian, reference),
        "score_classifier": _score(stats),
        "label_agreement": stats.label_hits / n,
        "diversity": _variance_within_labels(stats),
    }
    if np.isfinite(stats.saturated):
        values["saturation"] = stats.saturated / n
    if stats.references:
        values["distance_to_reference"] = stats.sum_distance / stats.references
    return values


def noise_floor(features: np.ndarray, seed: int) -> float:
    """Fréchet distance between two disjoint random halves of [n,D] features of real images."""
    order = np.random.default_rng(seed).permutation(len(features))
    half = len(features) // 2
    features = np.asarray(features)
    return frechet_distance(gaussian_stats(features[order[:half]]), gaussian_stats(features[order[half : 2 * half]]))


def _saturated(images, data_range):
    if data_range is None:
        return np.nan
    return float((np.abs(images) >= 0.98 * data_range).reshape(len(images), -1).mean(1).sum())


def _variance_within_labels(stats: Stats) -> float:
    """Unbiased variance of the features about the mean of their own label, summed over features; 0 where no label has
    two samples."""
    seen = stats.label_counts > 0
    means = stats.label_features[seen] / stats.label_counts[seen, None]
    between = (stats.label_counts[seen] * ((means - stats.gaussian.mean) ** 2).sum(1)).sum()
    degrees = stats.gaussian.count - seen.sum()
    return float((np.trace(stats.gaussian.scatter) - between) / degrees) if degrees else 0.0


def _score(stats: Stats) -> float:
    """exp(E KL(p(y|x) || p(y))) in one split, the Inception Score's formula (arXiv:1606.03498, section 4)."""
    n = stats.gaussian.count
    p = stats.sum_p / n
    return float(np.exp(stats.sum_p_log_p / n - np.sum(p[p > 0] * np.log(p[p > 0]))))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The square root of a positive semi-definite matrix; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
