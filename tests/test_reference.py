import re

import numpy as np
import pytest

from guided_distill.errors import UserError
from guided_distill.evaluation import reference as reference_module
from guided_distill.evaluation.gaussians import frechet_distance, gaussian_stats
from guided_distill.evaluation.neighbours import neighbourhood
from guided_distill.evaluation.reference import check, load, make_reference, save

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(60, 5)).astype(np.float32)
MADE = {"network": "classifier", "weights_hash": "ab12", "resize": "none", "resolution": "8x8x1"}


def make(features=FEATURES, **changes):
    return make_reference(gaussian_stats(FEATURES), features, **{**MADE, "source": "digits/train", **changes})


def test_a_reference_comes_back_as_it_was(tmp_path):
    made = make()
    save(tmp_path / "reference.npz", made)
    found = load(tmp_path / "reference.npz")
    for name in ("network", "weights_hash", "resize", "resolution", "source", "hash", "num_images"):
        assert getattr(found, name) == getattr(made, name), name
    np.testing.assert_array_equal(found.gaussian.mean, made.gaussian.mean)
    np.testing.assert_array_equal(found.gaussian.scatter, made.gaussian.scatter)
    np.testing.assert_array_equal(found.neighbours.features, FEATURES)
    assert found.neighbours.radii.keys() == {3, 5}
    for k, radii in neighbourhood(FEATURES).radii.items():
        np.testing.assert_array_equal(found.neighbours.radii[k], radii)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.npz"]


def test_the_hash_is_of_all_that_it_holds():
    assert make().hash == make().hash and re.fullmatch("[0-9a-f]{64}", make().hash)
    others = [make(**{name: "other"}) for name in (*MADE, "source")]
    others += [make(FEATURES[::-1]), make(FEATURES * np.float32(1.001)), make(FEATURES[::6])]
    assert len({make().hash, *(other.hash for other in others)}) == len(others) + 1


def test_the_moments_are_of_all_images_and_the_neighbours_of_those_given():
    made = make(FEATURES[::3])
    assert made.num_images == made.gaussian.count == 60
    np.testing.assert_array_equal(made.neighbours.features, FEATURES[::3])


@pytest.mark.parametrize("name", MADE)
def test_another_way_of_measuring_is_refused_by_name(name):
    check(make(), **MADE)
    with pytest.raises(UserError, match=f"digits/train has {name} {MADE[name]}, and the samples have another"):
        check(make(), **{**MADE, name: "another"})


@pytest.fixture
def small_inception(monkeypatch):
    """Published statistics of 6 features instead of 2,048, whose covariances would be 32 MB each."""
    monkeypatch.setattr(reference_module, "_PUBLISHED_DIM", 6)
    features = RNG.normal(size=(50, 6))
    return features, {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}


@pytest.mark.parametrize("theirs", ["ADM", "EDM"])
def test_published_statistics_give_a_distance(theirs, small_inception, tmp_path):
    features, moments = small_inception
    if theirs == "ADM":
        images = np.zeros((3, 16, 24, 3), np.uint8)
        moments |= {"mu_s": np.zeros(4), "sigma_s": np.eye(4), "arr_0": images}
    np.savez(tmp_path / "published.npz", **moments)
    found = load(tmp_path / "published.npz")
    samples = gaussian_stats(RNG.normal(size=(40, 6)))
    expected = frechet_distance(samples, gaussian_stats(features))
    assert frechet_distance(samples, found.gaussian) == pytest.approx(expected, rel=1e-9)
    assert (found.network, found.source, found.num_images) == ("inception_v3", "published.npz", None)
    assert found.neighbours is None and len(found.hash) == 64
    assert found.resolution == ("16x24x3" if theirs == "ADM" else "")
    same = {"network": "inception_v3", "weights_hash": "ab", "resize": "299x299"}
    check(found, **same, resolution="16x24x3")
    with pytest.raises(UserError, match="network inception_v3, and the samples have classifier"):
        check(found, **{**same, "network": "classifier"}, resolution="16x24x3")
    if theirs == "ADM":
        with pytest.raises(UserError, match="resolution 16x24x3, and the samples have 32x32x3"):
            check(found, **same, resolution="32x32x3")


def test_the_covariance_of_few_images_is_taken_as_it_is(small_inception, tmp_path):
    _, moments = small_inception
    np.savez(tmp_path / "published.npz", mu=moments["mu"], sigma=np.zeros((6, 6)))
    np.testing.assert_array_equal(load(tmp_path / "published.npz").gaussian.covariance, np.zeros((6, 6)))


def test_what_is_no_reference_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no reference .*missing.npz; make it with --mode=reference"):
        load(tmp_path / "missing.npz")
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(7), sigma=np.eye(7))
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], object), sigma=np.eye(7))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "statistics.pkl").write_bytes(b"\x80\x04N.")
    (tmp_path / "empty.npz").touch()
    (tmp_path / "torn.npz").write_bytes((tmp_path / "narrow.npz").read_bytes()[:300])
    for name, why in {
        "other.npz": "mu",
        "narrow.npz": r"mu \(7,\) .* not of 2048",
        "objects.npz": "allow_pickle",
        "array.npy": "",
        "statistics.pkl": "pickle",
        "empty.npz": "",
        "torn.npz": "",
    }.items():
        with pytest.raises(UserError, match=rf"{name} is no reference \(.*{why}.*\): name an npz"):
            load(tmp_path / name)
