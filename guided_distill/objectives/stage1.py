"""Stage one: one network learns the guided teacher for every w (arXiv 2210.03142, section 3.1, algorithm 1)."""

import jax

from guided_distill import diffusion
from guided_distill.objectives import draws


def make_stage1(*, weighting, num_times=None):
    """omega(logsnr_t) || x_student(z_t, c, w) - x^w_teacher(z_t, c) ||^2, w ~ U[w_min, w_max] per example.

    t as the teacher was trained: U[0, 1] or i / num_times. Measured in v (see `denoise`). No label is dropped, and
    nothing is clipped but by a teacher that clips (`guidance.clipped`) and, for one, `within_range`.
    """

    def objective(apply, schedule, batch, knobs, keys):
        x, cond = draws.split_batch(batch)
        key_t, key_eps, key_w = draws.split_examples(keys, 3)
        t = draws.uniform(key_t) if num_times is None else draws.randint(key_t, 1, num_times + 1) / num_times
        logsnr = schedule.logsnr(t)
        alpha, sigma = schedule.alpha_sigma(logsnr)
        cond = {**cond, "w": draws.strengths(key_w, knobs)}

        z = diffusion.diffuse(x, draws.normal_like(key_eps, x), alpha, sigma)
        target = jax.lax.stop_gradient(diffusion.velocity(apply["teacher"](z, logsnr, cond), alpha, sigma))
        v_mse = diffusion.mean_square(diffusion.velocity(apply["student"](z, logsnr, cond), alpha, sigma) - target)
        return diffusion.loss_weight_v(weighting, alpha, sigma) * v_mse, {"v_mse": v_mse}

    return objective
