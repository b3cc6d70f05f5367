"""Stage two: the student takes in one step what its teacher takes in several (arXiv 2210.03142, section 3.2)."""

import functools

import jax
import jax.numpy as jnp

from guided_distill import diffusion
from guided_distill.objectives import draws

# A step of the teacher, in units of 1 / (substeps * N). The stochastic sampler goes two steps of 1/N forward and one
# back, so that its N-step student jumps 2/N, and its teacher, the student of 2N, jumps 1/N.
_TEACHER_STEP = {"det": 1, "sto": 2}


def teacher_steps(teacher, z, cond, points):
    """Predictions at the first k of k + 1 grid points of a path of DDIM steps: x and eps [k, B, *S].

    `points` is a Grid of shape [k + 1, B]. All evaluations are one `lax.scan`, so the program holds one copy of the
    teacher's network: on a TPU its compilation takes minutes. On the CPU it takes seconds, and the loop would cost more
    than that: XLA gives operations inside it fewer threads.
    """

    def step(z, at):
        here, there = at
        prediction = teacher(z, here.logsnr, cond)
        return diffusion.ddim_step(prediction, there.alpha, there.sigma), prediction

    here = jax.tree.map(lambda table: table[:-1], points)
    there = jax.tree.map(lambda table: table[1:], points)

    def scan(z, unroll):
        return jax.lax.scan(step, z, (here, there), unroll=unroll)[1]

    return jax.lax.platform_dependent(
        z, cpu=functools.partial(scan, unroll=True), default=functools.partial(scan, unroll=1)
    )


def path_weights(index, points):
    """c of (6), [k, B], of a path to s <= t; where it ends on t = 0, the prediction that lands there is all of it.

    `index` i32 [k + 1, B] are the points' places in the grid.
    """
    lands_clean = (index[:-1] > 0) & (index[1:] == 0)
    return jnp.where(index[-1:] == 0, lands_clean, diffusion.convex_weights(points))


def path(series, substeps, num_steps, i, grid):
    """The places in `grid`, i32 [k + 1, B], that the teacher goes through in one student's step from t = i/N, i [B]."""
    stride = grid.num_intervals // (substeps * num_steps)
    travelled = _TEACHER_STEP[series] * jnp.arange(substeps + 1)[:, None]
    return stride * jnp.maximum(substeps * i[None] - travelled, 0)


def target(teacher, z, cond, index, points):
    """x_tilde [B, *S], (6), of a teacher's DDIM steps from z through the grid's `points` at `index`, see `path`."""
    x_hats = teacher_steps(teacher, z, cond, points).x
    return jax.lax.stop_gradient(diffusion.composite_target(x_hats, path_weights(index, points)))


def landing_weights(index, points):
    """omega [B] of a step from t to s, (kappa(s|t) / sigma_s)^2: what it makes of an error, beside the noise it meets.

    A DDIM step turns an error e of x_hat into kappa(s|t) e of z_s, (5), which has noise of sigma_s. At t = 0 there is
    none: of a step that ends there the last point that its teacher goes through before stands for s, so that omega
    grows with the square of their number. `index` and `points` as for `path_weights`; a path ends on t = 0 once.
    """
    ends = jax.tree.map(lambda table: jnp.where(index[-1] == 0, table[-2], table[-1]), points)
    return (diffusion.kappa(ends, points.at(0)) / ends.sigma) ** 2


def draw_landing(keys, substeps, num_steps, grid):
    """For keys [B]: i in {1 .. N}, drawn by the `landing_weights` omega_i at t = i/N, and what each counts, both [B].

    Importance sampling: i is drawn half uniformly and half in proportion to omega, p(i) = (1/N + omega_i / sum omega)
    / 2, and counts 1 / (N p(i)). The loss is the same on average, and no example weighs more than twice the mean of
    omega; of uniform draws one might be most of a batch's loss.
    """
    # N is traced: the table holds as many steps as there can be, and those beyond N are never drawn.
    i = jnp.arange(1, grid.num_intervals // substeps + 1)
    index = path("det", substeps, num_steps, jnp.minimum(i, num_steps), grid)
    omega = jnp.where(i <= num_steps, landing_weights(index, grid.at(index)), 0.0)
    p = 0.5 * ((i <= num_steps) / num_steps + omega / omega.sum())
    place = jnp.searchsorted(jnp.cumsum(p), draws.uniform(keys), side="right")
    place = jnp.minimum(place, num_steps - 1)  # in float32 the sum may end a few roundings below what is drawn
    return i[place], 1.0 / (num_steps * p[place])


def make_stage2(*, weighting, series="det", substeps=2):
    """omega || x_student(z_t, c, w) - x_tilde ||^2 at t = i/N, i ~ U{1 .. N} (algorithm 2).

    x_tilde, (6), puts one DDIM step of the student where its teacher's steps end, at t = 0 the last prediction itself:

    "det": `substeps` steps of 1/(substeps N), from t to t - 1/N.
    "sto": two steps of 1/N, from t to t - 2/N, and from t = 1/N the one step to 0 (section 3.3).

    N = knobs.num_steps is traced, and substeps * N divides the grid. The loss is taken in x, in float32; omega is of
    logsnr_t, or for `weighting` "landing" of where the step lands, and then i is drawn half by it (`draw_landing`).
    Raises ValueError for a series that does not exist, fewer than two steps, and a stochastic one of any number but two
    or weighted by where it lands.
    """
    if series not in _TEACHER_STEP:
        raise ValueError(f"series is {series!r}; it must be one of {', '.join(_TEACHER_STEP)}")
    if substeps < 2:
        raise ValueError(f"substeps is {substeps}; the teacher takes at least 2 for one of the student")
    if series == "sto" and substeps != 2:
        raise ValueError(f"substeps is {substeps}; the stochastic series halves the steps, so it must be 2")
    if series == "sto" and weighting == "landing":
        raise ValueError("weighting is 'landing'; the stochastic series jumps to 0 without a point between")

    def objective(apply, schedule, batch, knobs, keys):
        x, cond = draws.split_batch(batch)
        key_i, key_eps, key_w = draws.split_examples(keys, 3)
        if weighting == "landing":
            i, counts = draw_landing(key_i, substeps, knobs.num_steps, knobs.grid)
        else:
            i, counts = draws.randint(key_i, 1, knobs.num_steps + 1), 1.0
        index = path(series, substeps, knobs.num_steps, i, knobs.grid)
        points = knobs.grid.at(index)
        at_t = points.at(0)
        cond = {**cond, "w": draws.strengths(key_w, knobs)}

        z = diffusion.diffuse(x, draws.normal_like(key_eps, x), at_t.alpha, at_t.sigma)
        x_tilde = target(apply["teacher"], z, cond, index, points)
        # Counted in x_mse too, so that its mean stays that over all i.
        x_mse = counts * diffusion.mean_square(apply["student"](z, at_t.logsnr, cond).x - x_tilde)
        if weighting == "landing":
            omega = landing_weights(index, points)
        else:
            omega = diffusion.loss_weight_x(weighting, at_t.alpha, at_t.sigma)
        return omega * x_mse, {"x_mse": x_mse}

    return objective
