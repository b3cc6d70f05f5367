"""From noise to samples in N evaluations of a denoiser, and the noise itself, one seed per image."""

import jax
import jax.numpy as jnp

from guided_distill import diffusion


def predict(denoiser, z, at_t, cond, clip=None):
    """One evaluation at the grid point `at_t`; with `clip`, x_hat is kept in [-clip, clip] and eps_hat agrees."""
    prediction = denoiser(z, jnp.broadcast_to(at_t.logsnr, z.shape[:1]), cond)
    return prediction if clip is None else diffusion.clip_prediction(prediction, z, at_t.alpha, at_t.sigma, clip)


def deterministic(denoiser, grid, z, cond, num_steps, keys=None, *, clip=None):
    """DDIM from z at t = 1 in N = `num_steps` evaluations at t = i/N, i = N .. 1 (arXiv 2202.00512, section 2).

    z [B, *S] at t = 1; `num_steps` may be traced and divides grid.num_intervals. Returns the last x_hat [B, *S]: the
    loop never lands on t = 0. `keys` is part of the samplers' common signature: this one draws nothing.
    """
    stride = grid.num_intervals // num_steps

    def step(k, carry):
        z, _ = carry
        i = num_steps - k
        prediction = predict(denoiser, z, grid.at(i * stride), cond, clip)
        at_s = grid.at((i - 1) * stride)
        return diffusion.ddim_step(prediction, at_s.alpha, at_s.sigma), prediction.x

    return jax.lax.fori_loop(0, num_steps, step, (z, jnp.zeros_like(z)))[1]


SAMPLERS = {"deterministic": deterministic}


def image_keys(seed, indices):
    """One key per image, a function of (seed, index) alone: the same bits in any batch, on any number of devices."""
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(indices)


def initial_noise(keys, sample_shape, prior_std=1.0):
    """z at t = 1, [B, *sample_shape], image k from key k."""
    return prior_std * jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), sample_shape))(keys)


def random_labels(keys, num_classes):
    """Uniform labels i32 [B], image k from key k."""
    return jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 1), (), 0, num_classes))(keys)
