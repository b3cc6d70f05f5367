"""Inception-v3 of FID: its shapes and size, and what is its own: the resize, the pools, the logits without bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from guided_distill.models import inception
from guided_distill.models.inception import InceptionV3, resize


def shapes(function, *size):
    x = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    return jax.eval_shape(lambda x: function(InceptionV3(), jax.random.key(0), x), x)


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (512, 300)])
def test_taps_have_their_widths_for_images_of_any_size(size):
    taps, _ = shapes(InceptionV3.init_with_output, *size)
    widths = {"64": 64, "192": 192, "768": 768, "2048": 2048, "logits_unbiased": 1008, "logits": 1008}
    assert {name: tap.shape for name, tap in taps.items()} == {name: (2, width) for name, width in widths.items()}


def test_blocks_have_the_shapes_of_the_paper():
    def run(module, key, x):
        variables = module.init(key, x)
        return module.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])[1]["intermediates"]

    blocks = {name: value["__call__"][0].shape[1:] for name, value in shapes(run, 32, 32).items() if "Mixed" in name}
    assert blocks == {
        "Mixed_5b": (35, 35, 256),
        **{f"Mixed_5{letter}": (35, 35, 288) for letter in "cd"},
        **{f"Mixed_6{letter}": (17, 17, 768) for letter in "abcde"},
        "Mixed_7a": (8, 8, 1280),
        **{f"Mixed_7{letter}": (8, 8, 2048) for letter in "bc"},
    }


def test_published_number_of_parameters():
    params = flatten_dict(shapes(InceptionV3.init, 32, 32)["params"], sep="/")
    size = {name: value.size for name, value in params.items()}
    layers = [name for name in params if name.endswith("/kernel") and name != "fc/kernel"]
    # A folded bias stands for the scale and the shift of a batch normalisation.
    trunk = sum(size[name] + 2 * size[name.replace("kernel", "bias")] for name in layers)
    assert len(layers) == 94
    assert trunk + 2048 * 1000 + 1000 == 23_834_568  # Inception-v3 with 1000 logits and no auxiliary ones
    assert size["fc/kernel"] + size["fc/bias"] == 2048 * 1008 + 1008


def test_the_last_block_alone_pools_by_maxima_among_those_of_stride_one():
    def primitives(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name.startswith("reduce_window"):
                yield equation.primitive.name.split("_")[2], equation.params["window_strides"][1]
            for inner in equation.params.values():
                if hasattr(inner, "jaxpr"):
                    yield from primitives(inner.jaxpr)

    params = shapes(InceptionV3.init, 32, 32)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    pools = list(primitives(jax.make_jaxpr(InceptionV3().apply)(params, x).jaxpr))
    halving, mean, largest = ("max", 2), ("sum", 1), ("max", 1)
    # An average that leaves the padding out counts what it adds up: two sums.
    assert pools == [*2 * [halving], *6 * [mean], halving, *8 * [mean], halving, *2 * [mean], largest]


# The resize


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 20), (350, 299)])
def test_resizing_a_ramp_starts_at_its_first_pixel_and_repeats_its_last(height, width):
    down, across = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    x = np.stack([np.add.outer(down, 100 * across), np.add.outer(0 * down, across)], -1)[None]
    y = np.minimum(np.arange(299) * height / 299, height - 1)
    z = np.minimum(np.arange(299) * width / 299, width - 1)
    resized = np.asarray(jax.jit(lambda x: resize(x, 299))(x))[0]
    np.testing.assert_allclose(resized[..., 0], np.add.outer(y, 100 * z), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(resized[..., 1], np.broadcast_to(z, (299, 299)), rtol=1e-5, atol=1e-4)


def test_images_of_the_networks_own_size_are_left_as_they_are():
    x = np.random.default_rng(0).uniform(size=(1, 299, 299, 3)).astype(np.float32)
    np.testing.assert_array_equal(resize(x, 299), x)


# Pools and logits


def test_an_average_leaves_the_padding_out():
    np.testing.assert_allclose(inception._average(jnp.full((1, 5, 4, 2), 3.0)), np.full((1, 5, 4, 2), 3.0), rtol=1e-6)
    corner = inception._average(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, 0, 0, 0]
    assert corner == pytest.approx((0 + 1 + 4 + 5) / 4)


def test_maxima_do_not_see_the_padding():
    np.testing.assert_array_equal(inception._largest(jnp.full((1, 4, 4, 1), -2.0)), np.full((1, 4, 4, 1), -2.0))


def test_unbiased_logits_lack_the_bias_alone():
    rng = np.random.default_rng(0)
    features, kernel = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 2048), (2048, 1008)))
    bias = np.linspace(-1, 1, 1008, dtype=np.float32)
    unbiased, logits = inception.Logits().apply({"params": {"kernel": kernel, "bias": bias}}, features)
    np.testing.assert_allclose(unbiased, features @ kernel, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(logits - unbiased, np.tile(bias, (2, 1)), atol=1e-4)


@pytest.mark.parametrize(
    ("block", "channels"),
    [
        (inception.InceptionA(8), 64 + 64 + 96 + 8),
        (inception.InceptionB(), 384 + 96 + 4),
        (inception.InceptionC(8), 4 * 192),
        (inception.InceptionD(), 320 + 192 + 4),
        (inception.InceptionE(inception._average), 320 + 4 * 384 + 192),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else "",
)
def test_blocks_join_their_branches(block, channels):
    out, _ = jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.zeros((1, 9, 9, 4)))
    assert out.shape[-1] == channels
