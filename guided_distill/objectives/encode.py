"""The distilled encoder: stage two for DDIM run from data to noise (arXiv 2210.03142)."""

import jax
import jax.numpy as jnp

from guided_distill import diffusion
from guided_distill.objectives import draws
from guided_distill.objectives.stage2 import teacher_steps


def make_encode(*, weighting):
    """omega(logsnr_s) || v_student(z_s, c, w) - v_tilde ||^2 in units of x, at s = i/N, i ~ U{0 .. N - 1}.

    v_tilde, (7), puts one reversed DDIM step s -> s + 1/N where the teacher's two steps of 1/(2N) end; N =
    knobs.num_steps is traced. Target and error are those of v: the step from s = 0, a network input nowhere else,
    divides by sigma_0 in x. The stage says w = 0, with which images are encoded.
    """

    def objective(apply, schedule, batch, knobs, keys):
        x, cond = draws.split_batch(batch)
        key_i, key_eps, key_w = draws.split_examples(keys, 3)
        stride = knobs.grid.num_intervals // (2 * knobs.num_steps)  # of the teacher
        i = draws.randint(key_i, 0, knobs.num_steps)
        points = knobs.grid.at(stride * (2 * i[None] + jnp.arange(3)[:, None]))
        at_s, at_m, at_t = (points.at(k) for k in range(3))
        cond = {**cond, "w": draws.strengths(key_w, knobs)}

        z = diffusion.diffuse(x, draws.normal_like(key_eps, x), at_s.alpha, at_s.sigma)
        predictions = teacher_steps(apply["teacher"], z, cond, points)
        v_1, v_2 = diffusion.velocity(predictions, points.alpha[:-1], points.sigma[:-1])
        target = jax.lax.stop_gradient(diffusion.two_step_velocity(v_1, v_2, z, at_s, at_m, at_t))
        velocity = diffusion.velocity(apply["student"](z, at_s.logsnr, cond), at_s.alpha, at_s.sigma)
        v_mse = diffusion.mean_square(velocity - target)
        return diffusion.loss_weight_v(weighting, at_s.alpha, at_s.sigma) * v_mse, {"v_mse": v_mse}

    return objective
