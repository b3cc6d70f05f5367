"""The numbered theory of diffusion.py, in float64 where it is an identity."""

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


def points(grid, i, num_steps, jumps=(0.0, 0.5, 1.0)):
    """t = i/N and the two times after it, as float64 grid points of shape [1]."""
    unit = grid.num_intervals / num_steps
    return [grid.at(np.array([round(unit * (i - jump))])) for jump in jumps]


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


# (4) and (5): the DDIM step and the target of two

COSINE_WEIGHTS = {
    (1, 1): 4.54e-5,
    (2, 2): 0.414214,
    (4, 2): 0.351166,
    (4, 3): 0.433548,
    (4, 4): 0.480215,
    (8, 8): 0.495148,
    (512, 2): 0.334963,
    (512, 512): 0.499999,
}


@pytest.mark.parametrize(("num_steps", "i"), COSINE_WEIGHTS)
def test_convex_weight_values(num_steps, i):
    expected = COSINE_WEIGHTS[num_steps, i]
    exact = diffusion.convex_weight(*points(grid64(diffusion.Cosine(), 1024), i, num_steps))
    np.testing.assert_allclose(exact, expected, atol=6e-7)
    stored = diffusion.make_grid(diffusion.Cosine(), 1024)
    np.testing.assert_allclose(diffusion.convex_weight(*points(stored, i, num_steps)), expected, atol=1e-4)


@pytest.mark.parametrize(("num_steps", "i", "expected"), [(4, 3, 0.292907), (4, 4, 0.414214), (8, 8, 0.480215)])
def test_convex_weight_of_jumps_of_two(num_steps, i, expected):
    at = points(grid64(diffusion.Cosine(), 16), i, num_steps, jumps=(0, 1, 2))
    np.testing.assert_allclose(diffusion.convex_weight(*at), expected, atol=6e-7)


@pytest.mark.parametrize(("num_steps", "expected"), [(2, 0.320115), (4, 0.388580), (8, 0.436249)])
def test_convex_weight_on_the_stable_diffusion_schedule(num_steps, expected):
    at = points(grid64(diffusion.DiscreteBetas(), 16), num_steps, num_steps)
    np.testing.assert_allclose(diffusion.convex_weight(*at), expected, atol=6e-7)


@each_schedule
def test_convex_weight_is_the_ratio_of_sines_below_one_half(schedule):
    grid = grid64(schedule, 128)
    at_t, at_m, at_s = (grid.at(2 * np.arange(2, 65) - k) for k in range(3))
    a = diffusion.convex_weight(at_t, at_m, at_s)
    assert (a > 0).all() and (a < 0.5).all()
    phi_t, phi_m, phi_s = (np.arctan2(at.sigma, at.alpha) for at in (at_t, at_m, at_s))
    sines = np.sin(phi_s) * np.sin(phi_t - phi_m) / (np.sin(phi_m) * np.sin(phi_t - phi_s))
    np.testing.assert_allclose(a, sines, rtol=1e-9)


def test_convex_weight_of_straight_paths_is_half_the_ratio_of_the_noise():
    grid = grid64(diffusion.RectifiedFlow(), 128)
    at_t, at_m, at_s = (grid.at(2 * np.arange(1, 65) - k) for k in range(3))
    np.testing.assert_allclose(diffusion.convex_weight(at_t, at_m, at_s), at_s.sigma / at_m.sigma / 2, rtol=1e-9)


def two_steps(z, x_1, x_2, at_t, at_m, at_s):
    """The two DDIM steps written out: (z_m, z_s)."""
    z_m = at_m.alpha * x_1 + at_m.sigma / at_t.sigma * (z - at_t.alpha * x_1)
    return z_m, at_s.alpha * x_2 + at_s.sigma / at_m.sigma * (z_m - at_m.alpha * x_2)


def printed(z, z_s, at_t, at_s):
    """(T)."""
    ratio = at_s.sigma / at_t.sigma
    return (z_s - ratio * z) / (at_s.alpha - ratio * at_t.alpha)


def in_velocities(z, z_m, x_1, x_2, at_t, at_m, at_s):
    """(V), on z / sqrt(alpha^2 + sigma^2), where every schedule is variance preserving."""

    def normalised(z, x, at):
        r = np.hypot(at.alpha, at.sigma)
        angle, z = np.arctan2(at.sigma, at.alpha), z / r
        return angle, z, (np.cos(angle) * z - x) / np.sin(angle)

    phi_t, z, v_1 = normalised(z, x_1, at_t)
    phi_m, _, v_2 = normalised(z_m, x_2, at_m)
    d_1, d_2 = phi_t - phi_m, phi_m - np.arctan2(at_s.sigma, at_s.alpha)
    v = (np.sin(d_1) * np.cos(d_2) * v_1 + np.sin(d_2) * v_2 - np.sin(d_1) * np.sin(d_2) * z) / np.sin(d_1 + d_2)
    return np.cos(phi_t) * z - np.sin(phi_t) * v


@each_schedule
@pytest.mark.parametrize(("num_steps", "i"), [(1, 1), (2, 1), (2, 2), (4, 3), (8, 1), (8, 2), (8, 8), (64, 40)])
def test_convex_equals_printed_equals_velocity_form(schedule, num_steps, i):
    at = points(grid64(schedule, 128), i, num_steps)
    z, x_1, x_2 = RNG.standard_normal((3, 1, 32))
    z_m, z_s = two_steps(z, x_1, x_2, *at)
    convex = diffusion.two_step_target(x_1, x_2, diffusion.convex_weight(*at))
    np.testing.assert_allclose(convex, printed(z, z_s, at[0], at[2]), atol=1e-12)
    np.testing.assert_allclose(convex, in_velocities(z, z_m, x_1, x_2, *at), atol=1e-12)


@each_schedule
@pytest.mark.parametrize("num_steps", [1, 4, 64])
def test_one_step_with_the_target_lands_where_two_steps_land(schedule, num_steps):
    grid = diffusion.make_grid(schedule, 2 * num_steps)
    z, x_1, x_2 = RNG.standard_normal((3, num_steps, 16)).astype(np.float32)
    i = np.arange(1, num_steps + 1)
    at_t, at_m, at_s = (grid.at(2 * i - k) for k in range(3))

    def step(x, z, here, there):
        prediction = diffusion.to_prediction("x", x, z, here.alpha, here.sigma)
        return diffusion.ddim_step(prediction, there.alpha, there.sigma)

    end_of_two = step(x_2, step(x_1, z, at_t, at_m), at_m, at_s)
    target = diffusion.two_step_target(x_1, x_2, diffusion.convex_weight(at_t, at_m, at_s))
    np.testing.assert_allclose(step(target, z, at_t, at_s), end_of_two, atol=2e-6)


@each_schedule
@pytest.mark.parametrize("num_steps", [1, 2, 8, 512])
def test_constant_predictor_is_a_fixed_point_of_the_target(schedule, num_steps):
    grid = diffusion.make_grid(schedule, 2 * num_steps)
    x = RNG.standard_normal((num_steps, 5)).astype(np.float32)
    i = np.arange(1, num_steps + 1)
    a = diffusion.convex_weight(*(grid.at(2 * i - k) for k in range(3)))
    np.testing.assert_allclose(diffusion.two_step_target(x, x, a), x, rtol=1e-6)


@each_schedule
def test_ddim_step_of_the_truth_stays_on_its_path(schedule):
    grid = grid64(schedule, 8)
    x, eps = RNG.standard_normal((2, 8, 3))
    at_t, at_s = grid.at(np.arange(1, 9)), grid.at(np.arange(8))
    z = diffusion.diffuse(x, eps, at_t.alpha, at_t.sigma)
    velocity = diffusion.velocity(diffusion.Prediction(x, eps), at_t.alpha, at_t.sigma)
    prediction = diffusion.to_prediction("v", velocity, z, at_t.alpha, at_t.sigma)
    z_s = diffusion.ddim_step(prediction, at_s.alpha, at_s.sigma)
    np.testing.assert_allclose(z_s, diffusion.diffuse(x, eps, at_s.alpha, at_s.sigma), atol=1e-12)


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
