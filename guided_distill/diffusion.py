"""Gaussian diffusion: schedules, parameterisations, the DDIM step and the target that halves its steps.

The theory, in the paper's letters (arXiv 2210.03142, section 2; arXiv 2202.00512, section 2 and appendix D):

 (1) data x, noise eps ~ N(0, I), time t in [0, 1] from clean to noise:  z_t = alpha_t x + sigma_t eps
 (2) log-SNR lambda_t = log(alpha_t^2 / sigma_t^2), decreasing in t. Variance preserving schedules have
     alpha^2 = sigmoid(lambda), sigma^2 = sigmoid(-lambda); rectified flow has alpha = 1 - t, sigma = t.
 (3) v = alpha eps - sigma x, whence with r = alpha^2 + sigma^2:
        x = (alpha z - sigma v) / r,   eps = (sigma z + alpha v) / r
 (4) DDIM step t -> s:  z_s = alpha_s x_hat + sigma_s eps_hat
 (5) Two steps t -> m -> s with predictions x_1 at t and x_2 at m equal the one step t -> s with prediction
        x_tilde = (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)             as printed
                = a x_1 + (1 - a) x_2,   a = (sigma_s / sigma_m) kappa(m|t) / kappa(s|t)                convex
     with kappa(b|t) = alpha_b - sigma_b alpha_t / sigma_t = -alpha_b expm1((lambda_t - lambda_b) / 2).
     The printed form divides by kappa(s|t), which vanishes as the steps get finer; the convex form never does.
 (6) With rho = alpha / sigma, (4) from t_{j-1} to t_j with prediction x_j is
        z_j / sigma_j = z_{j-1} / sigma_{j-1} + (rho_j - rho_{j-1}) x_j
     and k such steps t = t_0 > ... > t_k = s add up to the one step t -> s with prediction
        x_tilde = sum_j c_j x_j,   c_j = (rho_j - rho_{j-1}) / (rho_k - rho_0)
                = exp((lambda_j - lambda_k) / 2) expm1((lambda_{j-1} - lambda_j) / 2) / expm1((lambda_0 - lambda_k) / 2)
     All exponents are <= 0, where rho itself reaches e^10 at t = 0. c_1 of two steps is a of (5), which is so computed.
 (7) Two steps in v, in either direction of time, with the angle phi = arctan(sigma / alpha), d_1 = phi_t - phi_m,
     d_2 = phi_m - phi_s, and z, v_1, v_2 each divided by the sqrt(r) of its own time:
        v_tilde = (sin d_1 cos d_2 v_1 + sin d_2 v_2 - sin d_1 sin d_2 z) / sin(d_1 + d_2)
     since (4) is the rotation z_s = cos(d) z_t - sin(d) v_t. It is regular at t = 0, where x to eps divides by sigma_0;
     sin(phi_a - phi_b) = alpha_a sigma_b expm1((lambda_b - lambda_a) / 2) / sqrt(r_a r_b) does not cancel.

Nothing outside a schedule assumes alpha^2 + sigma^2 = 1. The functions take numpy or JAX arrays alike, so that
tables and oracles can be made in float64 on the host with the formulas that train.
"""

import dataclasses
import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np


def _namespace(array):
    return jnp if isinstance(array, jax.Array) else np


def expand(coefficient, like):
    """Shapes a per-example coefficient [B] (or a scalar) to broadcast against `like` [B, *S]."""
    return (
        coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))
        if coefficient.ndim
        else coefficient
    )


def _sigmoid(x):
    xp = _namespace(x)
    return jax.nn.sigmoid(x) if xp is jnp else 1.0 / (1.0 + np.exp(-np.asarray(x)))


class Schedule(Protocol):
    """A path of noise levels: t in [0, 1] <-> log-SNR, and the (alpha, sigma) of a log-SNR, all of shape [B]."""

    prior_std: float

    def logsnr(self, t): ...

    def t(self, logsnr): ...

    def alpha_sigma(self, logsnr): ...


def _variance_preserving(logsnr):
    xp = _namespace(logsnr)
    return xp.sqrt(_sigmoid(logsnr)), xp.sqrt(_sigmoid(-logsnr))


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Cosine schedule in log-SNR form, clipped at its end points (arXiv 2202.00512, appendix E).

    `shift` is added to the log-SNR: 2 log(64 / side) adapts it to a resolution (arXiv 2301.11093, section 2.1).
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0
    shift: float = 0.0
    prior_std = 1.0

    def _line(self):
        b = np.arctan(np.exp(-0.5 * self.logsnr_max))
        return float(np.arctan(np.exp(-0.5 * self.logsnr_min)) - b), float(b)

    def logsnr(self, t):
        a, b = self._line()
        xp = _namespace(t)
        return -2.0 * xp.log(xp.tan(a * t + b)) + self.shift

    def t(self, logsnr):
        a, b = self._line()
        xp = _namespace(logsnr)
        return (xp.arctan(xp.exp(-0.5 * (logsnr - self.shift))) - b) / a

    def alpha_sigma(self, logsnr):
        return _variance_preserving(logsnr)


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """Straight paths, alpha = 1 - t and sigma = t (arXiv 2209.03003), with |log-SNR| <= `logsnr_max` at both ends."""

    logsnr_max: float = 20.0
    prior_std = 1.0

    def _margin(self):
        return float(_sigmoid(-0.5 * self.logsnr_max))

    def logsnr(self, t):
        margin, xp = self._margin(), _namespace(t)
        sigma = margin + (1.0 - 2.0 * margin) * t
        return 2.0 * (xp.log1p(-sigma) - xp.log(sigma))

    def t(self, logsnr):
        margin = self._margin()
        return (_sigmoid(-0.5 * logsnr) - margin) / (1.0 - 2.0 * margin)

    def alpha_sigma(self, logsnr):
        return _sigmoid(0.5 * logsnr), _sigmoid(-0.5 * logsnr)


@functools.cache
def _beta_knots(beta_start, beta_end, num_betas, zero_terminal_snr):
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_betas, dtype=np.float64) ** 2
    log_alpha_bar = np.cumsum(np.log1p(-betas))
    if zero_terminal_snr:
        alpha = np.exp(0.5 * log_alpha_bar)
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        # No log-SNR is -inf here: at -20 the image is 5e-5 of z.
        log_alpha_bar = np.log(np.maximum(alpha**2, np.exp(-20.0)))
    logsnr = log_alpha_bar - np.log(-np.expm1(log_alpha_bar))
    # A clean end that the discrete chain does not have: the samplers' last step lands on t = 0.
    return np.arange(num_betas + 1) / num_betas, np.concatenate([[20.0], logsnr])


@dataclasses.dataclass(frozen=True)
class DiscreteBetas:
    """Betas linear in sqrt(beta), as latent diffusion trains with, made continuous in t (arXiv 2112.10752, appendix).

    The log-SNR is interpolated linearly over the knots t_n = (n + 1) / num_betas, plus log-SNR 20 at t = 0, so the
    network's own time index is num_betas * t - 1. With `zero_terminal_snr` they are stretched so that nothing of the
    image is left at t = 1 (arXiv 2305.08891, algorithm 1), which a network that predicts eps cannot start from.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_betas: int = 1000
    zero_terminal_snr: bool = False
    prior_std = 1.0

    def _knots(self):
        return _beta_knots(self.beta_start, self.beta_end, self.num_betas, self.zero_terminal_snr)

    def logsnr(self, t):
        xp = _namespace(t)
        knots_t, knots_logsnr = self._knots()
        return xp.interp(t, xp.asarray(knots_t, t.dtype), xp.asarray(knots_logsnr, t.dtype))

    def t(self, logsnr):
        xp = _namespace(logsnr)
        knots_t, knots_logsnr = self._knots()
        return xp.interp(-logsnr, xp.asarray(-knots_logsnr, logsnr.dtype), xp.asarray(knots_t, logsnr.dtype))

    def alpha_sigma(self, logsnr):
        return _variance_preserving(logsnr)


SCHEDULES = {"cosine": Cosine, "rectified_flow": RectifiedFlow, "discrete_betas": DiscreteBetas}


def diffuse(x, eps, alpha, sigma):
    """z_t = alpha_t x + sigma_t eps, (1): a sample of q(z_t | x). x, eps [B, *S]; alpha, sigma [B]."""
    return expand(alpha, x) * x + expand(sigma, x) * eps


class Prediction(NamedTuple):
    """What a denoiser says of z_t: the clean x_hat and the noise eps_hat that make z_t together, both [B, *S]."""

    x: jax.Array
    eps: jax.Array


def velocity(prediction, alpha, sigma):
    """v = alpha eps - sigma x, (3), of a prediction or of the truth. No division at any noise level."""
    return expand(alpha, prediction.x) * prediction.eps - expand(sigma, prediction.x) * prediction.x


def _from_x(raw, z, alpha, sigma):
    return Prediction(raw, (z - alpha * raw) / sigma)


def _from_eps(raw, z, alpha, sigma):
    return Prediction((z - sigma * raw) / alpha, raw)


def _from_v(raw, z, alpha, sigma):
    r = alpha**2 + sigma**2
    return Prediction((alpha * z - sigma * raw) / r, (sigma * z + alpha * raw) / r)


def _from_both(raw, z, alpha, sigma):
    # x = sigma^2 x' + alpha (z - sigma eps'), multiplied out so that eps needs no division by sigma either.
    x, eps = _namespace(raw).split(raw, 2, axis=-1)
    r = alpha**2 + sigma**2
    return Prediction((sigma**2 * x + alpha * (z - sigma * eps)) / r, (sigma * (z - alpha * x) + alpha**2 * eps) / r)


def _from_flow(raw, z, alpha, sigma):
    return Prediction((z - sigma * raw) / (alpha + sigma), (z + alpha * raw) / (alpha + sigma))


PARAMETERISATIONS = {"x": _from_x, "eps": _from_eps, "v": _from_v, "both": _from_both, "flow": _from_flow}


def to_prediction(name, raw, z, alpha, sigma):
    """Reads a network's raw output [B, *S] ("both": twice the channels) as a Prediction.

    "x", "eps", "v" (3), "both" (x and eps, merged by noise level: arXiv 2202.00512, section 4) and "flow" (eps - x).
    """
    return PARAMETERISATIONS[name](raw, z, expand(alpha, z), expand(sigma, z))


def clip_prediction(prediction, z, alpha, sigma, bound):
    """Clips x_hat to [-bound, bound] and makes eps_hat agree with it again. As samplers do, and targets where asked."""
    x = _namespace(z).clip(prediction.x, -bound, bound)
    return _from_x(x, z, expand(alpha, z), expand(sigma, z))


class Grid(NamedTuple):
    """(alpha, sigma, logsnr) at t = j / num_intervals, j = 0 .. num_intervals, as float32 tables made in float64."""

    alpha: jax.Array
    sigma: jax.Array
    logsnr: jax.Array

    @property
    def num_intervals(self):
        return self.alpha.shape[0] - 1

    def at(self, index):
        """The three values at grid points `index`, of any integer shape."""
        return Grid(self.alpha[index], self.sigma[index], self.logsnr[index])


def make_grid(schedule, num_intervals):
    """Tabulates a schedule. In float32 the log-SNR alone would lose five digits of its differences at 1024 steps."""
    logsnr = schedule.logsnr(np.linspace(0.0, 1.0, num_intervals + 1))
    alpha, sigma = schedule.alpha_sigma(logsnr)
    return Grid(*(np.asarray(table, np.float32) for table in (alpha, sigma, logsnr)))


def ddim_step(prediction, alpha_s, sigma_s):
    """z_s = alpha_s x_hat + sigma_s eps_hat, (4): from the time of the prediction to the time of (alpha_s, sigma_s)."""
    return diffuse(prediction.x, prediction.eps, alpha_s, sigma_s)


def kappa(at_b, at_t):
    """kappa(b|t) of (5): a DDIM step is z_b = (sigma_b / sigma_t) z_t + kappa(b|t) x_hat."""
    return -at_b.alpha * _namespace(at_t.logsnr).expm1(0.5 * (at_t.logsnr - at_b.logsnr))


def convex_weights(points):
    """c_1 .. c_k of (6), [k, B], from the k + 1 grid points of k steps, a Grid of shape [k + 1, B] from t to s.

    Steps of no length have weight 0. Where s is t = 0 the last step has all the weight, up to sigma_0.
    """
    xp, logsnr = _namespace(points.logsnr), points.logsnr
    whole = xp.expm1(0.5 * (logsnr[:1] - logsnr[-1:]))
    return xp.exp(0.5 * (logsnr[1:] - logsnr[-1:])) * xp.expm1(0.5 * (logsnr[:-1] - logsnr[1:])) / whole


def composite_target(x, weights):
    """x_tilde = sum_j c_j x_j, (6): the prediction at t whose one DDIM step lands where the k steps landed.

    x [k, B, *S], weights [k, B]. A prediction of weight 0 has no part in it, even where it is not finite.
    """
    weights = expand(weights, x)
    return _namespace(x).where(weights == 0.0, 0.0, weights * x).sum(0)


def two_step_velocity(v_1, v_2, z, start, middle, end):
    """v_tilde at `start`, (7): its one DDIM step lands at `end` where two steps by way of `middle` land.

    z and v_1 [B, *S] at `start`, v_2 [B, *S] at `middle`; the three are grid points of shape [B], in either direction
    of time. (arXiv 2202.00512, appendix D, the step as a rotation.)
    """
    xp = _namespace(start.logsnr)

    def radius(at):
        return xp.sqrt(at.alpha**2 + at.sigma**2)

    def sine(a, b):
        """sin(phi_a - phi_b)."""
        return a.alpha * b.sigma * xp.expm1(0.5 * (b.logsnr - a.logsnr)) / (radius(a) * radius(b))

    cos_2 = (middle.alpha * end.alpha + middle.sigma * end.sigma) / (radius(middle) * radius(end))
    sin_1, sin_2, sin_both = sine(start, middle), sine(middle, end), sine(start, end)
    of_v_1, of_v_2 = sin_1 * cos_2 / sin_both, sin_2 / sin_both * radius(start) / radius(middle)
    return expand(of_v_1, z) * v_1 + expand(of_v_2, z) * v_2 - expand(sin_1 * sin_2 / sin_both, z) * z


_WEIGHTINGS = {
    "constant": lambda alpha_sq, sigma_sq: sigma_sq,
    "snr": lambda alpha_sq, sigma_sq: alpha_sq,
    "snr_trunc": lambda alpha_sq, sigma_sq: _namespace(alpha_sq).maximum(alpha_sq, sigma_sq),
    "v_mse": lambda alpha_sq, sigma_sq: alpha_sq + sigma_sq,
}
WEIGHTINGS = tuple(_WEIGHTINGS)


def loss_weight_x(name, alpha, sigma):
    """omega [B] that multiplies the mean squared error of x (arXiv 2202.00512, section 4): snr_trunc is max(SNR, 1)."""
    return _WEIGHTINGS[name](alpha**2, sigma**2) / sigma**2


def loss_weight_v(name, alpha, sigma):
    """The same omega [B] for the mean squared error of v, by xMSE = sigma^2 / r^2 vMSE. Finite at both ends."""
    return _WEIGHTINGS[name](alpha**2, sigma**2) / (alpha**2 + sigma**2) ** 2


def mean_square(x):
    """Mean over everything but the batch: [B, *S] -> [B], in float32 or better."""
    return (x**2).reshape(x.shape[0], -1).mean(-1)
