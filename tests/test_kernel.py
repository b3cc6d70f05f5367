import itertools
import math

import numpy as np
import pytest

from guided_distill.evaluation import kernel
from guided_distill.evaluation.kernel import kernel_distance, squared_mmd

RNG = np.random.default_rng(0)


def by_loops(x, y):
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    xx = np.mean([k(x[i], x[j]) for i, j in itertools.permutations(range(len(x)), 2)])
    yy = np.mean([k(y[i], y[j]) for i, j in itertools.permutations(range(len(y)), 2)])
    return xx + yy - 2 * np.mean([k(a, b) for a in x for b in y])


def test_squared_mmd_is_the_mean_over_pairs_of_different_images():
    x, y = RNG.normal(size=(7, 3)), RNG.normal(size=(5, 3)) + 1
    assert squared_mmd(x, y) == pytest.approx(by_loops(x, y), rel=1e-12)


def normal_moments(mean, std):
    return np.array([1, mean, mean**2 + std**2, mean**3 + 3 * mean * std**2])


def test_the_mean_of_the_estimate_is_the_distance_of_the_moments():
    """(xy + 1)³ = Σ C(3,j) xʲyʲ, so MMD² of distributions of one feature is Σ C(3,j) (E xʲ − E yʲ)²."""
    difference = normal_moments(0.5, 1.0) - normal_moments(0.0, 1.3)
    expected = sum(math.comb(3, j) * difference[j] ** 2 for j in range(4))
    estimates = [squared_mmd(0.5 + RNG.normal(size=(40, 1)), 1.3 * RNG.normal(size=(60, 1))) for _ in range(4000)]
    assert np.mean(estimates) == pytest.approx(expected, abs=4 * np.std(estimates) / np.sqrt(4000))


def test_the_mean_of_the_estimate_is_zero_for_equal_distributions():
    estimates = [squared_mmd(RNG.normal(size=(20, 4)), RNG.normal(size=(30, 4))) for _ in range(2000)]
    assert np.mean(estimates) == pytest.approx(0, abs=4 * np.std(estimates) / np.sqrt(2000))


def test_subsets_are_drawn_of_samples_and_reference_in_turn():
    x, y = RNG.normal(size=(50, 3)), RNG.normal(size=(40, 3)) + 1
    found = kernel_distance(x, y, subsets=4, subset_size=10, seed=7)
    rng = np.random.RandomState(7)
    estimates = []
    for _ in range(4):
        a = x[rng.choice(50, 10, replace=False)]
        estimates.append(by_loops(a, y[rng.choice(40, 10, replace=False)]))
    assert found.mean == pytest.approx(np.mean(estimates), rel=1e-10)
    assert found.std == pytest.approx(np.std(estimates), rel=1e-10)


@pytest.mark.parametrize(("count", "size"), [(60, 60), (360, 60)])
def test_the_standard_error_is_the_spread_over_draws_of_the_samples(count, size):
    rng = np.random.default_rng(3)
    y = rng.normal(size=(90, 3)) + 0.7
    found = [kernel_distance(rng.normal(size=(count, 3)), y, subset_size=size) for _ in range(200)]
    spread = np.std([distance.mean for distance in found])
    assert np.mean([distance.standard_error for distance in found]) == pytest.approx(spread, rel=0.25)


@pytest.mark.parametrize("subsets", [2, 60])
def test_small_sets_whose_pairs_are_in_many_subsets_are_measured_alike(subsets, monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK", 16)
    x, y = RNG.normal(size=(50, 3)).astype(np.float32), RNG.normal(size=(70, 3)).astype(np.float32) + 1
    found = kernel_distance(x, y, subsets=subsets, subset_size=12, seed=1)
    rng = np.random.RandomState(1)
    drawn = [[z[rng.choice(len(z), 12, replace=False)].astype(np.float64) for z in (x, y)] for _ in range(subsets)]
    estimates = [squared_mmd(*pair) for pair in drawn]
    assert found.mean == pytest.approx(np.mean(estimates), rel=1e-9)
    assert found.std == pytest.approx(np.std(estimates), rel=1e-9)


def test_subsets_are_clipped_and_one_suffices_where_it_is_everything():
    x, y = RNG.normal(size=(30, 3)), RNG.normal(size=(30, 3)) + 1
    found = kernel_distance(x, y)
    assert (found.mean, found.std, found.subsets) == (pytest.approx(squared_mmd(x, y), rel=1e-10), 0.0, 1)
    more = kernel_distance(x, np.concatenate([y, y + 1]), subsets=5)
    assert more.subsets == 5 and more.std > 0


def test_float32_features_are_compared_in_float64():
    x, y = RNG.normal(size=(100, 8)).astype(np.float32), RNG.normal(size=(100, 8)).astype(np.float32)
    expected = kernel_distance(x.astype(np.float64), y.astype(np.float64)).mean
    assert kernel_distance(x, y).mean == pytest.approx(expected, rel=1e-12)


def test_a_set_of_one_is_refused():
    with pytest.raises(ValueError, match="two samples in each set, not 1 and 5"):
        kernel_distance(np.ones((1, 2)), np.ones((5, 2)))
