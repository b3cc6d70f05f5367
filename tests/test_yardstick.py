"""What samples are measured with: made in pieces or at once, on one device or on eight, the same."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import tiny_config

from guided_distill import sharding
from guided_distill.data import load_dataset
from guided_distill.errors import UserError
from guided_distill.evaluation import yardstick
from guided_distill.evaluation.features import FeatureNetwork
from guided_distill.evaluation.samples import Samples
from guided_distill.experiment import from_config

EXPERIMENT = from_config(tiny_config())
MESH = sharding.make_mesh()


@pytest.fixture(scope="module")
def dataset():
    return load_dataset(EXPERIMENT.data)


@pytest.fixture(scope="module")
def classifier(dataset, tmp_path_factory):
    (found,) = yardstick.make_yardsticks(EXPERIMENT, dataset, tmp_path_factory.mktemp("e"), MESH, lambda text: None)
    return found


def make(dataset, directory, **values):
    experiment = from_config(tiny_config(**values))
    return yardstick.make_yardsticks(experiment, dataset, directory, MESH, lambda text: None)


def test_statistics_made_in_pieces_are_those_made_at_once(classifier, dataset, monkeypatch):
    monkeypatch.setattr(yardstick, "_CHUNK", 700)
    monkeypatch.setattr(yardstick, "_NEIGHBOURS", 100)
    texts = {"source": "digits", **yardstick._of(classifier.network, EXPERIMENT.data)}
    pieces = yardstick._reference_of(classifier.network, dataset.train, MESH, texts)
    whole = classifier.reference
    assert pieces.num_images == whole.num_images == 1500
    assert pieces.noise_floor == pytest.approx(whole.noise_floor, rel=1e-6) and 0 < whole.noise_floor < 30
    np.testing.assert_allclose(pieces.gaussian.scatter, whole.gaussian.scatter, rtol=1e-9, atol=1e-6)
    kept = np.linspace(0, 1499, 100).astype(int)
    np.testing.assert_allclose(pieces.neighbours.features, whole.neighbours.features[kept], rtol=1e-4, atol=1e-5)


def test_figures_of_images_do_not_depend_on_the_devices(classifier, dataset):
    x = np.stack([record["image"] for record in (dataset.test[i] for i in range(60))]).astype(np.float32) / 127.5 - 1
    label = np.arange(60) % 10
    found = []
    for devices in (jax.devices()[:1], jax.devices()):
        features, logits = yardstick.features_of(classifier.network, x, sharding.make_mesh(devices))
        order = np.random.default_rng(0).permutation(60)
        batches = [Samples(rows, features[rows], logits[rows], label[rows]) for rows in np.split(order, 6)]
        found.append(yardstick.measure_by([classifier], [batches], 0, "x")["metrics"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_figures_of_two_networks_stand_side_by_side(classifier):
    other = dataclasses.replace(
        classifier,
        network=dataclasses.replace(classifier.network, name="other", labels_are_the_datas=False),
        reference=dataclasses.replace(classifier.reference, network="other"),
    )
    rng = np.random.default_rng(1)
    parts = [
        [Samples(np.arange(40), rng.normal(size=(40, 64)), rng.normal(size=(40, 10)), np.arange(40) % 10)]
        for _ in range(2)
    ]
    both = yardstick.measure_by([classifier, other], parts, 0, "x")["metrics"]
    alone = yardstick.measure_by([classifier], parts[:1], 0, "x")["metrics"]
    assert {"frechet_classifier", "frechet_other", "precision_other", "label_agreement"} <= both.keys()
    assert {name: both[name] for name in alone} == alone


def test_what_is_there_is_taken_and_what_is_of_other_data_is_made_anew(dataset, tmp_path):
    (first,) = make(dataset, tmp_path)
    said = []
    (again,) = yardstick.make_yardsticks(EXPERIMENT, dataset, tmp_path, MESH, said.append)
    assert said == [] and again.provenance == first.provenance and again.test_accuracy == first.test_accuracy
    few = dataclasses.replace(
        dataset, train=type(dataset.train)(dataset.train.images[:900], dataset.train.labels[:900])
    )
    (other,) = yardstick.make_yardsticks(EXPERIMENT, few, tmp_path, MESH, said.append)
    assert said == ["statistics of digits/train (900 images) by classifier"]
    assert (
        other.reference.num_images == 900 and other.provenance["reference_hash"] != first.provenance["reference_hash"]
    )


def test_a_network_of_imagenet_without_its_weights_names_the_command(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="--mode=import --network=efficientnet_lite0"):
        make(dataset, tmp_path, **{"evaluate.features": ("efficientnet_lite0",)})


def test_features_that_are_not_finite_name_the_network(classifier):
    broken = Samples(np.arange(4), np.full((4, 64), np.nan), np.zeros((4, 10)), np.zeros(4, int))
    with pytest.raises(UserError, match="my samples, by classifier: 4 of 4 samples"):
        yardstick.measure_by([classifier], [[broken]], 0, "my samples")


def test_the_network_is_named_with_its_weights():
    network = FeatureNetwork("n", {}, None, "ab", "none", True)
    assert yardstick._of(network, EXPERIMENT.data) == {
        "network": "n", "weights_hash": "ab", "resize": "none", "resolution": "8x8x1",
    }  # fmt: skip
