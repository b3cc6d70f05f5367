"""Objectives of students whose samplers clip x_hat: what a clip takes away is not learnt."""

import functools

import jax
import jax.numpy as jnp

from guided_distill import diffusion


def within_range(objective, bound):
    """The objective with x_hat of the student, and of its average where that teaches, clipped to [-bound, bound].

    As samplers keep it, eps_hat agreeing, for a target that lies in that range too. Where both are at one end nothing
    is left to learn: the network need not hold constant what guidance, or white paper, pushes against that end. The
    gradient passes the clip unchanged, so that a value outside is pulled in where its target lies inside. With None for
    a bound it is the objective itself.
    """
    if bound is None:
        return objective

    def clipped(apply, schedule, batch, knobs, keys):
        kept = {
            name: network if name == "teacher" else functools.partial(_kept, network, schedule, bound)
            for name, network in apply.items()
        }
        return objective(kept, schedule, batch, knobs, keys)

    return clipped


def _kept(denoiser, schedule, bound, z, logsnr, cond, **options):
    found = denoiser(z, logsnr, cond, **options)
    alpha, sigma = (diffusion.expand(coefficient, z) for coefficient in schedule.alpha_sigma(logsnr))
    clipped = jnp.clip(jax.lax.stop_gradient(found.x), -bound, bound)
    excess = jax.lax.stop_gradient(found.x) - clipped
    # The differences are zeros that carry the gradient: what is clipped is exactly at the end, as its target is.
    x = clipped + (found.x - jax.lax.stop_gradient(found.x))
    return diffusion.Prediction(x, found.eps + alpha / sigma * excess)
