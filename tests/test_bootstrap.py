import numpy as np
import pytest

from guided_distill.evaluation.bootstrap import frechet_interval, frechet_of_rows, interval
from guided_distill.evaluation.gaussians import GaussianStats, frechet_distance, gaussian_stats

RNG = np.random.default_rng(0)


def standard(dim):
    return GaussianStats(10**6, np.zeros(dim), np.eye(dim) * (10**6 - 1))


def test_the_interval_of_a_mean_has_its_known_width():
    values = RNG.normal(size=400)
    found = interval(lambda rows: values[rows].mean(), 400, seed=0, resamples=4000)
    error = values.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx(values.mean() + 1.96 * error * np.array([-1, 1]), abs=0.1 * error)


def test_the_interval_holds_the_figure_and_is_drawn_by_the_seed():
    values = RNG.normal(size=50)
    found = [interval(lambda rows: values[rows].std(), 50, seed=seed) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2] and found[0].resamples == 200
    assert all(each.low < values.std() < each.high for each in found)


@pytest.mark.parametrize("n, dim", [(50, 6), (20, 30)])
def test_the_distance_of_rows_is_the_distance(n, dim):
    features = (RNG.normal(size=(n, dim)) @ RNG.normal(size=(dim, dim)) + 2).astype(np.float32)
    reference = gaussian_stats(RNG.normal(size=(100, dim)) - 1)
    of_rows = frechet_of_rows(features, reference)
    for rows in (np.arange(n), RNG.permutation(n)[: n // 2]):
        expected = frechet_distance(gaussian_stats(features[rows]), reference)
        assert of_rows(rows) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("n, dim", [(300, 8), (60, 100)])
def test_the_width_is_that_of_the_spread_over_new_samples(n, dim):
    """Also where the covariance is singular, where a bootstrap with repeats was five times too wide."""
    draws = [RNG.normal(size=(n, dim)) + 0.3 for _ in range(60)]
    figures = [frechet_distance(gaussian_stats(draw), standard(dim)) for draw in draws]
    found = [frechet_interval(draw, standard(dim), seed=0) for draw in draws[:10]]
    width = np.mean([each.high - each.low for each in found])
    assert 0.75 < width / (3.92 * np.std(figures)) < 1.7
    assert all(each.low <= figure <= each.high for each, figure in zip(found, figures[:10], strict=True))


def test_a_distance_has_no_interval_below_zero():
    features = RNG.normal(size=(200, 1))
    assert frechet_interval(features, gaussian_stats(features), seed=0).low == 0.0


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="9 samples are too few for an interval; take 10"):
        frechet_interval(RNG.normal(size=(9, 2)), standard(2), seed=0)
