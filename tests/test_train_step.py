"""The benchmark of the train step counts all the operations of what it is given."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.train_step import flops


def loss(w, x):
    return jnp.sum(jnp.tanh(x @ w) @ w)


def test_a_gradient_counts_about_twice_its_forward_jitted_or_not():
    w, x = jnp.ones((64, 64)), jnp.ones((256, 64))
    forward, both = flops(loss, w, x), jax.value_and_grad(loss, argnums=(0, 1))
    assert forward == pytest.approx(2 * 2 * 256 * 64 * 64, rel=0.1)
    assert flops(both, w, x) == pytest.approx(3 * forward, rel=0.1)
    assert flops(jax.jit(both), w, x) == flops(both, w, x)


def test_every_round_of_a_scan_counts():
    def chain(w, x):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0]

    w, x = jnp.ones((32, 32)), jnp.ones((16, 32))
    assert flops(jax.jit(chain), w, x) == pytest.approx(3 * flops(jnp.matmul, x, w), rel=0.01)
