import itertools
from functools import reduce

import numpy as np
import pytest

from guided_distill.evaluators import (
    GaussianStats,
    collect,
    finish,
    frechet_distance,
    gaussian_stats,
    merge,
    merge_gaussians,
    noise_floor,
)

RNG = np.random.default_rng(0)


def gaussian(mean, covariance, count=100):
    return GaussianStats(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


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


def test_gaussian_stats_are_the_sample_moments():
    features = RNG.normal(size=(50, 4)) @ RNG.normal(size=(4, 4)) + 3
    stats = gaussian_stats(features)
    np.testing.assert_allclose(stats.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(features, rowvar=False), rtol=1e-12)


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


def test_noise_floor_compares_disjoint_halves():
    features = RNG.normal(size=(400, 3))
    floor = noise_floor(features, seed=1)
    assert floor == noise_floor(features, seed=1) != noise_floor(features, seed=2)
    assert 0 < floor < 0.3
    # Two values only: halves that shared a row would be at distance 0 with one of the seeds.
    first, second = np.zeros(3), np.full(3, 8.0)
    rows = np.stack([first, second, first, second])
    floors = {round(noise_floor(rows, seed), 6) for seed in range(20)}
    assert floors == {0.0, 192.0}


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
