import numpy as np
import pytest

from guided_distill.evaluation.scores import inception_score, num_splits

RNG = np.random.default_rng(0)


def test_score_of_sure_and_even_predictions_is_the_number_of_classes():
    score, std = inception_score(1000.0 * np.tile(np.eye(7), (3, 1)), splits=3)
    assert (score, std) == (pytest.approx(7.0, rel=1e-12), pytest.approx(0.0, abs=1e-12))


@pytest.mark.parametrize("logits", [np.zeros(7), 1000.0 * np.eye(7)[2], np.arange(7.0)])
def test_score_of_equal_predictions_is_one(logits):
    assert inception_score(np.tile(logits, (12, 1)), splits=2) == (pytest.approx(1.0, rel=1e-12), pytest.approx(0.0))


def test_score_of_two_predictions():
    """Half p and half its mirror: the entropy of the even marginal less that of p."""
    p = np.array([0.9, 0.1])
    logits = np.log(np.array([p, p[::-1]]))
    expected = np.exp(np.log(2) + (p * np.log(p)).sum())
    assert inception_score(logits, splits=1)[0] == pytest.approx(expected, rel=1e-12)


def test_splits_are_contiguous_and_cut_as_the_literature_cuts():
    """11 images in 3 splits: 0-2, 3-6, 7-10, in which 1, 2 and 4 classes are sure."""
    classes = [5, 5, 5, 0, 1, 0, 1, 0, 1, 2, 3]
    score, std = inception_score(1000.0 * np.eye(6)[classes], splits=3)
    assert score == pytest.approx(np.mean([1, 2, 4]), rel=1e-12)
    assert std == pytest.approx(np.std([1, 2, 4]), rel=1e-12)


def test_a_score_does_not_mind_a_shift_of_the_logits_nor_half_precision():
    logits = (4 * RNG.normal(size=(100, 5))).astype(np.float32)
    assert inception_score(logits + RNG.normal(size=(100, 1)), 2) == pytest.approx(inception_score(logits, 2), rel=1e-6)


@pytest.mark.parametrize("count, splits", [(1, 1), (499, 1), (999, 1), (1000, 2), (4999, 9), (5000, 10), (50_000, 10)])
def test_ten_splits_from_5000_images_on(count, splits):
    assert num_splits(count) == splits


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="3 samples cannot be split in 4"):
        inception_score(np.zeros((3, 2)), splits=4)
