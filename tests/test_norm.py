"""The GroupNorm of the networks equals Linen's, followed by a scale, a shift and a swish, in value and gradient."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill.models.norm import GroupNorm

B, H, W, C, GROUPS = 3, 4, 6, 12, 4


def normal(*shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


X, G = 0.5 + 2.0 * normal(B, H, W, C, seed=0), normal(B, H, W, C, seed=1)
SCALE, SHIFT = normal(B, C, seed=2), normal(B, C, seed=3)
PARAMS = {"scale": normal(C, seed=4), "bias": normal(C, seed=5)}


def ours(dtype, swish, x, params, *conditions):
    return GroupNorm(GROUPS, jnp.dtype(dtype)).apply({"params": params}, x, *conditions, swish=swish)


def linen(dtype, swish, x, params, *conditions):
    y = nn.GroupNorm(GROUPS, dtype=jnp.float32).apply({"params": params}, x)
    if conditions:
        scale, shift = conditions
        y = y * (1.0 + scale[:, None, None]) + shift[:, None, None]
    return (nn.swish(y) if swish else y).astype(dtype)


def values_and_gradients(norm, dtype, x, g):
    """Of every way to call it: {swish, conditioned: (value, gradients)}, from one compilation."""

    def of(swish, conditions):
        value, pullback = jax.vjp(lambda *args: norm(dtype, swish, *args), x, PARAMS, *conditions)
        return value, pullback(g)

    every = [(swish, conditions) for swish in (False, True) for conditions in ((), (SCALE, SHIFT))]
    return jax.jit(lambda: {f"{swish}, {bool(conditions)}": of(swish, conditions) for swish, conditions in every})()


@pytest.mark.parametrize("dtype, rtol", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_values_and_gradients_equal_those_of_linen(dtype, rtol):
    got, expected = (values_and_gradients(norm, dtype, X.astype(dtype), G.astype(dtype)) for norm in (ours, linen))
    for (path, a), e in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype, path
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        assert np.abs(a - e).max() <= rtol * np.abs(e).max(), jax.tree_util.keystr(path)


def test_epsilon_can_be_another():
    got = GroupNorm(GROUPS, X.dtype, 0.3).apply({"params": PARAMS}, X)
    expected = nn.GroupNorm(GROUPS, epsilon=0.3).apply({"params": PARAMS}, X)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(got - linen("float32", False, X, PARAMS)).max() > 1e-2


def test_parameters_are_those_of_linen():
    modules = GroupNorm(GROUPS, X.dtype), nn.GroupNorm(GROUPS)
    jax.tree.map(np.testing.assert_array_equal, *(module.init(jax.random.key(0), X) for module in modules))


def test_statistics_of_bfloat16_are_taken_in_float32():
    x = X.astype(jnp.bfloat16)
    ones = {"scale": jnp.ones(C), "bias": jnp.zeros(C)}
    y = np.asarray(ours("float32", False, x, ones)).reshape(B, H * W, GROUPS, -1)
    np.testing.assert_allclose(y.mean((1, 3)), 0.0, atol=1e-6)
    np.testing.assert_allclose(y.var((1, 3)), 1.0, atol=1e-5)


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="norm_groups is 5, which does not divide 12 channels"):
        jax.eval_shape(GroupNorm(5, X.dtype).init, jax.random.key(0), X)
