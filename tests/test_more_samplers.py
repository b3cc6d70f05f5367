"""The samplers but the plain DDIM against closed forms: moments, orders of convergence, calls, noise of the image."""

import functools

import analytic
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill import diffusion, samplers
from guided_distill.guidance import classifier_free

SCHEDULES = [make() for make in diffusion.SCHEDULES.values()]
COSINE, FLOW, BETAS = SCHEDULES
INTERVALS = 512


class EqualLogsnr(diffusion.Cosine):
    """Steps of equal length in log-SNR, as theories of solvers have them."""

    def logsnr(self, t):
        return 10.0 - 20.0 * t


class Tabulated:
    """A schedule at the points of a traced grid alone: what is compiled with it serves all schedules."""

    def __init__(self, grid):
        self.grid = grid

    def _index(self, logsnr):
        return jnp.argmin(jnp.abs(self.grid.logsnr[None] - logsnr[:, None]), 1)

    def t(self, logsnr):
        return self._index(logsnr) / self.grid.num_intervals

    def logsnr(self, t):
        return self.grid.logsnr[jnp.round(t * self.grid.num_intervals).astype(int)]

    def alpha_sigma(self, logsnr):
        at = self.grid.at(self._index(logsnr))
        return at.alpha, at.sigma


def null_cond(cond):
    return {"label": jnp.ones_like(cond["label"])}


MEAN, STD = 1.0, 0.5
W = (0.0, 0.3, 1.0, 2.0, 4.0)
# The exact (mean, std) at each w, for the class N(1, .25) among classes that are N(0, 1) together (see test_samplers).
GUIDED = np.array([(1.0, 0.5), (1.15712, 0.406126), (1.38017, 0.25), (1.5, 0.125), (1.5, 0.03125)]).T
COND = {"label": np.zeros(2 * len(W), np.int32), "w": np.tile(np.float32(W), 2)}


@functools.cache
def compiled(name):
    """((grid, z [2 * len(W), 1], num_steps) -> x of the classes of GUIDED, log-SNRs of its calls, its traces)."""
    calls, traces = [], []

    @jax.jit
    def sample(grid, z, num_steps):
        traces.append(name)
        teacher = classifier_free(
            analytic.gaussian(Tabulated(grid), analytic.classes([MEAN], STD, (1 - STD**2) ** 0.5)), null_cond
        )

        def recorder(z, logsnr, cond):
            jax.debug.callback(lambda value: calls.append(np.asarray(value)), logsnr, ordered=True)
            return teacher(z, logsnr, cond)

        return samplers.SAMPLERS[name](recorder, grid, z, COND, num_steps, jax.random.split(jax.random.key(0), len(z)))

    return sample, calls, traces


def mean_and_gain(name, schedule, num_steps):
    """x = mean + gain z, of shape [2, len(W)] in the order of W, for a sampler that is linear in z."""
    z = jnp.repeat(jnp.array([[0.0], [1.0]]), len(W), 0)
    x = compiled(name)[0](diffusion.make_grid(schedule, INTERVALS), z, num_steps)
    at_zero, at_one = np.asarray(x, np.float64).reshape(2, -1)
    return np.stack([at_zero, at_one - at_zero])


def marginal(schedule, t):
    """(mean, std) of z_t for the data N(MEAN, STD^2)."""
    alpha, sigma = schedule.alpha_sigma(schedule.logsnr(np.float64(t)))
    return alpha * MEAN, np.hypot(alpha * STD, sigma)


def flow(schedule, t_from, t_to):
    """The exact flow map from one time to another, as (mean, gain)."""
    (mean_from, std_from), (mean_to, std_to) = marginal(schedule, t_from), marginal(schedule, t_to)
    return np.array([mean_to - std_to / std_from * mean_from, std_to / std_from])


def orders(errors):
    """log2 of what each error, at twice the steps of the one before, is smaller by."""
    return -np.diff(np.log2(errors), axis=0)


def root_mean_square(error):
    """Of an error mean + gain z over z ~ N(0, 1), for arrays [2, ...]."""
    return np.hypot(*error)


# Two steps forward, one step back


def test_renoising_adds_the_variance_that_was_lost():
    grid = diffusion.make_grid(COSINE, 4)
    variances = [samplers.renoise_variance(grid.at(q), grid.at(k)) for q, k in [(3, 2), (2, 1), (2, 0)]]
    np.testing.assert_allclose(variances, [0.70707468, 0.41420255, 0.5], atol=1e-6)
    for schedule in SCHEDULES:
        grid = diffusion.make_grid(schedule, 8)
        q, k = np.tril_indices(9, -1)
        alpha, sigma = (table.astype(np.float64) for table in (grid.alpha, grid.sigma))
        expected = sigma[q] ** 2 - (alpha[q] / alpha[k] * sigma[k]) ** 2
        np.testing.assert_allclose(samplers.renoise_variance(grid.at(q), grid.at(k)), expected, rtol=1e-5)


def impulses(monkeypatch, sampler, make_denoiser, most):
    """(grid, num_steps) -> (x, without z and noise; what of z and of the noise at i = 1 .. most is in x), [1 + most].

    For samplers that are linear in z and their noises: variances in closed form, where samples would have errors.
    """
    monkeypatch.setattr(samplers, "step_noise", lambda keys, i, like: jnp.where(keys == i, 1.0, 0.0)[:, None])
    row = jnp.arange(-1, most + 1)

    @jax.jit
    def sample(grid, num_steps):
        z = jnp.where(row == 0, 1.0, 0.0)[:, None]
        return sampler(make_denoiser(Tabulated(grid), num_steps), grid, z, {}, num_steps, row)

    def response(grid, num_steps):
        x = np.asarray(sample(grid, num_steps), np.float64)[:, 0]
        return x[0], x[1:] - x[0]

    return response


def moments(response, schedule):
    """(mean, std) of x for z ~ N(mean_1, std_1^2), the marginal at t = 1, and standard normal noises."""
    mean_1, std_1 = marginal(schedule, 1.0)
    at_zero, gains = response
    return np.array([at_zero + gains[0] * mean_1, np.hypot(gains[0] * std_1, np.linalg.norm(gains[1:]))])


def test_stochastic_sampling_with_the_exact_flow_map_is_exact_at_every_number_of_steps(monkeypatch):
    def make_student(schedule, num_steps):
        return analytic.exact_stochastic_student(schedule, analytic.constant(MEAN, STD), num_steps)

    response = impulses(monkeypatch, samplers.stochastic, make_student, most=16)
    for schedule in SCHEDULES:
        for num_steps in (1, 2, 4, 8, 16):
            x = response(diffusion.make_grid(schedule, 16), num_steps)
            assert moments(x, schedule) == pytest.approx([MEAN, STD], abs=1e-4), (schedule, num_steps)
            # N - 1 times noise was added: after the evaluations at i = N .. 2.
            np.testing.assert_array_equal(np.flatnonzero(x[1][1:]) + 1, np.arange(2, num_steps + 1))


def test_renoising_with_the_exact_end_of_the_flow_is_exact_at_every_number_of_steps(monkeypatch):
    def make_student(schedule, num_steps):
        return analytic.flow_student(schedule, analytic.constant(MEAN, STD), jnp.zeros_like)

    response = impulses(monkeypatch, samplers.renoising, make_student, most=16)
    for schedule in SCHEDULES:
        for num_steps in (1, 2, 4, 8, 16):
            x = response(diffusion.make_grid(schedule, 16), num_steps)
            assert moments(x, schedule) == pytest.approx([MEAN, STD], abs=1e-4), (schedule, num_steps)
            # As often as there is a step to come: after the evaluations at i = N .. 2.
            np.testing.assert_array_equal(np.flatnonzero(x[1][1:]) + 1, np.arange(2, num_steps + 1))


def test_renoising_in_one_step_is_one_evaluation():
    denoiser = analytic.gaussian(COSINE, analytic.constant(MEAN, STD))
    grid = jax.tree.map(jnp.asarray, diffusion.make_grid(COSINE, 16))
    z, keys = jnp.linspace(-2.0, 2.0, 8)[:, None], jax.random.split(jax.random.key(0), 8)
    expected = denoiser(z, jnp.full(8, grid.logsnr[16]), {}).x
    np.testing.assert_array_equal(samplers.renoising(denoiser, grid, z, {}, 1, keys), expected)


def test_ancestral_sampling_keeps_the_mean_and_tends_to_the_std_in_first_order(monkeypatch):
    def make_denoiser(schedule, num_steps):
        return analytic.gaussian(schedule, analytic.constant(MEAN, STD))

    response = impulses(monkeypatch, samplers.ancestral, make_denoiser, most=128)
    for schedule, low in zip(SCHEDULES, (0.9, 0.9, 0.7), strict=True):
        grid = diffusion.make_grid(schedule, 128)
        mean, std = np.array([moments(response(grid, n), schedule) for n in (64, 128)]).T
        np.testing.assert_allclose(mean, MEAN, atol=1e-5)
        assert low < orders(STD - std).item() < 1.05, (schedule, std)

        # N = 2: noise is added once, on the way from t = 1 to s = 1/2, and then shrinks into x_hat.
        grid = jax.tree.map(np.float64, grid)
        at_t, at_s, (_, spread) = grid.at(128), grid.at(64), marginal(schedule, 0.5)
        most = at_t.sigma**2 - (at_t.alpha / at_s.alpha * at_s.sigma) ** 2
        least = most * (at_s.sigma / at_t.sigma) ** 2
        shrink = at_s.alpha * STD**2 / spread**2
        assert response(grid, 2)[1][2] == pytest.approx(shrink * least**0.35 * most**0.15, rel=1e-4)


# Orders of convergence


@pytest.mark.parametrize(
    ("name", "num_steps", "low", "high"),
    [
        ("deterministic", (32, 64, 128), 0.9, 1.1),
        ("heun", (16, 32, 64), 1.9, 2.2),
        # The last steps of this grid halve t whatever N is, which costs a factor of log N.
        ("dpm_solver_pp_2m", (64, 128, 256), 1.4, 2.0),
    ],
)
def test_order_on_the_guided_gaussian(name, num_steps, low, high):
    errors = root_mean_square(np.stack([mean_and_gain(name, COSINE, n) - GUIDED for n in num_steps], 1))
    assert (orders(errors) > low).all() and (orders(errors) < high).all(), orders(errors)


@pytest.mark.parametrize("name", ["dpm_solver_pp_2m", "heun"])
def test_second_order_pays_on_the_guided_gaussian(name):
    for num_steps, ratio in ((16, 0.4), (64, 0.3)):
        first, second = (mean_and_gain(each, COSINE, num_steps) - GUIDED for each in ("deterministic", name))
        assert (root_mean_square(second) < ratio * root_mean_square(first)).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (COSINE, {"deterministic": (0.9, 1.1), "dpm_solver_pp_2m": (1.5, 1.8), "heun": (1.9, 2.1)}),
        (FLOW, {"deterministic": (0.9, 1.1), "dpm_solver_pp_2m": (1.6, 1.9), "heun": (1.9, 2.1)}),
        (BETAS, {"deterministic": (0.6, 1.0), "dpm_solver_pp_2m": (0.6, 1.0), "heun": (1.6, 2.0)}),
        (EqualLogsnr(), {"deterministic": (0.9, 1.1), "dpm_solver_pp_2m": (1.9, 2.1), "heun": (1.9, 2.1)}),
    ],
    ids=[*diffusion.SCHEDULES, "equal_logsnr"],
)
def test_order_of_the_path_from_t_1_to_the_last_evaluation(schedule, expected):
    """On discrete betas sigma grows as the root of t: in it, the steps near the data are long whatever N is."""
    for name, (low, high) in expected.items():
        errors = []
        for num_steps in (32, 64, 128) if name == "heun" else (64, 128, 256):
            t = 1.0 / num_steps
            (mean, std), (mean_z, gain_z) = marginal(schedule, t), flow(schedule, 1.0, t)
            alpha, _ = schedule.alpha_sigma(schedule.logsnr(np.float64(t)))
            shrink = alpha * STD**2 / std**2
            exact = [MEAN + shrink * (mean_z - mean), shrink * gain_z]
            errors.append(root_mean_square(mean_and_gain(name, schedule, num_steps)[:, 0] - exact))
        assert (orders(errors) > low).all() and (orders(errors) < high).all(), (name, errors, orders(errors))


# Encoding


def test_encoding_with_the_exact_flow_map_is_exact_at_every_number_of_steps():
    @jax.jit
    def sample(grid, num_steps):
        encoder = analytic.exact_encoder(Tabulated(grid), analytic.constant(MEAN, STD), num_steps)
        return samplers.encode(encoder, grid, jnp.array([[0.0], [1.0]]), {}, num_steps)[:, 0]

    for schedule in SCHEDULES:
        for num_steps in (1, 2, 4, 8, 16):
            at_zero, at_one = np.asarray(sample(diffusion.make_grid(schedule, 16), num_steps))
            assert (at_zero, at_one - at_zero) == pytest.approx(tuple(flow(schedule, 0.0, 1.0)), rel=1e-3), schedule


@pytest.mark.parametrize(
    ("schedule", "least", "at_most"),
    [(COSINE, 0.95, 0.01), (FLOW, 0.95, 0.01), (BETAS, 0.75, 0.03)],
    ids=[*diffusion.SCHEDULES],
)
def test_encoding_inverts_sampling_in_first_order(schedule, least, at_most):
    encoding, round_trip = [], []
    for num_steps in (64, 128, 256, 512):
        encoded = mean_and_gain("encode", schedule, num_steps)[:, 0]
        decoded = mean_and_gain("deterministic", schedule, num_steps)[:, 0]
        encoding.append(encoded - flow(schedule, 0.0, 1.0))
        round_trip.append([decoded[0] + decoded[1] * encoded[0], decoded[1] * encoded[1]] - np.array([0.0, 1.0]))
    for errors in (encoding, round_trip):
        size = root_mean_square(np.array(errors).T)
        assert size[-1] < at_most and (orders(size) > least).all() and (orders(size) < 1.05).all(), size
    # The data, encoded, has the moments of z at t = 1: (0, 1), up to what is left of the data there.
    of_data = (encoded[0] + encoded[1] * MEAN, encoded[1] * STD)
    assert of_data == pytest.approx(marginal(schedule, 1.0), abs=at_most)


# Calls


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_calls_and_their_times_in_one_compilation(name):
    sample, calls, traces = compiled(name)
    for schedule in SCHEDULES:
        grid = diffusion.make_grid(schedule, INTERVALS)
        for num_steps in (1, 2, 4, 8):
            calls.clear()
            jax.block_until_ready(sample(grid, np.ones((2 * len(W), 1), np.float32), num_steps))
            jax.effects_barrier()
            i = {
                "heun": np.repeat(np.arange(num_steps, 0, -1), 2)[1:],
                "encode": np.arange(num_steps),
            }.get(name, np.arange(num_steps, 0, -1))
            expected = grid.logsnr[i * (INTERVALS // num_steps)]
            np.testing.assert_array_equal(calls, np.repeat(expected[:, None], 2 * len(W), 1))
            assert len(calls) == samplers.network_calls(name, num_steps)
    assert len(traces) == 1


# Clipping and noise


def make_sample(names):
    """(image indices, clip) -> {name: x} in four steps, for data N(.5, .25)."""
    denoiser = analytic.gaussian(COSINE, analytic.constant(0.5, 0.5))
    grid = jax.tree.map(jnp.asarray, diffusion.make_grid(COSINE, 4))
    keys, z = jax.random.split(jax.random.key(0), 8), np.linspace(-2.0, 2.0, 24, dtype=np.float32).reshape(8, 3)

    @jax.jit
    def sample(keys, z, clip):
        return {name: samplers.SAMPLERS[name](denoiser, grid, z, {}, 4, keys, clip=clip) for name in names}

    return lambda index, clip=None: jax.tree.map(np.asarray, sample(keys[np.array(index)], z[np.array(index)], clip))


def test_all_but_the_encoder_clip():
    sample = make_sample(samplers.SAMPLERS)
    bounded, free = sample(range(8), 0.5), sample(range(8), 100.0)
    for name in samplers.SAMPLERS:
        assert abs(free[name]).max() > 0.6
        if name == "encode":
            np.testing.assert_array_equal(bounded[name], free[name])
        else:
            assert abs(bounded[name]).max() <= 0.5 and len(np.unique(bounded[name])) > 5


def test_image_k_has_the_same_bits_in_any_batch():
    sample = make_sample(samplers.DRAWS_NOISE)
    together = sample(range(8))
    for index in ([5], [3, 7, 0, 2, 1, 6, 5, 4]):
        for name, x in sample(index).items():
            np.testing.assert_array_equal(x, together[name][index], err_msg=name)


def test_noise_of_a_step_is_standard_normal_and_unlike_that_of_other_steps_and_the_initial_one():
    @jax.jit
    def drawn(seed):
        keys = jax.random.split(jax.random.key(seed), 500)
        initial = samplers.initial_noise(keys, (4, 4))
        return jnp.stack([initial, *(samplers.step_noise(keys, i, initial) for i in (1, 2, 8))])

    noise = np.asarray(drawn(0)).reshape(4, -1)
    np.testing.assert_allclose([noise.mean(1), noise.std(1)], [[0.0] * 4, [1.0] * 4], atol=0.04)
    assert abs(np.corrcoef(noise) - np.eye(4)).max() < 0.05
    assert len(np.unique(noise)) > 0.99 * noise.size
