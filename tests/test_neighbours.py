from math import prod

import numpy as np
import pytest

from guided_distill.evaluation import neighbours
from guided_distill.evaluation.neighbours import compare, neighbourhood

RNG = np.random.default_rng(0)
LINE = np.arange(40.0)[:, None]


def by_definition(samples, reference):
    """All four figures from whole matrices of distances."""

    def distances(a, b):
        return np.linalg.norm(a[:, None] - b[None], axis=-1)

    def radii(a, k):
        return np.sort(distances(a, a), axis=1)[:, k]

    across = distances(samples, reference)
    return {
        "precision": (across <= radii(reference, 3)).any(1).mean(),
        "recall": (across <= radii(samples, 3)[:, None]).any(0).mean(),
        "density": (across <= radii(reference, 5)).sum() / (5 * len(samples)),
        "coverage": (across <= radii(reference, 5)).any(0).mean(),
    }


def test_radii_on_a_line():
    """Inside, the third nearest is 2 away and the fifth 3; at the ends there are neighbours on one side only."""
    radii = neighbourhood(LINE).radii
    np.testing.assert_array_equal(radii[3], [3, *[2] * 38, 3])
    np.testing.assert_array_equal(radii[5], [5, 4, *[3] * 36, 4, 5])


@pytest.mark.parametrize("values", [2**25, 100, 1])
def test_blocks_of_any_size_give_the_figures_of_the_definition(values, monkeypatch):
    monkeypatch.setattr(neighbours, "_VALUES", values)
    rng = np.random.default_rng(0)
    samples, reference = rng.normal(size=(60, 4)) + 0.7, rng.normal(size=(80, 4)).astype(np.float32)
    found = compare(samples, neighbourhood(reference))
    assert found == pytest.approx(by_definition(samples, reference.astype(np.float64)), rel=1e-12)
    assert all(0 < value < 1 for value in found.values())


def test_samples_between_the_points_of_a_line():
    """Halfway between two of the line, 6 points are at most 3 away: density 6/5."""
    found = compare(LINE[10:20] + 0.5, neighbourhood(LINE))
    assert found["precision"] == 1 and found["density"] == 6 / 5
    # The points from 8 to 22 have a sample in reach of 3; the samples' own radii are 2, and 3 at the ends, so that
    # they reach from 8 to 22 as well.
    assert found["coverage"] == found["recall"] == 15 / 40


def test_a_point_on_the_rim_is_inside():
    """At a point of the line itself, 7 points are at most 3 away, two of them exactly."""
    assert compare(LINE[10:20], neighbourhood(LINE))["density"] == 7 / 5
    assert compare(LINE[:10] - 3.0, neighbourhood(LINE))["precision"] == 10 / 10
    assert compare(np.linspace(-3.001, -4, 5)[:, None], neighbourhood(LINE))["precision"] == 0


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (1e3, 1e5), (1e-3, 7.0)])
def test_a_set_against_itself_has_its_points_and_rims_inside(scale, shift):
    """A ball of the fifth neighbour holds its centre, four others, and the fifth on its rim, whatever rounding does."""
    features = RNG.normal(size=(300, 30)) * scale + shift
    expected = {"precision": 1.0, "recall": 1.0, "density": 6 / 5, "coverage": 1.0}
    assert compare(features, neighbourhood(features)) == pytest.approx(expected, rel=1e-12)


def test_copies_are_inside_a_neighbourhood_without_extent():
    place = RNG.normal(size=(1, 30)) * 10
    reference = np.concatenate([np.repeat(place, 8, axis=0), RNG.normal(size=(8, 30))])
    found = compare(np.repeat(place, 5, axis=0), neighbourhood(reference))
    assert found["precision"] == 1.0 and found["recall"] == 0.5 and found["density"] == pytest.approx(8 / 5)


def test_sets_far_apart_have_nothing_in_common():
    found = compare(RNG.normal(size=(20, 3)) + 100, neighbourhood(RNG.normal(size=(30, 3))))
    assert found == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_expected_density_and_coverage_of_equal_distributions():
    """In whatever dimension (arXiv:2002.09797, lemmas 1 and 2): 1, and 1 − Π (m − i) / (n + m − i), i = 1 … 5."""
    n, m, rounds = 30, 50, 400
    found = [compare(RNG.normal(size=(n, 3)), neighbourhood(RNG.normal(size=(m, 3)))) for _ in range(rounds)]
    expected = {"density": 1.0, "coverage": 1 - prod((m - i) / (n + m - i) for i in range(1, 6))}
    for name, value in expected.items():
        values = [figures[name] for figures in found]
        assert np.mean(values) == pytest.approx(value, abs=4 * np.std(values) / np.sqrt(rounds)), name


def test_recall_is_the_precision_of_the_other_way_round():
    a, b = RNG.normal(size=(50, 3)), 2 * RNG.normal(size=(70, 3))
    one, other = compare(a, neighbourhood(b)), compare(b, neighbourhood(a))
    assert (one["precision"], one["recall"]) == (other["recall"], other["precision"])


def test_too_few_for_neighbours_are_refused():
    with pytest.raises(ValueError, match="5 samples have no 5 nearest others"):
        neighbourhood(LINE[:5])
    with pytest.raises(ValueError, match="3 samples have no 3 nearest others"):
        compare(LINE[:3], neighbourhood(LINE))
