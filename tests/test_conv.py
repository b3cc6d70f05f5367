"""The convolution of the networks equals lax's in value and gradient, wherever it is used."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from guided_distill.models.conv import conv_general_dilated

NHWC = ("NHWC", "HWIO", "NHWC")


def ours(x, kernel, **kwargs):
    return conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, **kwargs)


def lax_conv(x, kernel, **kwargs):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, **kwargs)


def arrays(batch, height, width, c_in, c_out, kernel=(3, 3), dtype="float32"):
    """x, kernel and the cotangent of the output."""
    rng = np.random.default_rng(batch + height + c_in)
    shapes = (batch, height, width, c_in), (*kernel, c_in, c_out), (batch, height, width, c_out)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def value_and_cotangents(conv, x, kernel, g):
    value, pullback = jax.vjp(conv, x, kernel)
    return value, *pullback(g)


def assert_close(actual, expected, rtol=1e-5):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        assert np.abs(a - e).max() <= rtol * np.abs(e).max()


@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize(
    "shape, kernel",
    [((4, 8, 8, 5, 7), (3, 3)), ((2, 4, 6, 3, 4), (5, 3)), ((3, 2, 2, 4, 1), (3, 3)), ((2, 5, 5, 6, 3), (1, 1))],
)
def test_value_and_gradients_equal_those_of_lax(shape, kernel, dtype, rtol):
    args = arrays(*shape, kernel, dtype)
    expected = value_and_cotangents(lax_conv, *args)
    assert_close(value_and_cotangents(ours, *args), expected, rtol)
    assert_close(jax.jit(lambda *a: value_and_cotangents(ours, *a))(*args), expected, rtol)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"strides": 2},
        {"padding": "VALID"},
        {"padding": "CIRCULAR"},
        {"padding": ((1, 0), (0, 1)), "kernel_size": (2, 2)},
        {"kernel_dilation": 2},
        {"input_dilation": 2, "padding": ((1, 1), (1, 1))},
        {"feature_group_count": 2},
        {"kernel_size": (4, 4)},
        {"kernel_size": (1, 1), "strides": 2},
        {"precision": "highest"},
        {},
    ],
    ids=str,
)
def test_linen_layers_equal_their_plain_form(kwargs):
    kwargs = {"kernel_size": (3, 3)} | kwargs
    x = arrays(2, 6, 6, 4, 8)[0]
    plain, fast = nn.Conv(8, **kwargs), nn.Conv(8, conv_general_dilated=conv_general_dilated, **kwargs)
    params = plain.init(jax.random.key(0), x)

    def loss(layer):
        return jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(layer.apply(params, x))), argnums=(0, 1))(params, x)

    assert_close(loss(fast), loss(plain))


def test_one_dimensional_convolution_falls_through():
    layer = nn.Conv(3, (3,), conv_general_dilated=conv_general_dilated)
    x = jnp.ones((2, 5, 4))
    params = layer.init(jax.random.key(0), x)
    assert_close(layer.apply(params, x), nn.Conv(3, (3,)).apply(params, x))


def deep_loss(conv, kernels, x):
    """Two residual convolutions under a scan, each rematerialised."""

    @jax.checkpoint
    def block(x, kernel):
        return x + conv(jnp.sin(x), kernel), None

    return jnp.mean(lax.scan(block, x, kernels)[0] ** 2)


def test_gradients_under_jit_remat_scan_and_vmap():
    x, kernel, _ = arrays(4, 6, 6, 3, 3)
    kernels = 0.1 * jnp.stack([kernel, kernel[::-1]])

    def gradients(conv):
        return jax.grad(lambda kernels, x: deep_loss(conv, kernels, x), argnums=(0, 1))(kernels, x)

    assert_close(jax.jit(lambda: gradients(ours))(), gradients(lax_conv))

    def per_example(conv):
        return jax.vmap(jax.grad(lambda kernel, x: jnp.sum(conv(x[None], kernel) ** 2)), (None, 0))(kernel, x)

    assert_close(jax.jit(lambda: per_example(ours))(), per_example(lax_conv))


def test_sharded_along_the_batch_each_device_keeps_its_examples():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x, kernel, g = arrays(16, 8, 8, 4, 6)
    step = jax.jit(lambda x, kernel, g: value_and_cotangents(ours, x, kernel, g), out_shardings=(split, split, whole))
    args = jax.device_put((x, kernel, g), (split, whole, split))
    assert_close(step(*args), value_and_cotangents(lax_conv, x, kernel, g))
    program = step.lower(*args).compile().as_text()
    assert "all-reduce" in program  # of the kernel's gradient
    assert not re.search("all-gather|all-to-all|collective-permute", program)


def lowered(platform):
    x, kernel, g = arrays(4, 8, 8, 5, 7)
    traced = jax.jit(lambda *args: value_and_cotangents(ours, *args)).trace(x, kernel, g)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def layouts(program):
    return re.findall(r"dim_numbers = (.*?), window", program)


def test_only_the_cpu_gets_its_own_gradients():
    x, kernel, g = arrays(4, 8, 8, 5, 7)
    plain = jax.jit(lambda *args: value_and_cotangents(lax_conv, *args)).trace(x, kernel, g)
    for platform in ("cpu", "tpu", "cuda"):
        of_lax = layouts(plain.lower(lowering_platforms=(platform,)).as_text())
        assert len(of_lax) == 3
        assert (sorted(layouts(lowered(platform))) == sorted(of_lax)) == (platform != "cpu")


def test_gradients_on_the_cpu_have_the_layout_that_stays_fast_in_loops():
    assert layouts(lowered("cpu")) == 3 * ["[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"]


def test_choosing_by_platform_leaves_no_branch_in_the_program():
    program = jax.jit(lambda *args: value_and_cotangents(ours, *args)).lower(*arrays(4, 8, 8, 5, 7)).compile()
    assert "conditional" not in program.as_text()
