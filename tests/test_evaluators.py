import itertools
from functools import reduce

import numpy as np
import pytest

from guided_distill.evaluators import collect, finish, gaussian_stats, merge

RNG = np.random.default_rng(0)


def random_batch(n, classes=5, dim=6, shift=0.0):
    return {
        "features": RNG.normal(size=(n, dim)) + shift,
        "logits": 3 * RNG.normal(size=(n, classes)),
        "labels": RNG.integers(0, classes, n),
        "images": RNG.uniform(-1, 1, (n, 4, 4, 1)),
        "reference_images": RNG.uniform(-1, 1, (n, 4, 4, 1)),
    }


def parts(batch, sizes):
    ends = np.cumsum(sizes)
    return [{k: v[end - size : end] for k, v in batch.items()} for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("sizes", [(60,), (1, 59), (20, 20, 20), (7, 1, 32, 20), (1,) * 60])
@pytest.mark.parametrize("backwards", [False, True])
def test_merging_batches_equals_one_pass(sizes, backwards):
    batch, reference = random_batch(60), gaussian_stats(RNG.normal(size=(80, 6)))
    pieces = [collect(**part) for part in parts(batch, sizes)]
    values = finish(reduce(merge, reversed(pieces) if backwards else pieces), reference)
    whole = finish(collect(**batch), reference)
    assert values == pytest.approx(whole, rel=1e-9)
    assert set(whole) == {
        "frechet_classifier", "score_classifier", "label_agreement", "diversity", "distance_to_reference",
    }  # fmt: skip


def test_merge_groups_in_any_way():
    pieces = [collect(**random_batch(n, shift=n)) for n in (3, 8, 20)]
    reference = gaussian_stats(RNG.normal(size=(80, 6)))
    a_b_c = finish(merge(merge(pieces[0], pieces[1]), pieces[2]), reference)
    for x, y, z in itertools.permutations(pieces):
        assert finish(merge(x, merge(y, z)), reference) == pytest.approx(a_b_c, rel=1e-9)


def score_of(logits):
    batch = random_batch(len(logits))
    stats = collect(batch["features"], logits, batch["labels"], batch["images"])
    return finish(stats, gaussian_stats(batch["features"]))["score_classifier"]


def test_score_of_sure_and_even_predictions_is_the_number_of_classes():
    assert score_of(1000.0 * np.tile(np.eye(7), (3, 1))) == pytest.approx(7.0, rel=1e-12)


@pytest.mark.parametrize("logits", [np.zeros(7), 1000.0 * np.eye(7)[2], np.arange(7.0)])
def test_score_of_equal_predictions_is_one(logits):
    assert score_of(np.tile(logits, (12, 1))) == pytest.approx(1.0, rel=1e-12)


def test_label_agreement_and_distance():
    labels = np.array([0, 1, 2, 2])
    images = np.zeros((4, 2, 2, 3))
    reference_images = images.copy()
    reference_images[0, 0, 0, 0] = 2.0
    features = RNG.normal(size=(4, 3))
    stats = collect(features, np.eye(3)[[0, 1, 1, 2]], labels, images, reference_images)
    values = finish(stats, gaussian_stats(features))
    assert values["label_agreement"] == 0.75
    assert values["distance_to_reference"] == pytest.approx(4.0 / 12 / 4)


def test_no_distance_without_reference_images():
    batch = random_batch(5)
    batch["reference_images"] = None
    assert "distance_to_reference" not in finish(collect(**batch), gaussian_stats(batch["features"]))


@pytest.mark.parametrize("name", ["features", "logits"])
def test_samples_that_are_not_finite_are_refused(name):
    batch = random_batch(5)
    batch[name][1:3, 0] = np.nan
    with pytest.raises(ValueError, match="2 of 5 samples"):
        collect(**batch)


def test_diversity_is_the_variance_about_the_mean_of_each_label():
    labels = np.repeat(np.arange(5), [4, 7, 1, 3, 5])
    batch = {**random_batch(20), "labels": labels, "features": RNG.normal(size=(20, 6)) + 10 * labels[:, None]}
    about = sum(
        ((batch["features"][labels == c] - batch["features"][labels == c].mean(0)) ** 2).sum() for c in range(5)
    )
    values = finish(collect(**batch), gaussian_stats(batch["features"]))
    assert values["diversity"] == pytest.approx(about / (20 - 5), rel=1e-9)
    same = {**batch, "features": np.eye(6)[labels]}
    assert finish(collect(**same), gaussian_stats(batch["features"]))["diversity"] == pytest.approx(0.0, abs=1e-12)
    alone = parts(batch, [4, 16])[0] | {"labels": np.arange(4)}
    assert finish(collect(**alone), gaussian_stats(batch["features"]))["diversity"] == 0.0


def test_saturation_is_the_share_of_values_at_the_ends():
    images = np.zeros((2, 4, 4, 1))
    images[0, 0], images[1, :2] = 0.5, [-0.495]
    batch = {**random_batch(2), "images": images}
    reference = gaussian_stats(random_batch(10)["features"])
    assert finish(collect(**batch, data_range=0.5), reference)["saturation"] == pytest.approx((4 / 16 + 8 / 16) / 2)
    halves = [collect(**part, data_range=0.5) for part in parts(batch, [1, 1])]
    assert finish(merge(*halves), reference)["saturation"] == pytest.approx((4 / 16 + 8 / 16) / 2)
    assert "saturation" not in finish(collect(**batch), reference)
