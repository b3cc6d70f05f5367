import numpy as np
import pytest

from guided_distill.evaluation.samples import Samples, collect, in_order, merge

RNG = np.random.default_rng(0)
FEATURES, LOGITS = RNG.normal(size=(23, 4)).astype(np.float32), RNG.normal(size=(23, 3)).astype(np.float32)
LABEL, SATURATION = RNG.integers(0, 3, 23), RNG.uniform(size=23)


def batch(rows):
    rows = np.asarray(rows)
    return Samples(rows, FEATURES[rows], LOGITS[rows], LABEL[rows], {"saturation": SATURATION[rows]})


def batches(size, order):
    return [batch(order[start : start + size]) for start in range(0, len(order), size)]


def assert_in_order(samples):
    np.testing.assert_array_equal(samples.index, np.arange(23))
    np.testing.assert_array_equal(samples.features, FEATURES)
    np.testing.assert_array_equal(samples.logits, LOGITS)
    np.testing.assert_array_equal(samples.label, LABEL)
    np.testing.assert_array_equal(samples.figures["saturation"], SATURATION)


@pytest.mark.parametrize("size", [1, 7, 23])
@pytest.mark.parametrize("order", [np.arange(23), np.arange(23)[::-1], RNG.permutation(23)])
def test_batches_of_any_size_and_order_give_the_order_of_the_images(size, order):
    assert_in_order(collect(batches(size, order)))


def test_hosts_with_every_other_image_merge():
    hosts = [merge(batches(3, np.arange(first, 23, 2))) for first in (1, 0)]
    assert_in_order(in_order(merge(hosts)))


def test_duplicates_and_gaps_are_refused():
    with pytest.raises(ValueError, match="2 of 8 samples are there twice, the first is image 3"):
        collect([batch([0, 3, 1, 5]), batch([2, 3, 5, 4])])
    with pytest.raises(ValueError, match="image 2 is missing among 4 samples up to image 4"):
        collect([batch([0, 3, 1]), batch([4])])
    with pytest.raises(ValueError, match="image 0 is missing"):
        collect([batch([1, 2])])
    with pytest.raises(ValueError, match="no samples"):
        collect([])


@pytest.mark.parametrize("name", ["features", "logits"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_counted_and_the_first_is_named(name, value):
    samples = batch([4, 2, 3, 1, 0])
    getattr(samples, name)[:2, 1] = value
    with pytest.raises(ValueError, match="2 of 5 samples have .* not finite, the first is image 2"):
        in_order(samples)


def test_parts_that_know_different_things_do_not_merge():
    bare = Samples(np.array([0]), FEATURES[:1], LOGITS[:1])
    assert collect([bare]).label is None
    with pytest.raises(ValueError, match="others lack"):
        merge([bare, batch([1])])
    with pytest.raises(ValueError, match="others lack"):
        merge([batch([1]), Samples(np.array([0]), FEATURES[:1], LOGITS[:1], LABEL[:1])])
