"""What each objective learns: zero loss for the exact answer, and draws that belong to the example."""

import dataclasses
import functools

import analytic
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill import diffusion
from guided_distill.guidance import classifier_free
from guided_distill.objectives import (
    Knobs,
    draws,
    make_consistency,
    make_denoise,
    make_encode,
    make_stage1,
    make_stage2,
    make_tract,
    make_two_student,
)

COSINE = diffusion.Cosine()
SCHEDULES = [make() for make in diffusion.SCHEDULES.values()]
NULL = 3
MOMENTS = analytic.classes([-1.0, 0.5, 1.0], 0.5, 1.0)
SNR_WEIGHT = {
    "constant": lambda snr: np.ones_like(snr),
    "snr": lambda snr: snr,
    "snr_trunc": lambda snr: np.maximum(snr, 1.0),
    "v_mse": lambda snr: snr + 1.0,
}


def null_cond(cond):
    return {"label": jnp.full_like(cond["label"], NULL)}


B = 512


def make_keys(num=B):
    return jax.random.split(jax.random.key(0), num)


def make_batch(num=B):
    x = jax.random.uniform(jax.random.key(1), (num, 3), minval=-1.0)
    return {"x": x, "label": jnp.arange(num) % NULL}


def make_knobs(schedule=COSINE, num_steps=4, w_min=0.0, w_max=4.0):
    grid = diffusion.make_grid(schedule, 16)
    return Knobs(np.int32(num_steps), np.int32(100), np.float32(1e-3), np.float32(w_min), np.float32(w_max), grid)


def make_knobs_on_device():
    """Knobs to close over: a traced index cannot enter a NumPy table."""
    return jax.tree.map(jnp.asarray, make_knobs())


class Recorder:
    """A denoiser that notes what each executed call was given; in the trace, whether it was given a dropout key."""

    def __init__(self, denoiser):
        self.denoiser, self.calls, self.with_dropout = denoiser, [], []

    def __call__(self, z, logsnr, cond, *, dropout_key=None):
        self.with_dropout.append(dropout_key is not None)
        jax.debug.callback(lambda *given: self.calls.append(given), z, logsnr, cond, ordered=True)
        return self.denoiser(z, logsnr, cond)


@functools.cache
def recording(objective):
    apply = {name: Recorder(analytic.gaussian(COSINE, MOMENTS)) for name in ("student", "teacher")}
    return apply, jax.jit(lambda batch, knobs, keys: objective(apply, COSINE, batch, knobs, keys)[0])


def record(objective, **knobs):
    """Calls of the student and of the teacher for one batch of B: lists of (z, logsnr, cond)."""
    apply, compiled = recording(objective)
    for recorder in apply.values():
        recorder.calls.clear()
    jax.block_until_ready(compiled(make_batch(), make_knobs(**knobs), make_keys()))
    jax.effects_barrier()
    return tuple(jax.tree.map(np.asarray, apply[name].calls) for name in ("student", "teacher"))


def denoise(**options):
    return make_denoise(**{"weighting": "v_mse", "null_cond": null_cond, "cond_dropout": 0.1} | options)


OBJECTIVES = {
    "denoise": denoise(),
    "stage1": make_stage1(weighting="snr_trunc"),
    "stage2": make_stage2(weighting="snr_trunc"),
    "landing": make_stage2(weighting="landing"),
    "stochastic": make_stage2(weighting="snr_trunc", series="sto"),
    "encode": make_encode(weighting="snr_trunc"),
    "two_student": make_two_student(weighting="snr_trunc", null_cond=null_cond),
    "tract": make_tract(weighting="snr_trunc", group=2),
    "consistency": make_consistency(weighting="snr_trunc", num_times=8),
}


# All of them


def test_loss_of_an_example_depends_on_its_own_key_and_data_alone():
    teacher = classifier_free(analytic.gaussian(COSINE, MOMENTS), null_cond)
    apply = {"student": analytic.gaussian(COSINE, analytic.constant(0.3, 0.4)), "teacher": teacher}
    apply["target_ema"] = analytic.gaussian(COSINE, analytic.constant(0.2, 0.4))

    @jax.jit
    def losses(batch, keys):
        knobs = make_knobs_on_device()
        return {name: objective(apply, COSINE, batch, knobs, keys)[0] for name, objective in OBJECTIVES.items()}

    batch, keys, order = make_batch(8), make_keys(8), np.array([6, 1, 3, 3, 3, 0, 0, 6])
    one = losses(batch, keys)
    other = losses(jax.tree.map(lambda v: v[order], batch), keys[order])
    for name, loss in one.items():
        assert loss.shape == (8,) and len(np.unique(loss)) == 8, name
        np.testing.assert_allclose(other[name], loss[order], rtol=1e-4, err_msg=name)


NUM_STEPS = 4
# Times that an objective draws from, in units of 1/N; the others draw from all of [0, 1].
DISCRETE_TIMES = {
    "stage2": np.arange(1, NUM_STEPS + 1),
    "landing": np.arange(1, NUM_STEPS + 1),
    "stochastic": np.arange(1, NUM_STEPS + 1),
    "two_student": np.arange(1, NUM_STEPS + 1),
    "encode": np.arange(NUM_STEPS),
    "tract": np.arange(1, 2 * NUM_STEPS + 1) / 2,
    "consistency": np.arange(1, 9) / 8 * NUM_STEPS,
}


@functools.cache
def told(schedule):
    """{name of the objective: what its student is given for one batch of B: (z, logsnr, cond)}."""
    network = analytic.gaussian(schedule, MOMENTS)

    @jax.jit
    def calls_of_students(batch, knobs, keys):
        calls = {}
        for name, objective in OBJECTIVES.items():

            def student(*given, name=name, dropout_key=None):
                calls[name] = given
                return network(*given)

            objective({"student": student, "teacher": network, "target_ema": network}, schedule, batch, knobs, keys)
        return calls

    calls = calls_of_students(make_batch(), make_knobs(schedule, NUM_STEPS, w_min=0.5, w_max=2.0), make_keys())
    assert calls.keys() == OBJECTIVES.keys()
    return jax.tree.map(np.asarray, calls)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_z_is_a_sample_of_q_at_the_time_the_network_is_told(schedule):
    for name, (z, logsnr, _) in told(schedule).items():
        alpha, sigma = schedule.alpha_sigma(logsnr)
        x = np.repeat(make_batch()["x"], len(z) // B, axis=0)  # of two students, z is there twice, side by side
        eps = (z - alpha[:, None] * x) / sigma[:, None]
        eps = eps[schedule.t(logsnr) > 0.1]  # before that, rounding is divided by a small sigma
        assert abs(eps.mean()) < 0.1 and abs(eps.std() - 1) < 0.1, name


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_times_are_drawn_from_all_that_the_sampler_visits(schedule):
    for name, times in DISCRETE_TIMES.items():
        _, logsnr, _ = told(schedule)[name]
        steps = schedule.t(logsnr) * NUM_STEPS
        drawn = np.abs(steps[:, None] - times).argmin(1)
        np.testing.assert_allclose(steps, times[drawn], atol=1e-4, err_msg=name)
        evenly = 0.5 if name == "landing" else 1.0
        assert np.bincount(drawn, minlength=len(times)).min() > 0.6 * evenly * len(steps) / len(times), name


def test_w_is_drawn_per_example_by_every_objective_that_has_one():
    for name in OBJECTIVES.keys() - {"denoise", "two_student"}:
        w = told(COSINE)[name][2]["w"]
        assert len(np.unique(w)) > 0.99 * B and w.min() >= 0.5 and w.max() <= 2.0, name


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_w_is_drawn_per_example_from_its_range_and_all_networks_get_the_same_condition(name):
    student, teacher = record(OBJECTIVES[name], w_min=0.5, w_max=2.0)
    w = student[0][2]["w"]
    assert len(np.unique(w)) > 0.99 * B and w.min() >= 0.5 and w.max() <= 2.0
    assert w.mean() == pytest.approx(1.25, abs=0.1) and w.max() > 1.95 and w.min() < 0.55
    for _, _, cond in student + teacher:
        np.testing.assert_array_equal(cond["w"], w)
        np.testing.assert_array_equal(cond["label"], make_batch()["label"])
    apply, _ = recording(OBJECTIVES[name])
    assert not any(apply["student"].with_dropout + apply["teacher"].with_dropout)


def test_gradients_reach_the_student_and_no_other_network():
    def total(means, objective):
        apply = {
            name: analytic.gaussian(COSINE, lambda cond, mean=mean: (mean, jnp.float32(0.4)))
            for name, mean in means.items()
        }
        return objective(apply, COSINE, make_batch(8), make_knobs_on_device(), make_keys(8))[0].sum()

    @jax.jit
    def gradients(means):
        return {name: jax.grad(total)(means, objective) for name, objective in OBJECTIVES.items()}

    means = {"student": 0.2, "teacher": 0.1, "target_ema": 0.3}
    for name, gradient in gradients(jax.tree.map(jnp.float32, means)).items():
        assert gradient["teacher"] == 0.0 and gradient["target_ema"] == 0.0 and abs(gradient["student"]) > 1e-3, name


@pytest.mark.parametrize("make", [denoise, make_stage1, make_stage2, make_encode])
def test_weighting_is_a_function_of_the_snr_times_the_error_of_x(make):
    batch, told = make_batch(64), []

    def as_prediction(x, z, logsnr):
        return diffusion.to_prediction("x", x, z, *COSINE.alpha_sigma(logsnr))

    def student(z, logsnr, cond, **options):
        """Wrong by one in every pixel: of the data where they are the target, of the teacher's zeros elsewhere."""
        told.append(logsnr)
        return as_prediction((batch["x"] if make is denoise else jnp.zeros_like(z)) + 1.0, z, logsnr)

    apply = {"student": student, "teacher": lambda z, logsnr, cond: as_prediction(jnp.zeros_like(z), z, logsnr)}

    @jax.jit
    def losses(keys):
        told.clear()
        every = [
            make(weighting=name)(apply, COSINE, batch, make_knobs_on_device(), keys)[0] for name in diffusion.WEIGHTINGS
        ]
        return every, told

    every, logsnr = losses(make_keys(64))
    for name, loss, at in zip(diffusion.WEIGHTINGS, every, logsnr, strict=True):
        np.testing.assert_allclose(loss, SNR_WEIGHT[name](np.exp(np.asarray(at))), rtol=2e-2)


def times(objective):
    ((_, logsnr, _),), _ = record(objective)
    return COSINE.t(logsnr)


@pytest.mark.parametrize("name", ["denoise", "stage1"])
def test_continuous_times_are_uniform(name):
    counts, _ = np.histogram(times(OBJECTIVES[name]), bins=5, range=(0.0, 1.0))
    assert counts.sum() == B and counts.min() > 0.7 * B / 5


@pytest.mark.parametrize("make", [denoise, make_stage1])
def test_times_of_a_discrete_teacher_are_the_multiples_but_zero(make):
    steps = times(make(weighting="v_mse", num_times=5)) * 5
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    counts = np.bincount(np.round(steps).astype(int), minlength=6)
    assert len(counts) == 6 and counts[0] == 0 and counts[1:].min() > 0.7 * B / 5


# Denoising


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0.0, 0.0), (0.1, 0.06, 0.14), (1.0, 1.0, 1.0)])
def test_labels_are_dropped_at_the_given_rate_and_otherwise_kept(rate, low, high):
    ((_, _, cond),), _ = record(denoise(cond_dropout=rate))
    dropped = cond["label"] == NULL
    assert low <= dropped.mean() <= high
    np.testing.assert_array_equal(cond["label"][~dropped], make_batch()["label"][~dropped])


def test_dropout_of_the_network_is_on():
    apply, compiled = recording(denoise())
    compiled.lower(make_batch(), make_knobs(), make_keys())
    assert apply["student"].with_dropout == [True]


def test_denoising_loss_is_least_for_the_posterior_mean():
    best = analytic.gaussian(COSINE, analytic.constant(0.2, 0.5))
    x = 0.2 + 0.5 * jax.random.normal(jax.random.key(2), (4000, 3))
    batch, objective = {"x": x, "label": jnp.zeros(4000, jnp.int32)}, denoise(weighting="constant")

    @jax.jit
    def loss(scale, shift):
        def student(z, logsnr, cond, *, dropout_key=None):
            x_hat = scale * best(z, logsnr, cond).x + shift
            return diffusion.to_prediction("x", x_hat, z, *COSINE.alpha_sigma(logsnr))

        return objective({"student": student}, COSINE, batch, None, make_keys(4000))[0].mean()

    assert loss(1.0, 0.0) < min(loss(1.0, 0.1), loss(1.0, -0.1), loss(0.9, 0.0), loss(1.1, 0.0))


# Stage one


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_stage_one_is_zero_for_the_guided_teacher_and_only_for_it(schedule):
    conditional = analytic.gaussian(schedule, MOMENTS)
    guided = classifier_free(conditional, null_cond)

    @jax.jit
    def losses(batch, knobs, keys):
        return [
            OBJECTIVES["stage1"]({"student": student, "teacher": guided}, schedule, batch, knobs, keys)[0]
            for student in (guided, conditional)
        ]

    zero, unguided = losses(make_batch(), make_knobs(schedule), make_keys())
    assert float(zero.max()) < 1e-8 and float(unguided.mean()) > 1e-3


# Stage two: more of it in test_stage2


def test_the_teacher_of_stage_two_works_at_the_same_time_and_half_a_step_on():
    for num_steps in (1, 4, 8):
        student, teacher = record(OBJECTIVES["stage2"], num_steps=num_steps)
        t, t_1, t_2 = (COSINE.t(logsnr) for _, logsnr, _ in (*student, *teacher))
        np.testing.assert_allclose(t_1, t, atol=1e-6)
        np.testing.assert_allclose(t_2, t - 0.5 / num_steps, atol=1e-4)


def test_second_prediction_is_made_where_the_first_ddim_step_lands():
    _, ((z, logsnr_t, cond), (z_m, logsnr_m, _)) = record(OBJECTIVES["stage2"])
    first = analytic.gaussian(COSINE, MOMENTS)(*jax.tree.map(jnp.asarray, (z, logsnr_t, cond)))
    np.testing.assert_allclose(z_m, diffusion.ddim_step(first, *COSINE.alpha_sigma(jnp.asarray(logsnr_m))), atol=1e-4)


# Draws


def test_draws_of_one_key_are_independent_and_belong_to_the_key():
    @jax.jit
    def drawn(keys):
        uniform = [draws.uniform(lot, 2.0, 3.0) for lot in draws.split_examples(keys, 2)]
        return *uniform, draws.randint(keys, 1, 4), draws.normal_like(keys, jnp.zeros((len(keys), 2, 2)))

    keys = make_keys()
    first, second, integers, normal = map(np.asarray, drawn(keys))
    assert first.min() >= 2.0 and first.max() < 3.0 and len(np.unique(first)) > 0.99 * B
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15
    assert set(integers) == {1, 2, 3}
    for part, whole in zip(drawn(keys[7:9]), (first, second, integers, normal), strict=True):
        np.testing.assert_array_equal(part, whole[7:9])


def test_a_margin_gives_both_ends_their_share_and_leaves_the_rest_uniform():
    knobs = dataclasses.replace(make_knobs(w_min=1.0, w_max=3.0), w_margin=np.float32(0.5))
    w = np.asarray(jax.jit(draws.strengths)(make_keys(), knobs))
    low, high, inside = w == 1.0, w == 3.0, (w > 1.0) & (w < 3.0)
    assert (low | high | inside).all()
    # A third of all draws falls outside, half of it at each end.
    assert abs(low.mean() - 1 / 6) < 0.06 and abs(high.mean() - 1 / 6) < 0.06
    counts, _ = np.histogram(w[inside], bins=4, range=(1.0, 3.0))
    assert counts.min() > 0.7 * inside.sum() / 4
