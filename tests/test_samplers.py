"""Deterministic sampling against closed forms, its network calls, and noise that belongs to the image."""

import analytic
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill import diffusion, samplers
from guided_distill.guidance import classifier_free

COSINE = diffusion.Cosine()
SCHEDULES = [make() for make in diffusion.SCHEDULES.values()]


def jax_grid(schedule, num_intervals):
    return jax.tree.map(jnp.asarray, diffusion.make_grid(schedule, num_intervals))


def mean_and_std(sample, batch=1):
    """Moments over z ~ N(0, 1) of a sampler that is linear in z: x = mean + std z."""
    at_zero, at_one = sample(jnp.repeat(jnp.array([[0.0], [1.0]]), batch, 0)).reshape(2, batch)
    return at_zero, at_one - at_zero


# The exact flow map and the bias of DDIM


@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=str)
def test_exact_flow_map_samples_exactly_at_every_number_of_steps(schedule):
    @jax.jit
    def sample(grid, z, num_steps):
        student = analytic.exact_student(schedule, analytic.constant(0.5, 0.2), num_steps)
        return samplers.deterministic(student, grid, z, {}, num_steps)

    for num_steps in (1, 2, 4, 8, 16):
        mean, std = mean_and_std(lambda z, n=num_steps: sample(diffusion.make_grid(schedule, 16), z, n))
        assert (mean.item(), std.item()) == pytest.approx((0.5, 0.2), abs=1e-4), num_steps


def test_ddim_std_of_a_gaussian():
    denoiser = analytic.gaussian(COSINE, analytic.constant(0.5, 0.2))
    grid = jax_grid(COSINE, 1024)
    sample = jax.jit(lambda z, num_steps: samplers.deterministic(denoiser, grid, z, {}, num_steps))
    table = {2: 0.03846, 4: 0.08336, 8: 0.13083, 16: 0.16314, 64: 0.19021, 256: 0.19751, 1024: 0.19937}
    for num_steps, expected in table.items():
        mean, std = mean_and_std(lambda z, n=num_steps: sample(z, n))
        assert (mean.item(), std.item()) == pytest.approx((0.5, expected), abs=2e-5), num_steps


def test_perfect_halving_keeps_the_moments_of_its_teacher():
    teacher = analytic.gaussian(COSINE, analytic.constant(0.5, 0.2))
    for num_steps in (4, 2, 1):
        teacher = analytic.two_step_student(COSINE, teacher, num_steps)
        grid = jax_grid(COSINE, num_steps)
        mean, std = mean_and_std(
            jax.jit(lambda z, n=num_steps, d=teacher, g=grid: samplers.deterministic(d, g, z, {}, n))
        )
        assert (mean.item(), std.item()) == pytest.approx((0.5, 0.13083), abs=1e-4)


GUIDED = {  # w -> exact (mean, std), then DDIM at N = 1024, 64, 16, for classes N(1, .25), all of them N(0, 1)
    0.0: [(1.0, 0.5), (0.99998, 0.49925), (0.99998, 0.48809), (0.99998, 0.45393)],
    0.3: [(1.15712, 0.406126), (1.15709, 0.40543), (1.15703, 0.39512), (1.15686, 0.36351)],
    1.0: [(1.38017, 0.25), (1.38005, 0.24940), (1.37861, 0.24047), (1.37387, 0.21298)],
    2.0: [(1.5, 0.125), (1.49963, 0.12451), (1.49430, 0.11726), (1.47626, 0.09499)],
    4.0: [(1.5, 0.03125), (1.49919, 0.03098), (1.48714, 0.02700), (1.44738, 0.01567)],
}


def test_guided_gaussian_follows_its_table_and_tends_to_the_exact_flow():
    w = jnp.array([*GUIDED, *GUIDED])
    cond = {"label": jnp.zeros(len(w), jnp.int32), "w": w}
    moments = analytic.classes([1.0], 0.5, 0.75**0.5)
    teacher = classifier_free(analytic.gaussian(COSINE, moments), lambda cond: {"label": jnp.ones_like(cond["label"])})
    grid = jax_grid(COSINE, 1024)
    sample = jax.jit(lambda z, num_steps: samplers.deterministic(teacher, grid, z, cond, num_steps))
    exact = np.array([row[0] for row in GUIDED.values()]).T
    np.testing.assert_allclose(exact[1], 0.5 ** (1 + np.array([*GUIDED])), atol=1e-6)
    for column, num_steps in enumerate([1024, 64, 16], 1):
        got = np.stack(mean_and_std(lambda z, n=num_steps: sample(z, n), batch=len(GUIDED)))
        np.testing.assert_allclose(got, np.array([row[column] for row in GUIDED.values()]).T, atol=4e-5)
        assert np.abs(got - exact).max() < 1.0 / num_steps


# Network calls


def recorded(denoiser, calls):
    """Notes the log-SNR of every call that is executed, inside a compiled program too."""

    def recorder(z, logsnr, cond):
        jax.debug.callback(lambda value: calls.append(np.asarray(value)), logsnr, ordered=True)
        return denoiser(z, logsnr, cond)

    return recorder


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_n_steps_are_n_calls_at_the_times_i_over_n_and_one_compilation(schedule):
    calls, traces = [], []
    denoiser = recorded(analytic.gaussian(schedule, analytic.constant(0.0, 1.0)), calls)

    @jax.jit
    def sample(grid, z, num_steps):
        traces.append(num_steps)
        return samplers.deterministic(denoiser, grid, z, {}, num_steps)

    for num_steps in (1, 2, 4, 8):
        calls.clear()
        jax.block_until_ready(sample(diffusion.make_grid(schedule, 8), jnp.ones((2, 3)), num_steps))
        jax.effects_barrier()
        assert np.shape(calls) == (num_steps, 2)
        expected = schedule.logsnr(np.arange(num_steps, 0, -1) / num_steps)
        np.testing.assert_allclose(calls, np.stack([expected, expected], 1), rtol=1e-6, atol=1e-6)
    assert len(traces) == 1


def test_guided_teacher_costs_one_call_of_twice_the_batch_per_step():
    calls = []
    moments = analytic.classes([1.0], 0.5, 1.0)
    teacher = classifier_free(
        recorded(analytic.gaussian(COSINE, moments), calls), lambda cond: {"label": jnp.ones_like(cond["label"])}
    )
    cond = {"label": jnp.zeros(3, jnp.int32), "w": jnp.ones(3)}
    jax.block_until_ready(samplers.deterministic(teacher, jax_grid(COSINE, 4), jnp.ones((3, 2)), cond, 4))
    jax.effects_barrier()
    assert np.shape(calls) == (4, 6)


# Clipping


def test_clip_keeps_every_prediction_in_bounds_and_moves_on_from_the_clipped_one():
    bound = 0.4
    denoiser = analytic.gaussian(COSINE, analytic.constant(0.9, 0.1))
    grid = jax_grid(COSINE, 4)
    z = samplers.initial_noise(samplers.image_keys(0, jnp.arange(64)), (2,))
    sample = jax.jit(lambda z, clip: samplers.deterministic(denoiser, grid, z, {}, 4, clip=clip))
    unclipped = jax.jit(lambda z: samplers.deterministic(denoiser, grid, z, {}, 4))(z)
    assert float(unclipped.min()) > bound
    np.testing.assert_allclose(sample(z, bound), bound, atol=1e-7)
    np.testing.assert_allclose(sample(z, 100.0), unclipped, atol=1e-5)

    clipped = jax.jit(lambda z: samplers.predict(denoiser, z, grid.at(3), {}, bound))(z)
    np.testing.assert_allclose(clipped.x, bound, atol=1e-7)
    np.testing.assert_allclose(diffusion.diffuse(*clipped, grid.alpha[3], grid.sigma[3]), z, atol=1e-6)


# Noise and labels

DRAWS = {
    "noise": jax.jit(lambda seed, k: samplers.initial_noise(samplers.image_keys(seed, k), (4, 4, 1))),
    "label": jax.jit(lambda seed, k: samplers.random_labels(samplers.image_keys(seed, k), 10)),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_image_k_has_the_same_bits_in_any_batch(draw):
    def drawn(indices):
        return np.asarray(DRAWS[draw](3, jnp.asarray(indices)))

    together = drawn(range(16))
    np.testing.assert_array_equal(drawn([5]), together[5:6])
    np.testing.assert_array_equal(drawn([15, 0, 7]), together[[15, 0, 7]])
    np.testing.assert_array_equal(np.concatenate([drawn(range(k, k + 4)) for k in range(0, 16, 4)]), together)


def test_noise_is_standard_normal_and_differs_between_images_and_seeds():
    z, other = (np.asarray(DRAWS["noise"](seed, jnp.arange(500))) for seed in (0, 1))
    assert z.shape == (500, 4, 4, 1)
    assert abs(z.mean()) < 0.04 and abs(z.std() - 1) < 0.04
    assert len(np.unique(z)) > 0.99 * z.size
    assert abs(np.corrcoef(z.ravel(), other.ravel())[0, 1]) < 0.05


def test_prior_std_scales_the_noise():
    keys = samplers.image_keys(0, jnp.arange(2))
    np.testing.assert_allclose(samplers.initial_noise(keys, (3,), 3.0), 3 * samplers.initial_noise(keys, (3,)))


def test_labels_are_uniform_over_the_classes():
    labels = np.asarray(DRAWS["label"](0, jnp.arange(2000)))
    counts = np.bincount(labels, minlength=10)
    assert labels.dtype == np.int32 and len(counts) == 10 and counts.min() > 140 and counts.max() < 260
