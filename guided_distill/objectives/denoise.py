"""The teacher's own training: denoising with the condition dropped now and then (arXiv 2207.12598, algorithm 1)."""

import jax
import jax.numpy as jnp

from guided_distill import diffusion
from guided_distill.objectives import draws


def make_denoise(*, weighting, null_cond, cond_dropout, num_times=None):
    """omega(logsnr_t) || x_hat(z_t, c) - x ||^2, c replaced by no condition with probability `cond_dropout`.

    t ~ U[0, 1], or uniform over i / num_times, i = 1 .. num_times, for a discrete-time teacher. The error is measured
    in v, where it is finite at every t; `weighting` says what it amounts to in x.
    """

    def objective(apply, schedule, batch, knobs, keys):
        x, cond = draws.split_batch(batch)
        key_t, key_eps, key_drop, key_dropout = draws.split_examples(keys, 4)
        t = draws.uniform(key_t) if num_times is None else draws.randint(key_t, 1, num_times + 1) / num_times
        logsnr = schedule.logsnr(t)
        alpha, sigma = schedule.alpha_sigma(logsnr)
        eps = draws.normal_like(key_eps, x)
        dropped = draws.uniform(key_drop) < cond_dropout
        cond = jax.tree.map(lambda c, null: jnp.where(diffusion.expand(dropped, c), null, c), cond, null_cond(cond))

        z = diffusion.diffuse(x, eps, alpha, sigma)
        # One key for the network's dropout: Linen draws its masks for the whole batch, whatever the devices.
        prediction = apply["student"](z, logsnr, cond, dropout_key=key_dropout[0])
        error = diffusion.velocity(prediction, alpha, sigma) - diffusion.velocity(
            diffusion.Prediction(x, eps), alpha, sigma
        )
        v_mse = diffusion.mean_square(error)
        return diffusion.loss_weight_v(weighting, alpha, sigma) * v_mse, {"v_mse": v_mse}

    return objective
