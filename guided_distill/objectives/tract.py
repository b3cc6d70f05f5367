"""TRACT: many steps in one by a student that learns from its own moving average (arXiv 2303.04248, algorithm 1)."""

import jax
import jax.numpy as jnp

from guided_distill import diffusion
from guided_distill.objectives import draws
from guided_distill.objectives.stage2 import path_weights


def make_tract(*, weighting, group):
    """omega(logsnr_t) || x_student(z_t, c, w) - x_tilde ||^2 at t = j/T, j ~ U{1 .. T}, T = `group` * N.

    The T steps lie in N = knobs.num_steps groups, and the student jumps from any t to the start s of its group.
    x_tilde, (6), is that of the teacher's DDIM step t -> t - 1/T and the jump t - 1/T -> s of apply["target_ema"], the
    moving average of the student: the teacher's prediction alone where its step lands on s, else the average's alone
    where s = 0. N is traced, and T divides the grid. The loss is taken in x, in float32.
    """

    def objective(apply, schedule, batch, knobs, keys):
        x, cond = draws.split_batch(batch)
        key_j, key_eps, key_w = draws.split_examples(keys, 3)
        num_times = group * knobs.num_steps  # T
        stride = knobs.grid.num_intervals // num_times
        j = draws.randint(key_j, 1, num_times + 1)
        start = (j - 1) // group * group
        index = stride * jnp.stack([j, j - 1, start])
        points = knobs.grid.at(index)
        at_t, at_m = points.at(0), points.at(1)
        cond = {**cond, "w": draws.strengths(key_w, knobs)}

        z = diffusion.diffuse(x, draws.normal_like(key_eps, x), at_t.alpha, at_t.sigma)
        first = apply["teacher"](z, at_t.logsnr, cond)
        z_m = diffusion.ddim_step(first, at_m.alpha, at_m.sigma)
        second = apply["target_ema"](z_m, at_m.logsnr, cond)
        x_hats = jnp.stack([first.x, second.x])
        target = jax.lax.stop_gradient(diffusion.composite_target(x_hats, path_weights(index, points)))
        x_mse = diffusion.mean_square(apply["student"](z, at_t.logsnr, cond).x - target)
        return diffusion.loss_weight_x(weighting, at_t.alpha, at_t.sigma) * x_mse, {"x_mse": x_mse}

    return objective
