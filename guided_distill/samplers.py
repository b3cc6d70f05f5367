"""From noise to samples in N evaluations of a denoiser, and the noise itself, one seed per image.

All samplers share one signature,

    sampler(denoiser, grid, z, cond, num_steps, keys=None, *, clip=None) -> x [B, *S]

z [B, *S] at t = 1; N = `num_steps` may be traced and divides grid.num_intervals; `keys` [B] is one key per image, and
image k is made of z[k], cond[k] and keys[k] alone (those that draw nothing ignore them); `clip` bounds every x_hat. The
network is evaluated at t = i/N, i = N .. 1, and the result is the x_hat of the last evaluation: nothing lands on t = 0,
where eps would be found by dividing by sigma_0. (`encode` runs the other way; its docstring says how it differs.)
"""

import jax
import jax.numpy as jnp

from guided_distill import diffusion

_LOG_VARIANCE_FRACTION = 0.3  # of `ancestral`, for 64x64 images (arXiv 2207.12598, section 4)


def predict(denoiser, z, at_t, cond, clip=None):
    """One evaluation at the grid point `at_t`; with `clip`, x_hat is kept in [-clip, clip] and eps_hat agrees."""
    prediction = denoiser(z, jnp.broadcast_to(at_t.logsnr, z.shape[:1]), cond)
    return prediction if clip is None else diffusion.clip_prediction(prediction, z, at_t.alpha, at_t.sigma, clip)


def step_noise(keys, i, like):
    """eps [B, *S] for the step that leaves t = i/N, image k from key k, unlike the initial noise and the label."""
    # fold_in 0 and 1 are taken (see `initial_noise`, `random_labels`); i is at least 1.
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1 + i), like.shape[1:], like.dtype))(keys)


def renoise_variance(at_t, at_s):
    """sigma_{t|s}^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2: what is added to z_s on its way back to t > s.

    As (1 - exp(logsnr_t - logsnr_s)) sigma_t^2, which does not cancel when t - s is small (arXiv 2207.12598, eq. 2).
    """
    return -jnp.expm1(at_t.logsnr - at_s.logsnr) * at_t.sigma**2


def _points(grid, num_steps):
    """i -> the grid point of t = i/N."""
    stride = grid.num_intervals // num_steps
    return lambda i: grid.at(i * stride)


def _descend(denoiser, grid, z, cond, num_steps, clip, advance):
    """The last x_hat of N evaluations at t = i/N, i = N .. 1.

    advance(at, i, z, prediction, x_before) -> z at t = (i-1)/N, where at(i) is the grid point of t = i/N and x_before
    the x_hat at (i+1)/N (zeros at i = N). Where it leads from i = 1 is dropped.
    """
    at = _points(grid, num_steps)

    def step(n, carry):
        z, x_before = carry
        i = num_steps - n
        prediction = predict(denoiser, z, at(i), cond, clip)
        return advance(at, i, z, prediction, x_before), prediction.x

    return jax.lax.fori_loop(0, num_steps, step, (z, jnp.zeros_like(z)))[1]


def deterministic(denoiser, grid, z, cond, num_steps, keys=None, *, clip=None):
    """DDIM in N evaluations; first order (arXiv 2202.00512, section 2)."""

    def advance(at, i, z, prediction, x_before):
        at_s = at(i - 1)
        return diffusion.ddim_step(prediction, at_s.alpha, at_s.sigma)

    return _descend(denoiser, grid, z, cond, num_steps, clip, advance)


def stochastic(denoiser, grid, z, cond, num_steps, keys=None, *, clip=None):
    """Two steps of 1/N forward by DDIM, one back by noise, in N evaluations (arXiv 2210.03142, section 3.3).

    N - 1 times t = i/N -> k = (i-2)/N in one jump, then z_q = (alpha_q / alpha_k) z_k + sigma_{q|k} eps at q = (i-1)/N;
    at last a jump of 1/N from t = 1/N. For students trained to jump that far.
    """

    def advance(at, i, z, prediction, x_before):
        at_q, at_k = at(i - 1), at(jnp.maximum(i - 2, 0))
        z_k = diffusion.ddim_step(prediction, at_k.alpha, at_k.sigma)
        return diffusion.diffuse(
            z_k, step_noise(keys, i, z), at_q.alpha / at_k.alpha, jnp.sqrt(renoise_variance(at_q, at_k))
        )

    return _descend(denoiser, grid, z, cond, num_steps, clip, advance)


def renoising(denoiser, grid, z, cond, num_steps, keys=None, *, clip=None):
    """Fresh noise on x_hat, z_s = alpha_s x_hat + sigma_s eps, in N evaluations (arXiv 2303.01469, algorithm 1).

    For students whose x_hat is where the flow ends, not the mean of where it may: those of consistency distillation.
    """

    def advance(at, i, z, prediction, x_before):
        at_s = at(i - 1)
        return diffusion.diffuse(prediction.x, step_noise(keys, i, z), at_s.alpha, at_s.sigma)

    return _descend(denoiser, grid, z, cond, num_steps, clip, advance)


def ancestral(denoiser, grid, z, cond, num_steps, keys=None, *, clip=None):
    """DDPM's sampler in N evaluations, the noise interpolated in log variance (arXiv 2207.12598, eq. 3 and 4).

    z_s ~ q(z_s | z_t, x = x_hat), whose variance sigma_{t|s}^2 (sigma_s / sigma_t)^2 is the least that the reverse
    process may have; sigma_{t|s}^2 is the most. What is drawn has the one to the power .7 times the other to the .3.
    """

    def advance(at, i, z, prediction, x_before):
        at_t, at_s = at(i), at(i - 1)
        shrink = at_s.sigma / at_t.sigma
        mean = diffusion.diffuse(
            z, prediction.x, at_t.alpha / at_s.alpha * shrink**2, -at_s.alpha * jnp.expm1(at_t.logsnr - at_s.logsnr)
        )
        std = jnp.sqrt(renoise_variance(at_t, at_s)) * shrink ** (1.0 - _LOG_VARIANCE_FRACTION)
        return mean + std * step_noise(keys, i, z)

    return _descend(denoiser, grid, z, cond, num_steps, clip, advance)


def dpm_solver_pp_2m(denoiser, grid, z, cond, num_steps, keys=None, *, clip=None):
    """DPM-Solver++(2M) in N evaluations; second order (arXiv 2211.01095, algorithm 2).

    DDIM with x_hat carried on linearly in logsnr from the evaluation before: to the middle of the step that is
    x_hat + (h_s / (2 h_t)) (x_hat - x_before), h_s = logsnr_s - logsnr_t, h_t that of the step before. First order in
    the first step, which has nothing before it, and in the last, whose h_s is as good as infinite.
    """

    def advance(at, i, z, prediction, x_before):
        at_before, at_t, at_s = at(jnp.minimum(i + 1, num_steps)), at(i), at(i - 1)
        ratio = (at_s.logsnr - at_t.logsnr) / (at_t.logsnr - at_before.logsnr)
        ahead = jnp.where(i == num_steps, 0.0, 0.5 * ratio)
        z_s = diffusion.ddim_step(prediction, at_s.alpha, at_s.sigma)
        return z_s + diffusion.kappa(at_s, at_t) * ahead * (prediction.x - x_before)

    return _descend(denoiser, grid, z, cond, num_steps, clip, advance)


def heun(denoiser, grid, z, cond, num_steps, keys=None, *, clip=None):
    """Heun's method on the probability flow in 2N - 1 evaluations; second order (after arXiv 2206.00364, algorithm 1).

    That algorithm integrates z/alpha in sigma/alpha, which starts at 2e4 where alpha_1 = 4.5e-5. Here the trapezoid is
    in the angle phi = arctan(sigma/alpha), regular at both ends: z/r, r^2 = alpha^2 + sigma^2, turns at constant x_hat
    and eps_hat in a DDIM step t -> s, and their change from the first evaluation to the second, made where that step
    ends, adds tan((phi_s - phi_t) / 2) (v_2 - v_1), v_k = alpha_s eps_k - sigma_s x_k. The last step is DDIM's alone.
    """
    at = _points(grid, num_steps)

    def step(n, carry):
        # One evaluation at t = 1 and two at every time after it: where DDIM landed, and where that is corrected to.
        # They take turns in one loop, so that the program holds one copy of the network.
        z, before = carry
        i = num_steps - (n + 1) // 2
        at_before, at_t, at_s = at(jnp.minimum(i + 1, num_steps)), at(i), at(i - 1)
        prediction = predict(denoiser, z, at_t, cond, clip)
        ahead = diffusion.ddim_step(prediction, at_s.alpha, at_s.sigma)
        turn = jnp.arctan2(at_t.sigma, at_t.alpha) - jnp.arctan2(at_before.sigma, at_before.alpha)
        change = diffusion.velocity(jax.tree.map(jnp.subtract, prediction, before), at_t.alpha, at_t.sigma)
        return jnp.where(n % 2 == 0, ahead, z + jnp.tan(0.5 * turn) * change), prediction

    nothing = diffusion.Prediction(jnp.zeros_like(z), jnp.zeros_like(z))
    return jax.lax.fori_loop(0, network_calls("heun", num_steps), step, (z, nothing))[1].x


def encode(denoiser, grid, z, cond, num_steps, keys=None, *, clip=None):
    """DDIM run backwards, from a clean sample to its noise, in N evaluations (arXiv 2203.08382).

    `z` is the clean x [B, *S], taken as z_0 = alpha_0 x, which it is up to sigma_0; the result is z [B, *S] at t = 1.
    The network is evaluated at s = i/N, i = 0 .. N-1, and has to know t = 0. `clip` is not applied: it would make
    eps_hat anew from x_hat, dividing by sigma_0. For the same reason the denoiser's own output must give eps_hat
    without a division by sigma, as that of v does and that of x does not.
    """
    at = _points(grid, num_steps)

    def step(i, z):
        at_t = at(i + 1)
        return diffusion.ddim_step(predict(denoiser, z, at(i), cond), at_t.alpha, at_t.sigma)

    return jax.lax.fori_loop(0, num_steps, step, z)


SAMPLERS = {
    "deterministic": deterministic,
    "stochastic": stochastic,
    "renoising": renoising,
    "ancestral": ancestral,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "heun": heun,
    "encode": encode,
}
BASELINES = ("ancestral", "dpm_solver_pp_2m", "heun")  # what the teacher is sampled with besides
DRAWS_NOISE = ("stochastic", "renoising", "ancestral")  # whose images are no function of the first noise alone


def network_calls(sampler, num_steps):
    """Evaluations of the denoiser that the sampler of this name makes for one image in N = `num_steps` steps."""
    return 2 * num_steps - 1 if sampler == "heun" else num_steps


def image_keys(seed, indices):
    """One key per image, a function of (seed, index) alone: the same bits in any batch, on any number of devices."""
    return jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(indices)


def initial_noise(keys, sample_shape, prior_std=1.0):
    """z at t = 1, [B, *sample_shape], image k from key k."""
    return prior_std * jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), sample_shape))(keys)


def random_labels(keys, num_classes):
    """Uniform labels i32 [B], image k from key k."""
    return jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 1), (), 0, num_classes))(keys)
