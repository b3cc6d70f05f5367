"""The numbered theory of diffusion.py up to (3), in float64 where it is an identity; (4) to (7) are in test_targets."""

import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill import diffusion

SCHEDULES = [
    *(make() for make in diffusion.SCHEDULES.values()),
    diffusion.Cosine(shift=2 * np.log(64 / 256)),
    diffusion.DiscreteBetas(0.0015, 0.0195),
]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
RNG = np.random.default_rng(0)


def grid64(schedule, num_intervals):
    logsnr = schedule.logsnr(np.linspace(0.0, 1.0, num_intervals + 1))
    return diffusion.Grid(*schedule.alpha_sigma(logsnr), logsnr)


# (1) and (2): schedules


def test_cosine_logsnr_values():
    t = np.array([0.0, 1 / 1024, 1 / 16, 0.25, 0.5, 0.75, 1.0])
    expected = [20.0, 12.9015556, 4.6347577, 1.7626188, 0.0, -1.7626188, -20.0]
    np.testing.assert_allclose(diffusion.Cosine().logsnr(t), expected, atol=1e-7)


def test_cosine_is_a_line_in_the_angle():
    t = np.linspace(0.0, 1.0, 65)
    alpha, sigma = diffusion.Cosine().alpha_sigma(diffusion.Cosine().logsnr(t))
    np.testing.assert_allclose(np.arctan2(sigma, alpha), 1.57070553 * t + 4.53999e-5, atol=1e-8)
    assert alpha[-1] == pytest.approx(4.54e-5, rel=1e-3)
    assert (alpha[0] / sigma[0]) ** 2 == pytest.approx(4.8517e8, rel=1e-4)


def test_shift_of_cosine_divides_the_snr_by_the_square_of_the_side():
    t = np.linspace(0.0, 1.0, 9)
    shifted = diffusion.Cosine(shift=2 * np.log(64 / 256)).logsnr(t)
    np.testing.assert_allclose(np.exp(diffusion.Cosine().logsnr(t) - shifted), 16.0)


def test_rectified_flow_is_straight():
    schedule = diffusion.RectifiedFlow()
    t = np.linspace(0.0, 1.0, 33)
    alpha, sigma = schedule.alpha_sigma(schedule.logsnr(t))
    np.testing.assert_allclose(alpha + sigma, 1.0, rtol=1e-14)
    np.testing.assert_allclose(sigma, t, atol=5e-5)
    np.testing.assert_allclose(schedule.logsnr(np.array([0.0, 1.0])), [20.0, -20.0])


@pytest.mark.parametrize(
    ("betas", "logsnrs", "last_alpha"),
    [
        ((0.00085, 0.0120), [7.0694, 0.7329, -0.9561, -2.8130, -5.3640], 0.06826),
        ((0.0015, 0.0195), [6.5008, 0.0421, -2.0324, -4.7657, -8.8574], 0.01193),
    ],
    ids=["stable diffusion", "latent diffusion"],
)
def test_discrete_betas_tables(betas, logsnrs, last_alpha):
    schedule = diffusion.DiscreteBetas(*betas)
    t = (np.array([0, 249, 499, 749, 999]) + 1) / 1000
    np.testing.assert_allclose(schedule.logsnr(t), logsnrs, atol=5.1e-5)
    assert schedule.alpha_sigma(schedule.logsnr(t))[0][-1] == pytest.approx(last_alpha, abs=5e-6)
    assert schedule.logsnr(np.array([0.0]))[0] == 20.0
    halfway = schedule.logsnr(np.array([0.5, 0.5005, 0.501]))
    assert halfway[1] == pytest.approx((halfway[0] + halfway[2]) / 2, abs=1e-12)


@each_schedule
def test_logsnr_falls_belongs_to_alpha_sigma_and_inverts(schedule):
    t = np.linspace(0.0, 1.0, 1025)
    logsnr = schedule.logsnr(t)
    alpha, sigma = schedule.alpha_sigma(logsnr)
    assert (np.diff(logsnr) < 0).all()
    np.testing.assert_allclose(2 * np.log(alpha / sigma), logsnr, atol=1e-10)
    np.testing.assert_allclose(schedule.t(logsnr), t, atol=1e-10)


@each_schedule
def test_float32_in_jax_follows_float64_in_numpy(schedule):
    t = np.linspace(0.0, 1.0, 129)
    logsnr = schedule.logsnr(t)
    np.testing.assert_allclose(schedule.logsnr(jnp.asarray(t, jnp.float32)), logsnr, atol=5e-3)
    rounded = jnp.asarray(logsnr, jnp.float32)
    np.testing.assert_allclose(schedule.alpha_sigma(rounded), schedule.alpha_sigma(logsnr), rtol=1e-5)
    np.testing.assert_allclose(schedule.t(rounded), t, atol=1e-6)


@each_schedule
def test_grid_is_the_schedule_rounded_once(schedule):
    grid = diffusion.make_grid(schedule, 1024)
    assert grid.num_intervals == 1024 and all(table.dtype == np.float32 for table in grid)
    for table, exact in zip(grid, grid64(schedule, 1024), strict=True):
        np.testing.assert_array_equal(table, exact.astype(np.float32))
    np.testing.assert_array_equal(grid.at(np.array([[0, 512]])).alpha, grid.alpha[[0, 512]][None])


# (3): parameterisations

RAW = {
    "x": lambda x, eps, alpha, sigma: x,
    "eps": lambda x, eps, alpha, sigma: eps,
    "v": lambda x, eps, alpha, sigma: alpha * eps - sigma * x,
    "both": lambda x, eps, alpha, sigma: np.concatenate([x, eps], -1),
    "flow": lambda x, eps, alpha, sigma: eps - x,
}


def test_every_parameterisation_has_its_oracle():
    assert RAW.keys() == diffusion.PARAMETERISATIONS.keys()


@each_schedule
@pytest.mark.parametrize("name", RAW)
def test_the_true_output_gives_back_x_and_eps(schedule, name):
    alpha, sigma = schedule.alpha_sigma(schedule.logsnr(np.linspace(0.02, 0.98, 7)))
    x, eps = RNG.standard_normal((2, 7, 2, 2, 3))
    z = diffusion.diffuse(x, eps, alpha, sigma)
    columns = (c[:, None, None, None] for c in (alpha, sigma))
    prediction = diffusion.to_prediction(name, RAW[name](x, eps, *columns), z, alpha, sigma)
    np.testing.assert_allclose(prediction.x, x, atol=1e-11)
    np.testing.assert_allclose(prediction.eps, eps, atol=1e-11)


@each_schedule
@pytest.mark.parametrize("name", RAW)
def test_any_output_gives_an_x_and_eps_that_make_z(schedule, name):
    alpha, sigma = schedule.alpha_sigma(schedule.logsnr(np.linspace(0.02, 0.98, 7)))
    z = RNG.standard_normal((7, 4))
    raw = RNG.standard_normal((7, 8 if name == "both" else 4))
    prediction = diffusion.to_prediction(name, raw, z, alpha, sigma)
    np.testing.assert_allclose(diffusion.diffuse(*prediction, alpha, sigma), z, atol=1e-12)
    if name == "v":
        np.testing.assert_allclose(diffusion.velocity(prediction, alpha, sigma), raw, atol=1e-12)


@each_schedule
def test_both_merges_x_and_eps_by_noise_level(schedule):
    alpha, sigma = schedule.alpha_sigma(schedule.logsnr(np.linspace(0.02, 0.98, 7)))
    z, x, eps = RNG.standard_normal((3, 7, 4))
    a, s = alpha[:, None], sigma[:, None]
    merged = (s**2 * x + a**2 * (z - s * eps) / a) / (a**2 + s**2)
    got = diffusion.to_prediction("both", np.concatenate([x, eps], -1), z, alpha, sigma)
    np.testing.assert_allclose(got.x, merged, atol=1e-12)


@each_schedule
def test_v_is_finite_at_both_ends(schedule):
    alpha, sigma = schedule.alpha_sigma(schedule.logsnr(jnp.array([0.0, 1.0])))
    raw, z = jnp.asarray(RNG.standard_normal((2, 2, 4)), jnp.float32)
    prediction = diffusion.to_prediction("v", raw, z, alpha, sigma)
    assert all(float(jnp.abs(part).max()) < 10 for part in prediction)


def test_clipping_keeps_x_in_bounds_and_eps_consistent():
    alpha, sigma = diffusion.Cosine().alpha_sigma(np.array([2.0, -2.0]))
    x, z = 3 * RNG.standard_normal((2, 2, 50))
    clipped = diffusion.clip_prediction(diffusion.to_prediction("x", x, z, alpha, sigma), z, alpha, sigma, 1.0)
    np.testing.assert_array_equal(clipped.x, np.clip(x, -1, 1))
    np.testing.assert_allclose(diffusion.diffuse(*clipped, alpha, sigma), z, atol=1e-12)


# Weightings

SNR_WEIGHT = {
    "constant": lambda snr: np.ones_like(snr),
    "snr": lambda snr: snr,
    "snr_trunc": lambda snr: np.maximum(snr, 1.0),
    "v_mse": lambda snr: snr + 1.0,
}


@each_schedule
@pytest.mark.parametrize("name", diffusion.WEIGHTINGS)
def test_weights_in_x_and_in_v_are_the_named_function_of_the_snr(schedule, name):
    logsnr = schedule.logsnr(np.linspace(0.05, 0.95, 7))
    alpha, sigma = schedule.alpha_sigma(logsnr)
    z, x = RNG.standard_normal((2, 7, 3))
    raw = RNG.standard_normal((7, 3))
    one, two = (diffusion.to_prediction("x", value, z, alpha, sigma) for value in (x, raw))
    x_mse = diffusion.mean_square(one.x - two.x)
    v_mse = diffusion.mean_square(diffusion.velocity(one, alpha, sigma) - diffusion.velocity(two, alpha, sigma))
    expected = SNR_WEIGHT[name](np.exp(logsnr)) * x_mse
    np.testing.assert_allclose(diffusion.loss_weight_x(name, alpha, sigma) * x_mse, expected, rtol=1e-9)
    np.testing.assert_allclose(diffusion.loss_weight_v(name, alpha, sigma) * v_mse, expected, rtol=1e-9)


@each_schedule
def test_snr_times_x_error_is_the_eps_error(schedule):
    alpha, sigma = schedule.alpha_sigma(schedule.logsnr(np.linspace(0.05, 0.95, 7)))
    z, x, y = RNG.standard_normal((3, 7, 3))
    one, two = (diffusion.to_prediction("x", value, z, alpha, sigma) for value in (x, y))
    weighted = diffusion.loss_weight_x("snr", alpha, sigma) * diffusion.mean_square(x - y)
    np.testing.assert_allclose(weighted, diffusion.mean_square(one.eps - two.eps), rtol=1e-9)


def test_mean_square_keeps_the_batch():
    x = np.stack([np.full((2, 3), 2.0), np.full((2, 3), 3.0)])
    np.testing.assert_array_equal(diffusion.mean_square(x), [4.0, 9.0])
