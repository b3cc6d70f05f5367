"""Lines (4) to (7) of diffusion.py: the DDIM step, and the targets that stand for several, in float64 where exact."""

import numpy as np
import pytest
from test_diffusion import RNG, each_schedule, grid64

from guided_distill import diffusion


def points(grid, i, num_steps, jumps=(0.0, 0.5, 1.0)):
    """t = i/N and the two times after it, as float64 grid points of shape [1]."""
    unit = grid.num_intervals / num_steps
    return [grid.at(np.array([round(unit * (i - jump))])) for jump in jumps]


def first_weight(*at):
    """a of (5), from the three grid points of two steps."""
    return diffusion.convex_weights(diffusion.Grid(*map(np.stack, zip(*at, strict=True))))[0]


def two_step_target(x_1, x_2, a):
    return diffusion.composite_target(np.stack([x_1, x_2]), np.stack([a, 1 - a]))


# (4): the DDIM step


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


# (5): the target of two steps

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
    exact = first_weight(*points(grid64(diffusion.Cosine(), 1024), i, num_steps))
    np.testing.assert_allclose(exact, expected, atol=6e-7)
    stored = diffusion.make_grid(diffusion.Cosine(), 1024)
    np.testing.assert_allclose(first_weight(*points(stored, i, num_steps)), expected, atol=1e-4)


@pytest.mark.parametrize(("num_steps", "i", "expected"), [(4, 3, 0.292907), (4, 4, 0.414214), (8, 8, 0.480215)])
def test_convex_weight_of_jumps_of_two(num_steps, i, expected):
    at = points(grid64(diffusion.Cosine(), 16), i, num_steps, jumps=(0, 1, 2))
    np.testing.assert_allclose(first_weight(*at), expected, atol=6e-7)


@pytest.mark.parametrize(("num_steps", "i", "expected"), [(2, 1, 0.585786), (4, 1, 0.648834), (4, 3, 0.519785)])
def test_convex_weight_of_reversed_steps(num_steps, i, expected):
    at = points(grid64(diffusion.Cosine(), 16), i, num_steps, jumps=(0, -0.5, -1))
    np.testing.assert_allclose(first_weight(*at), expected, atol=6e-7)
    from_clean = points(grid64(diffusion.Cosine(), 16), 0, num_steps, jumps=(0, -0.5, -1))
    assert 0.9998 < first_weight(*from_clean)[0] < 1.0


@pytest.mark.parametrize(("num_steps", "expected"), [(2, 0.320115), (4, 0.388580), (8, 0.436249)])
def test_convex_weight_on_the_stable_diffusion_schedule(num_steps, expected):
    at = points(grid64(diffusion.DiscreteBetas(), 16), num_steps, num_steps)
    np.testing.assert_allclose(first_weight(*at), expected, atol=6e-7)


@each_schedule
def test_convex_weight_is_the_ratio_of_sines_below_one_half(schedule):
    grid = grid64(schedule, 128)
    at_t, at_m, at_s = (grid.at(2 * np.arange(2, 65) - k) for k in range(3))
    a = first_weight(at_t, at_m, at_s)
    assert (a > 0).all() and (a < 0.5).all()
    phi_t, phi_m, phi_s = (np.arctan2(at.sigma, at.alpha) for at in (at_t, at_m, at_s))
    sines = np.sin(phi_s) * np.sin(phi_t - phi_m) / (np.sin(phi_m) * np.sin(phi_t - phi_s))
    np.testing.assert_allclose(a, sines, rtol=1e-9)


def test_convex_weight_of_straight_paths_is_half_the_ratio_of_the_noise():
    grid = grid64(diffusion.RectifiedFlow(), 128)
    at_t, at_m, at_s = (grid.at(2 * np.arange(1, 65) - k) for k in range(3))
    np.testing.assert_allclose(first_weight(at_t, at_m, at_s), at_s.sigma / at_m.sigma / 2, rtol=1e-9)


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
    convex = two_step_target(x_1, x_2, first_weight(*at))
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
    target = two_step_target(x_1, x_2, first_weight(at_t, at_m, at_s))
    np.testing.assert_allclose(step(target, z, at_t, at_s), end_of_two, atol=2e-6)


@each_schedule
@pytest.mark.parametrize("num_steps", [1, 2, 8, 512])
def test_constant_predictor_is_a_fixed_point_of_the_target(schedule, num_steps):
    grid = diffusion.make_grid(schedule, 2 * num_steps)
    x = RNG.standard_normal((num_steps, 5)).astype(np.float32)
    i = np.arange(1, num_steps + 1)
    a = first_weight(*(grid.at(2 * i - k) for k in range(3)))
    np.testing.assert_allclose(two_step_target(x, x, a), x, rtol=1e-6)


# (6): the target of k steps


def steps_of(grid, start, num, stride=1):
    """`num` + 1 grid points [num + 1, B] from `start` [B] towards 0, or away from it for a negative stride."""
    return grid.at(start[None] - stride * np.arange(num + 1)[:, None])


@each_schedule
@pytest.mark.parametrize("k", [2, 4, 8])
def test_one_step_with_the_target_of_k_predictions_lands_where_k_steps_land(schedule, k):
    path = steps_of(grid64(schedule, 8 * k), k * np.arange(1, 9), k)
    weights, x = diffusion.convex_weights(path), RNG.standard_normal((k, 8, 16))
    assert (weights > 0).all()
    np.testing.assert_allclose(weights.sum(0), 1.0, rtol=1e-12)
    z = start = RNG.standard_normal((8, 16))

    def step(x, z, here, there):
        prediction = diffusion.to_prediction("x", x, z, here.alpha, here.sigma)
        return diffusion.ddim_step(prediction, there.alpha, there.sigma)

    for j in range(k):
        z = step(x[j], z, path.at(j), path.at(j + 1))
    target = diffusion.composite_target(x, weights)
    np.testing.assert_allclose(step(target, start, path.at(0), path.at(k)), z, atol=1e-12)


@each_schedule
@pytest.mark.parametrize(("k", "num_steps"), [(2, 512), (8, 128), (16, 64)])
def test_equal_predictions_are_a_fixed_point_of_the_target_of_k(schedule, k, num_steps):
    path = steps_of(diffusion.make_grid(schedule, k * num_steps), k * np.arange(1, num_steps + 1), k)
    x = RNG.standard_normal((num_steps, 5)).astype(np.float32)
    target = diffusion.composite_target(np.stack([x] * k), diffusion.convex_weights(path))
    assert target.dtype == np.float32
    np.testing.assert_allclose(target, x, rtol=2e-6)


def test_a_prediction_of_weight_0_is_left_out_whatever_it_is():
    x, weights = np.array([[[3.0]], [[np.nan]]]), np.array([[1.0], [-0.0]])
    np.testing.assert_array_equal(diffusion.composite_target(x, weights), [[3.0]])


# (7): the target in v, in either direction of time


def random_two_steps(grid, num_steps, direction):
    """z, v_1, v_2 [N, 16] and start, middle, end: every step of 1/N "down" to 0 or "up" from it, as two of 1/(2N)."""
    i, stride = (np.arange(1, num_steps + 1), 1) if direction == "down" else (np.arange(num_steps), -1)
    path = steps_of(grid, 2 * i, 2, stride)
    return RNG.standard_normal((3, num_steps, 16)), [path.at(j) for j in range(3)]


def step_in_v(v, z, here, there):
    prediction = diffusion.to_prediction("v", v, z, here.alpha, here.sigma)
    return diffusion.ddim_step(prediction, there.alpha, there.sigma)


each_direction = pytest.mark.parametrize("direction", ["down", "up"])


@each_schedule
@each_direction
@pytest.mark.parametrize("num_steps", [1, 2, 8, 512])
def test_one_step_with_the_target_in_v_lands_where_two_steps_land(schedule, num_steps, direction):
    (z, v_1, v_2), at = random_two_steps(grid64(schedule, 2 * num_steps), num_steps, direction)
    end_of_two = step_in_v(v_2, step_in_v(v_1, z, at[0], at[1]), at[1], at[2])
    v = diffusion.two_step_velocity(v_1, v_2, z, *at)
    np.testing.assert_allclose(step_in_v(v, z, at[0], at[2]), end_of_two, atol=1e-12)


@each_schedule
@each_direction
def test_target_in_v_is_the_convex_one(schedule, direction):
    (z, v_1, v_2), at = random_two_steps(grid64(schedule, 16), 8, direction)

    def read(v, z, at):
        return diffusion.to_prediction("v", v, z, at.alpha, at.sigma)

    x_1, x_2 = read(v_1, z, at[0]).x, read(v_2, step_in_v(v_1, z, at[0], at[1]), at[1]).x
    convex = two_step_target(x_1, x_2, first_weight(*at))
    v = diffusion.two_step_velocity(v_1, v_2, z, *at)
    np.testing.assert_allclose(read(v, z, at[0]).x, convex, atol=1e-12)
    inner = at[0].sigma > 1e-3  # x says what v is everywhere but at t = 0
    in_v = diffusion.velocity(diffusion.to_prediction("x", convex, z, at[0].alpha, at[0].sigma), *at[0][:2])
    np.testing.assert_allclose(v[inner], in_v[inner], atol=1e-12)


@each_schedule
@each_direction
@pytest.mark.parametrize("num_steps", [1, 8, 512])
def test_target_in_v_is_computed_well_in_float32(schedule, num_steps, direction):
    (z, v_1, change), exact_at = random_two_steps(grid64(schedule, 2 * num_steps), num_steps, direction)
    _, stored_at = random_two_steps(diffusion.make_grid(schedule, 2 * num_steps), num_steps, direction)
    v_2 = v_1 + 0.1 * change  # as close as velocities of one path are
    exact = diffusion.two_step_velocity(v_1, v_2, z, *exact_at)
    got = diffusion.two_step_velocity(*(value.astype(np.float32) for value in (v_1, v_2, z)), *stored_at)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, exact, atol=2e-5)


@each_schedule
@each_direction
def test_truth_is_a_fixed_point_of_the_target_in_v(schedule, direction):
    (x, eps, _), at = random_two_steps(grid64(schedule, 16), 8, direction)
    (v_1, z), (v_2, _) = (
        (diffusion.velocity(diffusion.Prediction(x, eps), *here[:2]), diffusion.diffuse(x, eps, *here[:2]))
        for here in at[:2]
    )
    np.testing.assert_allclose(diffusion.two_step_velocity(v_1, v_2, z, *at), v_1, atol=1e-12)
