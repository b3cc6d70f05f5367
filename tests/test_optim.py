import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from guided_distill import optim, sharding
from guided_distill.errors import UserError
from guided_distill.state import make_state

PARAMS = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4)}


def update(config, state, grads, peak_lr=0.1, updates=10):
    return optim.apply_gradients(config, state, grads, jnp.float32(peak_lr), jnp.int32(updates))


def test_linear_decay_ends_at_zero_and_warmup_starts_low():
    config = optim.OptimiserConfig(warmup=4, decay="linear")
    rates = [float(optim.learning_rate(config, step, 1.0, 10)) for step in range(11)]
    assert rates[0] == 0.25 and rates[3] == pytest.approx(0.7) and rates[10] == 0.0
    assert all(early > late for early, late in zip(rates[3:], rates[4:], strict=False))


def test_constant_rate_stays_at_its_peak():
    assert {float(optim.learning_rate(optim.OptimiserConfig(), step, 0.5, 10)) for step in range(20)} == {0.5}


def test_unknown_decay_is_named():
    with pytest.raises(UserError, match="cosine.*constant, linear"):
        optim.OptimiserConfig(decay="cosine")


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_agrees_with_optax_adamw(weight_decay):
    config = optim.OptimiserConfig(weight_decay=weight_decay, clip_norm=1e9)
    theirs = optax.adamw(0.1, weight_decay=weight_decay)
    state, params = make_state(PARAMS, config), PARAMS
    their_state = theirs.init(params)
    for k in range(5):
        grads = jax.tree.map(lambda p, k=k: jnp.cos(p + k), PARAMS)
        state, _ = update(config, state, grads)
        steps, their_state = theirs.update(grads, their_state, params)
        params = optax.apply_updates(params, steps)
    for ours, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_gradient_is_clipped_to_its_norm():
    # Adam forgets a common scale, so clipping shows in how a large gradient weighs against the small one before it.
    config = optim.OptimiserConfig(clip_norm=1.0)
    large = jax.tree.map(lambda p: 1e6 * jnp.ones_like(p), PARAMS)
    unit = jax.tree.map(lambda g: g / optax.tree.norm(large), large)
    after = [update(config, make_state(PARAMS, config), grads)[0].opt_state for grads in (large, unit)]
    for clipped, expected in zip(jax.tree.leaves(after[0]), jax.tree.leaves(after[1]), strict=True):
        np.testing.assert_allclose(clipped, expected, rtol=1e-4)


def test_ema_follows_fast_at_first_and_then_slowly():
    config = optim.OptimiserConfig(ema=0.999)
    state = make_state(PARAMS, config)
    first, _ = update(config, state, jax.tree.map(jnp.ones_like, PARAMS))
    expected = 0.1 * PARAMS["b"] + 0.9 * first.params["b"]
    np.testing.assert_allclose(first.ema["b"], expected, rtol=1e-6)
    late = state.replace(step=jnp.int32(10**6))
    moved, _ = update(config, late, jax.tree.map(jnp.ones_like, PARAMS))
    np.testing.assert_allclose(moved.ema["b"], 0.999 * PARAMS["b"] + 0.001 * moved.params["b"], rtol=1e-6)


def test_no_ema_is_kept_when_it_is_off():
    state = make_state(PARAMS, optim.OptimiserConfig(ema=0.0))
    assert state.ema is None and state.eval_params is state.params


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_only_the_counters(bad):
    config = optim.OptimiserConfig(ema=0.9)
    state, _ = update(config, make_state(PARAMS, config), jax.tree.map(jnp.ones_like, PARAMS))
    grads = {"a": jnp.ones((2, 3)).at[0, 0].set(bad), "b": jnp.ones(4)}
    skipped, metrics = update(config, state, grads)
    assert int(skipped.step) == 2 and int(skipped.skipped) == 1 == int(metrics["skipped"])
    kept = jax.tree.map(lambda a, b: bool((a == b).all()), state, skipped)
    assert jax.tree.all(kept.replace(step=True, skipped=True))
    again, _ = update(config, skipped, grads)
    healed, _ = update(config, again, jax.tree.map(jnp.ones_like, PARAMS))
    assert int(again.skipped) == 2 and int(healed.skipped) == 0


def test_the_norm_is_optax_s_and_moves_no_weights_between_devices():
    rng = np.random.default_rng(0)
    shapes = {"a": (7,), "b": (7,), "c": (128, 128), "d": (256, 130), "e": (), "f": (3, 0)}
    tree = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    np.testing.assert_allclose(optim.global_norm(tree), optax.tree.norm(tree), rtol=1e-6)
    assert optim.global_norm({}) == 0.0
    mesh = sharding.make_mesh(fsdp=len(jax.devices()))
    text = jax.jit(optim.global_norm).lower(sharding.place(mesh, tree)).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text
