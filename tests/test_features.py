"""Feature networks behind one interface: the same figures in any batches and on any number of devices."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from tiny import quick_config
from weights import random_state

from guided_distill import costs, evaluate, pictures, sharding
from guided_distill.errors import UserError
from guided_distill.evaluation import features
from guided_distill.evaluation.features import FeatureNetwork, classifier_network, compute, load_feature_network
from guided_distill.experiment import from_config
from guided_distill.interop import feature_weights
from guided_distill.models.classifier import Classifier
from guided_distill.models.efficientnet_lite import EfficientNetLite0
from guided_distill.models.inception import InceptionV3
from guided_distill.stages import make_stages
from guided_distill.teachers import flops_of_a_call
from guided_distill.workdir import open_run

RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (37, 4, 4, 3)).astype(np.float32)
PARAMS = {"a": RNG.normal(size=(48, 5)).astype(np.float32), "b": RNG.normal(size=(5, 3)).astype(np.float32)}


def small_apply(params, x):
    traces.append(x.shape)
    hidden = jnp.tanh(x.reshape(len(x), -1) @ params["a"])
    return hidden, hidden @ params["b"]


traces = []
SMALL = FeatureNetwork("small", PARAMS, small_apply, "", "none", False)


def classifier_params(shape=(8, 8, 1)):
    shapes = jax.eval_shape(Classifier(10).init, jax.random.key(0), jnp.zeros((1, *shape)))["params"]
    return jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32) / 10, shapes)


@pytest.mark.parametrize(("batch_size", "devices"), [(1, 1), (7, 1), (64, 1), (8, 8), (40, 2)])
def test_features_depend_on_neither_batches_nor_devices(batch_size, devices):
    got, logits = compute(SMALL, X, batch_size=batch_size, mesh=sharding.make_mesh(jax.devices()[:devices]))
    hidden = np.tanh(X.reshape(37, -1) @ PARAMS["a"])
    np.testing.assert_allclose(got, hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits, hidden @ PARAMS["b"], rtol=1e-4, atol=1e-5)
    assert isinstance(got, np.ndarray) and got.dtype == logits.dtype == np.float32


def test_one_program_serves_every_batch_and_call():
    traces.clear()
    compute(SMALL, X, batch_size=5)
    compute(dataclasses.replace(SMALL, params=jax.tree.map(np.zeros_like, PARAMS)), X[:3], batch_size=5)
    assert traces == [(5, 4, 4, 3)]


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    with pytest.raises(UserError, match="batch_size is 12, which does not divide over 8 devices"):
        compute(SMALL, X, batch_size=12, mesh=sharding.make_mesh())


# What networks of ImageNet see


def test_pixels_are_those_of_a_png():
    between = (np.arange(255, dtype=np.float32) + 0.5) / 127.5 - 1
    x = np.concatenate([RNG.uniform(-1.2, 1.2, 10_000).astype(np.float32), between, between - 1e-6, between + 1e-6])
    x = x[: len(x) // 3 * 3].reshape(1, -1, 1, 3)
    np.testing.assert_array_equal(jax.jit(features._pixels)(x), pictures.to_uint8(x))


def test_images_of_bytes_come_back_exactly():
    bytes_ = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(features._pixels(jnp.asarray(bytes_ / np.float32(127.5) - 1))[..., :1], bytes_)


def test_grey_is_repeated_to_three_channels():
    grey = RNG.uniform(-1, 1, (2, 3, 3, 1)).astype(np.float32)
    np.testing.assert_array_equal(features._pixels(grey), pictures.to_uint8(np.repeat(grey, 3, axis=-1)))


@pytest.mark.parametrize("shape", [(2,), (64, 1), (8, 8, 4), (8, 8, 2)])
@pytest.mark.parametrize("name", features.NETWORKS)
def test_samples_that_are_no_images_are_refused(name, shape):
    network = FeatureNetwork(name, {}, features.NETWORKS[name][0], "", "", False)
    with pytest.raises(UserError, match="no images of one or three channels.*classifier") as error:
        compute(network, np.zeros((3, *shape)), batch_size=2)
    assert "\n" not in str(error.value)


# The networks


def test_an_unknown_network_is_named():
    with pytest.raises(UserError, match="'vgg'.*inception_v3, efficientnet_lite0"):
        load_feature_network("vgg")


@pytest.mark.parametrize("name", features.NETWORKS)
def test_what_progress_is_told_of_a_network_is_what_it_takes(name):
    """A run by a network of ImageNet is told its time left from this: it may take more than all sampling."""
    module = {"inception_v3": InceptionV3(), "efficientnet_lite0": EfficientNetLite0()}[name]
    x = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    params = jax.eval_shape(lambda x: module.init(jax.random.key(0), features._pixels(x)), x)["params"]
    counted = costs.cost_of(features.NETWORKS[name][0], params, x).flops
    assert counted == pytest.approx(features.OPERATIONS[name], rel=0.05)
    experiment = from_config(quick_config(**{"evaluate.features": (name,)}))
    stages = make_stages(experiment)
    passes = evaluate.seeing_work(experiment, stages)
    assert passes * flops_of_a_call(stages[0].model, stages[0].init) == pytest.approx(counted, rel=0.06)
    plain = evaluate.work(from_config(quick_config()), stages)
    rows = 2 * (1 + 2 + 2 + 2)  # w by the reference, the teacher's steps, those of stage one and the students'
    assert evaluate.work(experiment, stages) - plain == experiment.evaluate.num_samples * rows * passes


@pytest.mark.parametrize("name", features.NETWORKS)
def test_missing_weights_name_the_command_that_makes_them(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match=rf"guided_distill\[eval\].*--mode=import --network={name}") as error:
        load_feature_network(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(8, 8, 1), (2,)])
def test_the_classifier_takes_samples_of_any_shape(shape):
    network = classifier_network(classifier_params(shape))
    got, logits = compute(network, RNG.normal(size=(5, *shape)), batch_size=4)
    assert got.shape == (5, 64) and logits.shape == (5, 10)
    assert (network.name, network.labels_are_the_datas) == ("classifier", True)


def test_the_hash_is_of_names_and_values():
    params = {"b": {"kernel": np.ones((2, 3), np.float32)}, "a": {"bias": np.zeros(2, np.float32)}}
    expected = hashlib.sha256()
    for name, value in (("a/bias (2,) float32", np.zeros(2, "f4")), ("b/kernel (2, 3) float32", np.ones(6, "f4"))):
        expected.update(name.encode() + value.tobytes())
    assert features._hash(params) == features._hash(jax.tree.map(jnp.asarray, params)) == expected.hexdigest()
    assert features._hash({"a": params["a"], "c": params["b"]}) != features._hash(params)


@pytest.mark.slow
def test_efficientnet_measures_the_same_in_any_batches_and_on_any_devices():
    params = unflatten_dict(
        feature_weights.convert("efficientnet_lite0", random_state("efficientnet_lite0"), "-"), sep="/"
    )
    network = FeatureNetwork("lite", params, features.NETWORKS["efficientnet_lite0"][0], "", "", False)
    x = RNG.uniform(-1, 1, (9, 32, 32, 3)).astype(np.float32)
    whole, logits = compute(network, x, batch_size=9)
    scale = np.abs(whole).max()
    for batch_size, devices in ((1, 1), (7, 1), (8, 8)):
        got, others = compute(network, x, batch_size=batch_size, mesh=sharding.make_mesh(jax.devices()[:devices]))
        np.testing.assert_allclose(got, whole, rtol=1e-4, atol=1e-5 * scale)
        np.testing.assert_allclose(others, logits, rtol=1e-4, atol=1e-5 * np.abs(logits).max())
    assert np.abs(whole - whole[::-1]).max() > 1e-2 * scale


def test_weights_that_are_missing_are_said_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="--mode=import --network=efficientnet_lite0"):
        open_run(quick_config(**{"evaluate.features": ("efficientnet_lite0",)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
