"""Stage two: the student takes in one step what its teacher takes in two (arXiv 2210.03142, section 3.2)."""

import functools

import jax
import jax.numpy as jnp

from guided_distill import diffusion
from guided_distill.objectives import draws


def two_teacher_steps(teacher, z, cond, points):
    """x_hat at the first two of three grid points of a deterministic path: [2, B, *S].

    `points` is a Grid of shape [3, B]. Both evaluations are one `lax.scan`, so the program holds one copy of the
    teacher's network: on a TPU its compilation takes minutes. On the CPU it takes seconds, and the loop would cost more
    than that: XLA gives operations inside it fewer threads.
    """

    def step(z, at):
        here, there = at
        prediction = teacher(z, here.logsnr, cond)
        return diffusion.ddim_step(prediction, there.alpha, there.sigma), prediction.x

    here = jax.tree.map(lambda table: table[:-1], points)
    there = jax.tree.map(lambda table: table[1:], points)

    def scan(z, unroll):
        return jax.lax.scan(step, z, (here, there), unroll=unroll)[1]

    return jax.lax.platform_dependent(
        z, cpu=functools.partial(scan, unroll=True), default=functools.partial(scan, unroll=1)
    )


def make_stage2(*, weighting):
    """omega(logsnr_t) || x_student(z_t, c, w) - x_tilde ||^2 at t = i/N, i ~ U{1 .. N} (algorithm 2).

    x_tilde puts one DDIM step t -> t - 1/N where the teacher's two steps of 1/(2N) end; N = knobs.num_steps is traced.
    The loss is taken in x, in float32.
    """

    def objective(apply, schedule, batch, knobs, keys):
        x, cond = draws.split_batch(batch)
        key_i, key_eps, key_w = draws.split_examples(keys, 3)
        stride = knobs.grid.num_intervals // (2 * knobs.num_steps)  # of the teacher
        i = draws.randint(key_i, 1, knobs.num_steps + 1)
        points = knobs.grid.at(stride * (2 * i[None] - jnp.arange(3)[:, None]))
        at_t, at_m, at_s = (diffusion.Grid(*(table[k] for table in points)) for k in range(3))
        cond = {**cond, "w": draws.uniform(key_w, knobs.w_min, knobs.w_max)}

        z = diffusion.diffuse(x, draws.normal_like(key_eps, x), at_t.alpha, at_t.sigma)
        x_1, x_2 = two_teacher_steps(apply["teacher"], z, cond, points)
        # At s = 0 the step is to the clean end: its target is the last prediction itself.
        a = jnp.where(i == 1, 0.0, diffusion.convex_weight(at_t, at_m, at_s))
        target = jax.lax.stop_gradient(diffusion.two_step_target(x_1, x_2, a))
        x_mse = diffusion.mean_square(apply["student"](z, at_t.logsnr, cond).x - target)
        return diffusion.loss_weight_x(weighting, at_t.alpha, at_t.sigma) * x_mse, {"x_mse": x_mse}

    return objective
