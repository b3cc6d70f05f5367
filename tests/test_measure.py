import dataclasses

import numpy as np
import pytest

from guided_distill.evaluation.gaussians import gaussian_stats
from guided_distill.evaluation.labels import diversity, label_agreement
from guided_distill.evaluation.measure import measure, name_of
from guided_distill.evaluation.pixels import distance, saturation
from guided_distill.evaluation.reference import make_reference
from guided_distill.evaluation.samples import Samples, collect, merge

RNG = np.random.default_rng(0)
N = 120
IMAGES = RNG.uniform(-1, 1, (N, 4, 4, 1))
ALL = Samples(
    index=np.arange(N),
    features=RNG.normal(size=(N, 6)).astype(np.float32),
    logits=RNG.normal(size=(N, 4)).astype(np.float32),
    label=RNG.integers(0, 4, N),
    figures={"saturation": saturation(IMAGES, 1.0), "distance_to_reference": distance(IMAGES, IMAGES**2)},
)


def reference(network="classifier", features=None, **settings):
    features = RNG.normal(size=(200, 6)) + 0.2 if features is None else features
    said = {"weights_hash": "", "resize": "", "resolution": "", "source": "some set"}
    return make_reference(gaussian_stats(features), features, network=network, **said, **settings)


REFERENCE = reference()


def rows(samples, which):
    return Samples(
        samples.index[which],
        samples.features[which],
        samples.logits[which],
        samples.label[which],
        {name: values[which] for name, values in samples.figures.items()},
    )


def first(count):
    return rows(ALL, slice(count))


def measured(samples=ALL, to=REFERENCE, **changes):
    return measure(samples, to, **{"labels_are_the_datas": True, "seed": 0, **changes})


@pytest.mark.parametrize("size", [1, 7, N])
@pytest.mark.parametrize("hosts", [1, 3])
def test_batches_of_any_size_and_order_from_several_hosts_give_the_same_figures(size, hosts):
    order = RNG.permutation(N)
    parts = []
    for host in range(hosts):
        own = order[host::hosts]
        parts.append(merge(rows(ALL, own[start : start + size]) for start in range(0, len(own), size)))
    assert measured(collect(parts)) == measured()


def test_every_figure_is_there_under_its_name():
    found = measured()
    assert set(found["metrics"]) == {
        *(f"{name}_classifier" for name in ("frechet", "score", "precision", "recall", "density", "coverage")),
        *("kid_classifier", "kid_classifier_std", "kid_classifier_se"),
        *("label_agreement", "diversity", "saturation", "distance_to_reference"),
    }
    low, high = found["intervals"]["frechet_classifier"]
    assert low < found["metrics"]["frechet_classifier"] < high
    assert found["settings"] == {"interval_resamples": 200, "score_splits": 1, "kid_subsets": 100, "neighbours": 200}
    assert found["notes"] == []


def test_the_fields_names_are_for_inception_alone():
    assert [name_of(name, "inception_v3") for name in ("frechet", "score", "kid", "recall")] == [
        *("fid", "inception_score", "kid", "recall_inception_v3")
    ]
    assert name_of("frechet", "efficientnet_lite0") == "frechet_efficientnet_lite0"
    found = measured(to=reference("inception_v3"))
    assert {"fid", "inception_score", "kid", "kid_se"} < set(found["metrics"]) and set(found["intervals"]) == {"fid"}


def test_moments_alone_give_a_distance_and_say_so():
    moments = dataclasses.replace(REFERENCE, neighbours=None)
    found = measured(to=moments)
    assert found["metrics"]["frechet_classifier"] == measured()["metrics"]["frechet_classifier"]
    assert not any(name.startswith(("kid", "precision", "coverage")) for name in found["metrics"])
    assert found["notes"] == ["some set holds mean and covariance alone: it gives a Fréchet distance, nothing else"]


def test_few_samples_are_measured_and_it_is_said():
    wide = dataclasses.replace(ALL, features=RNG.normal(size=(N, 300)))
    found = measured(wide, reference(features=RNG.normal(size=(400, 300))))
    assert np.isfinite(list(found["metrics"].values())).all()
    assert len(found["notes"]) == 1 and found["notes"][0].startswith("120 samples give 300 features")
    assert "frechet_classifier" not in measured(first(9))["intervals"]
    assert "precision_classifier" in measured(first(4))["metrics"] and "kid_classifier" in measured(first(3))["metrics"]
    assert "precision_classifier" not in measured(first(3))["metrics"]
    with pytest.raises(ValueError, match="two samples"):
        measured(first(1))


def test_a_score_in_several_splits_has_a_deviation():
    many = Samples(np.arange(1000), RNG.normal(size=(1000, 6)), RNG.normal(size=(1000, 4)))
    found = measured(many)
    assert found["settings"]["score_splits"] == 2 and found["metrics"]["score_classifier_std"] > 0


def test_labels_are_compared_only_where_there_are_such():
    assert "label_agreement" not in measured(labels_are_the_datas=False)["metrics"]
    unlabelled = measured(dataclasses.replace(ALL, label=None))["metrics"]
    assert not {"label_agreement", "diversity"} & set(unlabelled)


def test_another_number_of_features_is_refused():
    with pytest.raises(ValueError, match="samples have 6 features, and some set has 5"):
        measured(to=reference(features=RNG.normal(size=(20, 5))))


def test_label_agreement():
    assert label_agreement(np.eye(3)[[0, 1, 1, 2]], np.array([0, 1, 2, 2])) == 0.75


def test_diversity_is_the_variance_about_the_mean_of_each_label():
    label = np.repeat(np.arange(5), [4, 7, 1, 3, 5])
    features = RNG.normal(size=(20, 6)) + 10 * label[:, None]
    about = sum(((features[label == c] - features[label == c].mean(0)) ** 2).sum() for c in range(5))
    assert diversity(features, label) == pytest.approx(about / (20 - 5), rel=1e-9)
    assert diversity(np.eye(6)[label], label) == pytest.approx(0.0, abs=1e-12)
    assert diversity(features[:4], np.arange(4)) == 0.0


def test_saturation_is_the_share_of_each_images_values_at_the_ends():
    images = np.zeros((2, 4, 4, 1))
    images[0, 0], images[1, :2] = 0.5, [-0.495]
    np.testing.assert_array_equal(saturation(images, 0.5), [4 / 16, 8 / 16])
    np.testing.assert_array_equal(saturation(images, 1.0), [0, 0])


def test_distance_is_per_value_and_image():
    images = np.zeros((2, 2, 2, 3), np.float16)
    images[0, 0, 0, 0] = 2.0
    np.testing.assert_allclose(distance(images, np.zeros_like(images)), [4 / 12, 0])
