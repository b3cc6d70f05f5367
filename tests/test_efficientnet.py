"""EfficientNet-Lite0: its published size, its resize beside Pillow's, and the depthwise convolution written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from guided_distill.models.efficientnet_lite import Block, Conv, DepthwiseConv, EfficientNetLite0, resize

IMAGE = jax.ShapeDtypeStruct((2, 32, 48, 3), jnp.float32)


def test_features_and_logits_have_their_shapes():
    (features, logits), _ = jax.eval_shape(EfficientNetLite0().init_with_output, jax.random.key(0), IMAGE)
    assert (features.shape, logits.shape) == ((2, 1280), (2, 1000))


def test_published_number_of_parameters():
    params = jax.eval_shape(EfficientNetLite0().init, jax.random.key(0), IMAGE)["params"]
    size = {name: value.size for name, value in flatten_dict(params, sep="/").items()}
    folded = [name for name in size if name.endswith("bias") and name != "logits/bias"]
    # A folded bias stands for the scale and the shift of a batch normalisation.
    assert sum(size.values()) + sum(size[name] for name in folded) == 4_652_008
    assert len(folded) == 49


def test_maps_have_the_sides_that_the_strides_leave():
    def run(x):
        variables = EfficientNetLite0().init(jax.random.key(0), x)
        captured = EfficientNetLite0().apply(variables, x, capture_intermediates=True, mutable=["intermediates"])[1]
        return captured["intermediates"]

    maps = jax.eval_shape(run, IMAGE)
    sides = {name: maps[name]["__call__"][0].shape[1:3] for name in maps if name.startswith(("stem", "block", "head"))}
    by_block = [112, 56, 56, 28, 28, *6 * [14], *5 * [7]]
    assert sides == {f"block_{i}": (n, n) for i, n in enumerate(by_block)} | {"stem": (112, 112), "head": (7, 7)}


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (64, 48), (224, 224), (300, 401)])
def test_the_resize_is_pillows(size):
    x = np.random.default_rng(0).integers(0, 256, size).astype(np.float32)
    expected = np.asarray(Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(resize(jnp.asarray(x)[None, :, :, None])[0, ..., 0], expected, atol=5e-3)


def parameters(module, x, fill=0.0):
    """Those of a module, all of one value."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    return jax.tree.map(lambda leaf: np.full(leaf.shape, fill, np.float32), shapes)


def apply(module, params, x):
    return np.asarray(jax.jit(module.apply)({"params": params}, x))


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, (7, 10)), (5, 2, (7, 10)), (3, 2, (8, 8))])
def test_depthwise_convolution_is_xlas(kernel, stride, size):
    rng = np.random.default_rng(0)
    x, weights = (rng.normal(size=shape).astype(np.float32) for shape in ((2, *size, 6), (kernel, kernel, 1, 6)))
    bias = np.linspace(-1, 1, 6, dtype=np.float32)

    @jax.jit
    def grouped(x, weights):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, weights, (stride, stride), "SAME", dimension_numbers=layout, feature_group_count=6
        )

    ours = apply(DepthwiseConv(6, kernel, stride), {"kernel": weights, "bias": bias}, x)
    np.testing.assert_allclose(ours, np.asarray(grouped(x, weights)) + bias, rtol=1e-4, atol=1e-4)


def test_convolution_adds_its_bias_and_no_nonlinearity():
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)
    params = {"kernel": np.eye(3, 2, dtype=np.float32)[None, None], "bias": np.array([-9, 9], np.float32)}
    np.testing.assert_allclose(apply(Conv(2, 1), params, x), x[..., :2] + params["bias"], rtol=1e-5)


@pytest.mark.parametrize(
    ("stride", "features", "kept"), [(1, 4, True), (2, 4, False), (1, 5, False)], ids=["skip", "stride", "width"]
)
def test_a_block_adds_its_input_where_shapes_allow(stride, features, kept):
    x = np.random.default_rng(0).normal(size=(1, 6, 6, 4)).astype(np.float32)
    block = Block(3, stride, 6, features)
    out = apply(block, parameters(block, x), x)
    np.testing.assert_array_equal(out, x if kept else np.zeros_like(out))


@pytest.mark.parametrize(("middle", "clipped"), [(0.5, 3.0), (2.0, 6.0)])
def test_a_block_is_clipped_at_six_after_each_of_its_inner_layers(middle, clipped):
    x, block = np.full((1, 3, 3, 1), 100, np.float32), Block(3, 1, 6, 1)
    params = parameters(block, x)
    params["expand"]["kernel"] += 1
    params["depthwise"]["kernel"][1, 1] = middle
    params["project"]["kernel"] += 1
    # Six channels, added to the input: of min(100, 6) * middle, clipped again.
    np.testing.assert_allclose(apply(block, params, x), np.full((1, 3, 3, 1), 100 + 6 * clipped))


def test_the_block_without_expansion_has_no_expanding_layer():
    params = jax.eval_shape(Block(3, 1, 1, 4).init, jax.random.key(0), jnp.zeros((1, 4, 4, 4)))["params"]
    assert set(params) == {"depthwise", "project"}
