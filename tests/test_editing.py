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


@pytest.mark.parametrize("shape", [(4, 100), (4, 8, 8, 3)])
def test_between_two_noises_lie_noises_of_their_size(shape):
    ends = [jax.random.normal(key, shape) for key in KEYS[:2]]
    for share, end in zip((0.0, 1.0), ends, strict=True):
        np.testing.assert_allclose(editing.between(*ends, jnp.full(4, share)), end, atol=1e-5)
    middle = editing.between(*ends, jnp.full(4, 0.5))
    size = [jnp.sqrt(jnp.square(z).reshape(4, -1).sum(1)) for z in (*ends, middle)]
    np.testing.assert_allclose(size[2], (size[0] + size[1]) / 2, rtol=0.02)


def test_between_a_noise_and_itself_is_itself():
    np.testing.assert_allclose(editing.between(X, X, jnp.full(16, 0.3)), X, atol=1e-6)
