"""Weights of feature networks: folded, verified, cached; each thing that can be wrong with a file gets one line."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from weights import random_state

from guided_distill.errors import UserError
from guided_distill.evaluation.features import load_feature_network
from guided_distill.interop import feature_weights
from guided_distill.interop.feature_weights import cache_path, convert, import_weights, load_weights, source_shapes

LITE = "efficientnet_lite0"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def state():
    return random_state(LITE)


@pytest.fixture
def source(state, tmp_path):
    path = tmp_path / "lite.safetensors"
    safetensors.numpy.save_file(state, path)
    return path


def refused(match, call, *arguments):
    with pytest.raises(UserError, match=match) as error:
        call(*arguments)
    assert "\n" not in str(error.value)


# Names and folding


def test_the_names_are_those_of_pytorch():
    inception = source_shapes("inception_v3")
    assert len(inception) == 94 * 5 + 2
    assert inception["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert inception["Mixed_6b.branch7x7_2.conv.weight"] == (128, 128, 1, 7)
    assert inception["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
    assert (inception["fc.weight"], inception["fc.bias"]) == ((1008, 2048), (1008,))
    lite = source_shapes(LITE)
    assert len(lite) == 49 * 5 + 2
    assert lite["_conv_stem.weight"] == (32, 3, 3, 3) and lite["_bn0.bias"] == (32,)
    assert lite["_blocks.3._depthwise_conv.weight"] == (144, 1, 5, 5) and lite["_blocks.3._bn1.running_mean"] == (144,)
    assert lite["_blocks.15._project_conv.weight"] == (320, 1152, 1, 1) and lite["_blocks.15._bn2.weight"] == (320,)
    assert "_blocks.0._expand_conv.weight" not in lite and lite["_fc.weight"] == (1000, 1280)


@pytest.mark.parametrize(
    ("layer", "weight", "norm"),
    [
        ("block_5/expand", "_blocks.5._expand_conv", "_blocks.5._bn0"),
        ("block_5/project", "_blocks.5._project_conv", "_blocks.5._bn2"),
        ("head", "_conv_head", "_bn1"),
    ],
)
def test_a_folded_layer_is_the_convolution_and_its_normalisation(state, layer, weight, norm):
    params = convert(LITE, state, "file")
    kernel = state[f"{weight}.weight"]
    parts = ("weight", "bias", "running_mean", "running_var")
    scale, shift, mean, variance = (state[f"{norm}.{part}"] for part in parts)
    x = np.random.default_rng(0).normal(size=(4, kernel.shape[1]))
    expected = (x @ kernel[:, :, 0, 0].T - mean) / np.sqrt(variance + 1e-3) * scale + shift
    ours = x @ params[f"{layer}/kernel"][0, 0] + params[f"{layer}/bias"]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_kernels_keep_their_directions(state):
    params = convert(LITE, state, "file")
    for layer, weight, norm in (
        ("stem", "_conv_stem", "_bn0"),
        ("block_3/depthwise", "_blocks.3._depthwise_conv", "_blocks.3._bn1"),
    ):
        factor = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + 1e-3)
        expected = np.einsum("oihw,o->hwio", state[f"{weight}.weight"], factor)
        np.testing.assert_allclose(params[f"{layer}/kernel"], expected, rtol=1e-5)
    np.testing.assert_array_equal(params["logits/kernel"], state["_fc.weight"].T)


# Into the cache and out of it


def test_import_and_load(source, state, capsys):
    path = import_weights(LITE, str(source))
    assert path == cache_path(LITE) and f"4,631,000 parameters of {source} are now in {path}" in capsys.readouterr().out
    params = flatten_dict(load_weights(LITE), sep="/")
    expected = convert(LITE, state, source)
    assert params.keys() == expected.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(value, expected[name])
    with safetensors.safe_open(path, framework="numpy") as file:
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        assert file.metadata() == {"network": LITE, "source_sha256": digest}


def test_the_hash_of_the_weights_is_the_same_after_another_import(source):
    hashes = set()
    for _ in range(3):  # safetensors writes its metadata in an order of its own each time
        import_weights(LITE, str(source))
        hashes.add(load_feature_network(LITE).weights_hash)
    assert len(hashes) == 1


def test_the_cache_is_in_the_home_without_xdg(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_path(LITE) == Path.home() / ".cache" / "guided_distill" / f"{LITE}.safetensors"


def test_a_pth_is_read_by_pytorch_without_pickles(tmp_path, state, monkeypatch):
    """Here a stand-in for PyTorch: the real one reads the published file in tests/parity."""
    path, asked = tmp_path / "lite.pth", {}
    path.write_bytes(b"weights")
    published = dataclasses.replace(feature_weights.SOURCES[LITE], sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(feature_weights.SOURCES, LITE, published)

    class Tensor:
        def __init__(self, value):
            self.numpy = lambda: value

    def load(path, **options):
        asked.update(options)
        return {key: Tensor(value) for key, value in state.items()} | {"_bn0.num_batches_tracked": Tensor(np.array(3))}

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(load=load))
    import_weights(LITE, str(path))
    assert asked["weights_only"] is True
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(r"lite.pth is a file of PyTorch.*pip install 'guided_distill\[eval\]'", import_weights, LITE, str(path))


# What can be wrong


def test_another_file_is_refused_by_name(tmp_path):
    path = tmp_path / "other.pth"
    path.write_bytes(b"other")
    refused(r"other.pth has SHA-256 d9298a10.*6726825d.*download it again", import_weights, "inception_v3", str(path))


def test_each_key_that_is_wrong_is_named(state):
    broken = dict(state)
    for i in range(5):
        del broken[f"_blocks.{i}._bn1.bias"]
    broken["aux.weight"] = np.zeros(3)
    broken["_fc.weight"] = broken["_fc.weight"].T
    broken["_bn1.bias"] = np.full_like(broken["_bn1.bias"], np.nan)
    refused(
        r"lite.pth does not hold the weights of efficientnet_lite0: missing: _blocks.0._bn1.bias, .* and 2 more; "
        r"left over: aux.weight; of another shape: _fc.weight; not finite: _bn1.bias$",
        convert,
        LITE,
        broken,
        "lite.pth",
    )


def test_mistakes_of_the_command(tmp_path, monkeypatch):
    refused("--network=vgg: must be one of efficientnet_lite0, inception_v3", import_weights, "vgg")
    refused("--source=.*nowhere.pth: no such file", import_weights, LITE, "nowhere.pth")
    refused("--source is missing: the path of pt_inception-2015-12-05-6726825d.pth", import_weights, "inception_v3")
    absent = dataclasses.replace(feature_weights.SOURCES[LITE], package="no_such_package")
    monkeypatch.setitem(feature_weights.SOURCES, LITE, absent)
    refused(r"not installed: pip install 'guided_distill\[eval\]'", import_weights, LITE)
    half = tmp_path / "half.safetensors"
    half.write_bytes(b"\x08\0\0\0\0\0\0\0half")
    refused("half.safetensors is no whole safetensors file", import_weights, LITE, str(half))


def test_a_cache_that_cannot_be_written(source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refused("cannot be written.*XDG_CACHE_HOME", import_weights, LITE, str(source))


def test_a_cached_file_of_something_else_is_made_again(source):
    path = import_weights(LITE, str(source))
    path.rename(cache_path("inception_v3"))
    refused("does not hold inception_v3.*--mode=import --network=inception_v3 --source=", load_weights, "inception_v3")
    path.write_bytes(cache_path("inception_v3").read_bytes()[:1000])
    refused("is no whole safetensors file", load_weights, LITE)
    safetensors.numpy.save_file({"stem/kernel": np.zeros(3, np.float32)}, path, {"network": LITE})
    refused("does not hold efficientnet_lite0 as this version has it", load_weights, LITE)


def test_the_command_needs_no_config(source):
    program = [sys.executable, "-m", "guided_distill.main", "--mode=import", f"--network={LITE}", f"--source={source}"]
    done = subprocess.run(program, capture_output=True, text=True, env=os.environ, cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and cache_path(LITE).exists(), done.stderr
