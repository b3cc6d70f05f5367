"""What a student does with a picture that is there: image to image, inpainting, and the way from one noise to another.

All of it is the deterministic sampler, entered in the middle or held to what is known; any denoiser will do, also one
that was never trained to paint in.
"""

import jax
import jax.numpy as jnp

from guided_distill import diffusion, samplers


def edit(denoiser, grid, x, eps, cond, num_steps, start, mask, *, prior_std=1.0, clip=None):
    """Pictures like x [B, *S] where mask [B, *S or broadcast] is 1, and x itself where it is 0, in `start` evaluations.

    x is diffused to t = start/N with the noise eps [B, *S] and led back from there (SDEdit, arXiv 2108.01073,
    algorithm 1, by DDIM): the smaller `start` <= N = `num_steps` is, the more of x is kept there; from N on nothing is.
    What the mask holds is put back after every step as diffused with the same noise (arXiv 2201.09865, algorithm 1,
    without its resampling), so that the network sees what is around the hole, if at N only from the second evaluation
    on. `start` and N may be traced; N divides the grid.
    `prior_std` is that of the noise a model starts from.
    """
    stride = grid.num_intervals // num_steps

    def known(i):
        at = grid.at(i * stride)
        return at.alpha * x + at.sigma * eps

    def step(n, carry):
        z, _ = carry
        i = start - n
        at_t, at_s = grid.at(i * stride), grid.at((i - 1) * stride)
        prediction = samplers.predict(denoiser, z, at_t, cond, clip)
        z = diffusion.ddim_step(prediction, at_s.alpha, at_s.sigma)
        return mask * z + (1.0 - mask) * known(i - 1), prediction.x

    # At t = 1 a model starts from noise alone, whatever is left of x there.
    z = jnp.where(start == num_steps, prior_std * eps, known(start))
    made = jax.lax.fori_loop(0, start, step, (z, x))[1]
    return mask * made + (1.0 - mask) * x


def between(z, z_to, share):
    """The noise at `share` [B] of the way from z to z_to, [B, *S] each: cos(pi share / 2) z + sin(pi share / 2) z_to.

    Of two independent normal noises it is one itself at every share, which a mean of them is not.
    """
    quarter = 0.5 * jnp.pi * share
    return diffusion.diffuse(z, z_to, jnp.cos(quarter), jnp.sin(quarter))
