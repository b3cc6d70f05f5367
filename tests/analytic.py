"""Denoisers in closed form, as oracles: everything Gaussian, so every flow map is linear and known."""

import jax.numpy as jnp

from guided_distill import diffusion


def constant(mean, std):
    """Moments of x for one data set N(mean, std^2), whatever the condition."""
    return lambda cond: (jnp.float32(mean), jnp.float32(std))


def classes(means, std, spread):
    """Moments of x in classes N(means[label], std^2); label len(means) stands for all, of means N(0, spread^2)."""
    means = jnp.asarray([*means, 0.0], jnp.float32)

    def moments(cond):
        is_null = cond["label"] == len(means) - 1
        return means[cond["label"]], jnp.where(is_null, jnp.sqrt(std**2 + spread**2), std)

    return moments


def gaussian(schedule, moments):
    """The posterior mean of x given z_t: the best denoiser there is for these moments."""

    def denoiser(z, logsnr, cond, *, dropout_key=None):
        alpha, sigma = (diffusion.expand(c, z) for c in schedule.alpha_sigma(logsnr))
        mean, std = (diffusion.expand(m, z) for m in moments(cond))
        score = (z - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return diffusion.Prediction(mean + alpha * std**2 * score, sigma * score)

    return denoiser


def _printed_target(z_t, z_s, at_t, at_s):
    """x_tilde of one step t -> s as the paper prints it, (T) of method: independent of the convex form under test."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = at_t, at_s
    x = (z_s - sigma_s / sigma_t * z_t) / (alpha_s - sigma_s / sigma_t * alpha_t)
    return diffusion.Prediction(x, (z_t - alpha_t * x) / sigma_t)


def _points(schedule, logsnr, jumps, like):
    """(alpha, sigma) at the time of `logsnr`, and at those earlier by each of `jumps` (not before 0)."""
    t = schedule.t(logsnr)
    times = [jnp.maximum(t - jump, 0.0) for jump in jumps]
    logsnrs = [logsnr, *(schedule.logsnr(time) for time in times)]
    return logsnrs, [tuple(diffusion.expand(c, like) for c in schedule.alpha_sigma(value)) for value in logsnrs]


def exact_student(schedule, moments, num_steps):
    """The perfect N-step student: its DDIM step of 1/N is the exact flow map of the Gaussian probability flow."""

    def denoiser(z, logsnr, cond):
        _, (at_t, at_s) = _points(schedule, logsnr, [1.0 / num_steps], z)
        mean, std = (diffusion.expand(m, z) for m in moments(cond))
        spread_t, spread_s = (jnp.sqrt(alpha**2 * std**2 + sigma**2) for alpha, sigma in (at_t, at_s))
        z_s = at_s[0] * mean + spread_s / spread_t * (z - at_t[0] * mean)
        return _printed_target(z, z_s, at_t, at_s)

    return denoiser


def two_step_student(schedule, teacher, num_steps):
    """The perfect student of any teacher: 1/N in one step as the teacher in two of 1/(2N); at t = 1/N, x_2 itself."""

    def denoiser(z, logsnr, cond):
        logsnrs, (at_t, at_m, at_s) = _points(schedule, logsnr, [0.5 / num_steps, 1.0 / num_steps], z)
        first = teacher(z, logsnr, cond)
        z_m = at_m[0] * first.x + at_m[1] * first.eps
        second = teacher(z_m, logsnrs[1], cond)
        student = _printed_target(z, at_s[0] * second.x + at_s[1] * second.eps, at_t, at_s)
        is_last = diffusion.expand(schedule.t(logsnr) < 1.5 / num_steps, z)
        return diffusion.Prediction(jnp.where(is_last, second.x, student.x), student.eps)

    return denoiser


def exact_stochastic_student(schedule, moments, num_steps):
    """The perfect stochastic N-step student: its jumps are twice as long, 2/N, but from t = 1/N, where 0 is nearer."""

    def denoiser(z, logsnr, cond):
        at_edge = schedule.t(logsnr) < 1.5 / num_steps
        return exact_student(schedule, moments, jnp.where(at_edge, num_steps, 0.5 * num_steps))(z, logsnr, cond)

    return denoiser


def exact_encoder(schedule, moments, num_steps):
    """The perfect N-step encoder: its reversed DDIM step of 1/N is the exact flow map, without dividing by sigma_0."""
    return flow_student(schedule, moments, lambda t: t + 1.0 / num_steps)


def _prediction_of_jump(z_t, z_s, at_t, at_s):
    """The x and eps of which both z_t and z_s are made: their DDIM step t -> s, up or down in time, lands on z_s."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = at_t, at_s
    determinant = alpha_t * sigma_s - sigma_t * alpha_s
    x = (sigma_s * z_t - sigma_t * z_s) / determinant
    return diffusion.Prediction(x, (alpha_t * z_s - alpha_s * z_t) / determinant)


def _at(schedule, t, like):
    return tuple(diffusion.expand(c, like) for c in schedule.alpha_sigma(schedule.logsnr(t)))


def flow_student(schedule, moments, end):
    """The perfect student of any jumps: its DDIM step t -> end(t), up or down in time, is the exact flow map."""

    def denoiser(z, logsnr, cond):
        t = schedule.t(logsnr)
        at_t, at_s = _at(schedule, t, z), _at(schedule, end(t), z)
        mean, std = (diffusion.expand(m, z) for m in moments(cond))
        spread_t, spread_s = (jnp.sqrt(alpha**2 * std**2 + sigma**2) for alpha, sigma in (at_t, at_s))
        z_s = at_s[0] * mean + spread_s / spread_t * (z - at_t[0] * mean)
        return _prediction_of_jump(z, z_s, at_t, at_s)

    return denoiser


def composite_student(schedule, teacher, length, num, end):
    """The perfect student of a teacher that goes t -> end(t), up or down, in at most `num` steps of `length`.

    Where end(t) = 0 it is the teacher's last prediction itself.
    """

    def denoiser(z_t, logsnr, cond):
        t = here = schedule.t(logsnr)
        z, x = z_t, jnp.zeros_like(z_t)
        for _ in range(num):
            move = jnp.clip(end(t) - here, -length, length)
            moves = diffusion.expand(jnp.abs(move) > 0.5 * length, z)
            prediction = teacher(z, schedule.logsnr(here), cond)
            here = here + move
            z = jnp.where(moves, diffusion.ddim_step(prediction, *_at(schedule, here, z)), z)
            x = jnp.where(moves, prediction.x, x)
        jump = _prediction_of_jump(z_t, z, _at(schedule, t, z), _at(schedule, end(t), z))
        to_clean = diffusion.expand(end(t) < 0.5 * length, z)
        return diffusion.Prediction(jnp.where(to_clean, x, jump.x), jump.eps)

    return denoiser
