import numpy as np
import pytest

from guided_distill.evaluation import gaussians
from guided_distill.evaluation.gaussians import (
    GaussianStats,
    covariance_factor,
    frechet_distance,
    gaussian_stats,
    merge_gaussians,
    nuclear_norm,
    too_few,
)

RNG = np.random.default_rng(0)


def gaussian(mean, covariance, count=100):
    return GaussianStats(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


def test_gaussian_stats_are_the_sample_moments():
    features = RNG.normal(size=(50, 4)) @ RNG.normal(size=(4, 4)) + 3
    stats = gaussian_stats(features)
    np.testing.assert_allclose(stats.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(features, rowvar=False), rtol=1e-12)


@pytest.mark.parametrize("block", [1, 12, 2**24])
def test_the_moments_do_not_depend_on_the_block_where_rows_drift(block, monkeypatch):
    monkeypatch.setattr(gaussians, "_BLOCK", block)
    features = RNG.normal(size=(50, 4)) + 100 * np.arange(50)[:, None]
    stats = gaussian_stats(features)
    np.testing.assert_allclose(stats.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(features, rowvar=False), rtol=1e-10)


def test_moments_do_not_cancel_far_from_zero():
    near = RNG.normal(size=(100, 3))
    halves = merge_gaussians(gaussian_stats(near[:50] + 1e6), gaussian_stats(near[50:] + 1e6))
    np.testing.assert_allclose(halves.covariance, np.cov(near, rowvar=False), rtol=1e-6)


def test_float32_features_are_summed_in_float64():
    features = (RNG.normal(size=(100_000, 2)) + 100).astype(np.float32)
    np.testing.assert_allclose(gaussian_stats(features).mean, features.astype(np.float64).mean(0), rtol=1e-13)


def test_frechet_of_diagonal_gaussians():
    a, b = gaussian([0, 1, 2], np.diag([1.0, 4.0, 9.0])), gaussian([1, 1, 0], np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx((1 + 4) + (1 + 0 + 4), rel=1e-12)


def test_frechet_of_covariances_that_do_not_commute():
    a, b = np.array([[2.0, 1.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 3.0]])
    # tr M^½ = (tr M + 2 det^½ M)^½ for 2 × 2, and C_a C_b has the eigenvalues of C_a^½ C_b C_a^½.
    trace_root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * trace_root
    assert frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [40, 5, 2])
def test_frechet_of_a_set_with_itself_is_zero(n):
    stats = gaussian_stats(RNG.normal(size=(n, 16)))  # n <= 16: singular covariance
    assert 0 <= frechet_distance(stats, stats) < 1e-9


def test_frechet_of_singular_covariances():
    a, b = gaussian([0, 0, 0], np.diag([4.0, 0, 0])), gaussian([0, 0, 0], np.diag([0, 9.0, 0]))
    assert frechet_distance(a, b) == pytest.approx(13.0, rel=1e-12)
    constant = gaussian_stats(np.ones((10, 3)))
    assert frechet_distance(constant, gaussian([1, 1, 1], np.zeros((3, 3)))) == 0.0


def test_frechet_is_symmetric_and_unmoved_by_rotation():
    a, b = RNG.normal(size=(30, 5)), RNG.normal(size=(40, 5)) * [1, 2, 3, 0, 1] + 1
    rotation = np.linalg.qr(RNG.normal(size=(5, 5)))[0]
    distance = frechet_distance(gaussian_stats(a), gaussian_stats(b))
    assert frechet_distance(gaussian_stats(b), gaussian_stats(a)) == pytest.approx(distance, rel=1e-9)
    rotated = frechet_distance(gaussian_stats(a @ rotation), gaussian_stats(b @ rotation))
    assert rotated == pytest.approx(distance, rel=1e-9)


def test_frechet_of_one_sample_is_refused():
    with pytest.raises(ValueError, match="two samples"):
        frechet_distance(gaussian_stats(np.ones((1, 2))), gaussian_stats(np.ones((5, 2))))


@pytest.mark.parametrize("size", [1, 7, 5000])
@pytest.mark.parametrize("shuffled", [False, True])
def test_batches_of_any_size_and_order_give_the_same_distance(size, shuffled):
    features = (RNG.normal(size=(5000, 12)) @ RNG.normal(size=(12, 12)) + 5).astype(np.float32)
    reference = gaussian_stats(RNG.normal(size=(300, 12)) @ RNG.normal(size=(12, 12)))
    rows = RNG.permutation(5000) if shuffled else np.arange(5000)
    parts = [gaussian_stats(features[rows[start : start + size]]) for start in range(0, 5000, size)]
    whole = parts[0]
    for part in parts[1:]:
        whole = merge_gaussians(whole, part)
    expected = frechet_distance(gaussian_stats(features), reference)
    assert frechet_distance(whole, reference) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sizes", [(40,), (1, 39), (13, 20, 7)])
def test_a_singular_covariance_does_not_make_a_distance_depend_on_batches(sizes):
    features, reference = RNG.normal(size=(40, 100)), gaussian_stats(RNG.normal(size=(500, 100)))
    parts = [gaussian_stats(part) for part in np.split(features, np.cumsum(sizes)[:-1])]
    whole = parts[0]
    for part in parts[1:]:
        whole = merge_gaussians(whole, part)
    expected = frechet_distance(gaussian_stats(features), reference)
    assert frechet_distance(whole, reference) == pytest.approx(expected, rel=1e-9)


def test_the_distance_of_few_samples_is_that_within_their_span():
    """Against the identity, the trace of the root is the sum of the standard deviations along n - 1 directions."""
    features = RNG.normal(size=(6, 50))
    singular = np.linalg.svd(features - features.mean(0), compute_uv=False) / np.sqrt(5)
    expected = np.sum(features.mean(0) ** 2) + np.sum(singular**2) + 50 - 2 * singular.sum()
    assert frechet_distance(gaussian_stats(features), gaussian(np.zeros(50), np.eye(50))) == pytest.approx(expected)


def test_a_factor_has_the_rank_of_the_covariance():
    few, dead = RNG.normal(size=(6, 50)), RNG.normal(size=(200, 9)) * np.r_[np.ones(6), np.zeros(3)]
    for features, rank in ((few, 5), (dead, 6), (np.ones((10, 4)), 0)):
        stats = gaussian_stats(features)
        factor = covariance_factor(stats)
        assert factor.shape[1] == rank
        np.testing.assert_allclose(factor @ factor.T, stats.covariance, atol=1e-12)


def test_a_rank_below_the_dimension_is_said_in_one_line():
    assert too_few(2049, 2048) is None
    assert "10 samples" in too_few(10, 2048) and "rank 9:" in too_few(10, 2048) and "\n" not in too_few(10, 2048)
    assert too_few(2048, 2048) is not None


@pytest.mark.parametrize("smallest", [1e-2, 1e-6, 1e-10, 0.0])
@pytest.mark.parametrize("shape", [(20, 20), (20, 30), (30, 20)])
def test_the_nuclear_norm_is_exact_also_where_singular_values_are_far_apart(smallest, shape):
    values = np.linspace(1.0, smallest, 20) ** 3
    left, right = (np.linalg.qr(RNG.normal(size=(n, 20)))[0] for n in shape)
    assert nuclear_norm((left * values) @ right.T) == pytest.approx(values.sum(), rel=1e-10, abs=0)
