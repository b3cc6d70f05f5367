"""Pictures made of a picture: what is kept is kept, and nothing is what sampling from noise makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill import analytic, diffusion, editing, samplers

N = 8
TEACHER = analytic.mixture_teacher(diffusion.SCHEDULES["cosine"](), np.zeros((1, 1, 2)), np.full((1, 1), 0.5))
GRID = jax.tree.map(jnp.asarray, diffusion.make_grid(TEACHER.schedule, 1024))
KEYS = jax.random.split(jax.random.key(0), 3)
X, EPS = (jax.random.normal(key, (16, 2)) for key in KEYS[:2])
COND = {"label": jnp.zeros(16, jnp.int32), "w": jnp.zeros(16)}
DENOISER = TEACHER.denoiser(TEACHER.params)


def edit(start, mask, num_steps=N, x=X, **more):
    return editing.edit(DENOISER, GRID, x, EPS, COND, num_steps, start, mask, **more)


def test_what_is_not_masked_comes_back_to_the_bit():
    for start in (1, 3, N):
        assert (edit(start, jnp.zeros((1, 1))) == X).all()
        half = edit(start, jnp.array([[0.0, 1.0]]))
        assert (half[:, 0] == X[:, 0]).all() and jnp.abs(half[:, 1] - X[:, 1]).max() > 1e-3


def test_from_noise_alone_it_is_the_sampler():
    drawn = samplers.deterministic(DENOISER, GRID, EPS, COND, N)
    np.testing.assert_allclose(edit(N, jnp.ones((1, 1))), drawn, atol=1e-6)
    np.testing.assert_allclose(edit(N, jnp.ones((1, 1)), x=X + 5.0), drawn, atol=1e-6)  # nothing of x is left


def test_the_first_evaluation_sees_noise_alone_also_where_something_is_kept():
    def swap(z, logsnr, cond):
        return diffusion.Prediction(z[:, ::-1], z)

    made = editing.edit(swap, GRID, X, EPS, COND, 1, 1, jnp.array([[0.0, 1.0]]), prior_std=2.0)
    assert (made == jnp.stack([X[:, 0], 2.0 * EPS[:, 0]], 1)).all()


def test_it_starts_where_it_is_told_and_follows_the_flow():
    """Of a Gaussian of standard deviation s the flow is known: x = z_t s / sqrt(alpha^2 s^2 + sigma^2)."""
    start, num_steps = 256, 1024
    at = GRID.at(start)
    z = at.alpha * X + at.sigma * EPS
    exact = z * 0.5 / jnp.sqrt(at.alpha**2 * 0.25 + at.sigma**2)
    np.testing.assert_allclose(edit(start, jnp.ones((1, 1)), num_steps), exact, atol=5e-3)


def test_fewer_evaluations_keep_more():
    far = [float(jnp.abs(edit(start, jnp.ones((1, 1))) - X).mean()) for start in range(1, N + 1)]
    assert far == sorted(far)


def test_start_may_be_traced():
    np.testing.assert_allclose(jax.jit(edit)(3, jnp.ones((1, 1))), edit(3, jnp.ones((1, 1))), atol=1e-6)


def test_what_is_made_goes_with_what_is_kept():
    """Of points at (2, 2) and (-2, -2): the second number has the sign of the first where that is known, mostly."""
    means, num = np.array([[[2.0, 2.0], [-2.0, -2.0]]]), 512
    denoiser = analytic.mixture_teacher(diffusion.Cosine(), means, np.full((1, 2), 0.3))
    denoiser = denoiser.denoiser(denoiser.params)
    eps, cond = jax.random.normal(KEYS[1], (num, 2)), {"label": jnp.zeros(num, jnp.int32), "w": jnp.zeros(num)}
    x = jnp.where(jnp.arange(num) % 2, 2.0, -2.0)[:, None] * jnp.array([[1.0, 0.0]])

    def agreeing(points):
        return float((jnp.sign(points[:, 1]) == jnp.sign(x[:, 0])).mean())

    made = editing.edit(denoiser, GRID, x, eps, cond, 16, 16, jnp.array([[0.0, 1.0]]))
    assert agreeing(made) > 0.75  # without resampling not all of them
    assert agreeing(samplers.deterministic(denoiser, GRID, eps, cond, 16)) < 0.6


def test_noise_alone_is_as_wide_as_the_model_says():
    drawn = samplers.deterministic(DENOISER, GRID, 2.0 * EPS, COND, N)
    np.testing.assert_allclose(edit(N, jnp.ones((1, 1)), prior_std=2.0), drawn, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_between_two_noises_lie_noises(share):
    ends = [jax.random.normal(key, (20_000, 2)) for key in KEYS[:2]]
    noise = editing.between(*ends, jnp.full(20_000, share))
    np.testing.assert_allclose(noise.var(0), 1.0, atol=0.05)
    if share in (0.0, 1.0):
        np.testing.assert_allclose(noise, ends[int(share)], atol=1e-5)
