"""What the series of stage two teach, from halving to consistency: exact students, and teachers one can read."""

import functools

import analytic
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import COSINE, MOMENTS, NULL, OBJECTIVES, SCHEDULES, make_batch, make_knobs, null_cond

from guided_distill import diffusion, samplers
from guided_distill.guidance import Teacher, classifier_free, clipped
from guided_distill.objectives import (
    draws,
    make_consistency,
    make_encode,
    make_stage1,
    make_stage2,
    make_tract,
    make_two_student,
)

B, GROUP = 64, 4
KEYS = np.arange(B)
FLOW = diffusion.RectifiedFlow()  # where alpha^2 + sigma^2 is not 1


@pytest.fixture(autouse=True)
def arithmetic_draws(monkeypatch):
    """Every time there is, and some w and eps; test_objectives has the real draws, which take longest to compile."""
    monkeypatch.setattr(draws, "split_examples", lambda keys, num: [keys + lot for lot in range(num)])
    monkeypatch.setattr(draws, "randint", lambda keys, low, high: low + keys % (high - low))
    monkeypatch.setattr(draws, "uniform", lambda keys, low=0.0, high=1.0: low + (high - low) * (0.618 * keys % 1.0))
    monkeypatch.setattr(
        draws, "normal_like", lambda keys, x: 1.5 * jnp.sin(keys[:, None] + jnp.arange(x.shape[1])[None])
    )


def group_start(num_steps):
    """t -> start of the group of TRACT that t = j / (GROUP N) lies in, j = 1 .. GROUP N."""
    num_times = GROUP * num_steps

    def start(t):
        return jnp.maximum(jnp.floor((jnp.round(t * num_times) - 1) / GROUP), 0) * GROUP / num_times

    return start


def earlier(jump):
    return lambda t: jnp.maximum(t - jump, 0)


# name -> (objective, N -> (length of the teacher's step, how many of them, t -> where the student's jump ends))
LESSONS = {
    "det": (make_stage2(weighting="snr_trunc"), lambda n: (0.5 / n, 2, earlier(1 / n))),
    "four": (make_stage2(weighting="snr_trunc", substeps=4), lambda n: (0.25 / n, 4, earlier(1 / n))),
    "sto": (make_stage2(weighting="snr_trunc", series="sto"), lambda n: (1 / n, 2, earlier(2 / n))),
    "encode": (make_encode(weighting="snr_trunc"), lambda n: (0.5 / n, 2, lambda t: jnp.minimum(t + 1 / n, 1))),
    "tract": (make_tract(weighting="snr_trunc", group=GROUP), lambda n: (1 / (GROUP * n), GROUP, group_start(n))),
}
CASES = [
    *(("det", schedule) for schedule in SCHEDULES),
    *(("encode", schedule) for schedule in SCHEDULES),
    ("four", FLOW),
    ("sto", FLOW),
    ("tract", FLOW),
]


# Exact students


@pytest.mark.parametrize(("name", "schedule"), CASES, ids=str)
def test_loss_is_zero_for_the_exact_composite_of_the_teachers_steps_in_one_compilation(name, schedule):
    objective, path = LESSONS[name]
    teacher, traces = analytic.gaussian(schedule, lambda cond: (cond["w"] - 1.0, 0.5 + 0.1 * cond["label"])), []

    @jax.jit
    def losses(batch, knobs, keys, composite_steps):
        traces.append(knobs)
        student = analytic.composite_student(schedule, teacher, *path(composite_steps))
        apply = {"student": student, "teacher": teacher, "target_ema": student}
        return objective(apply, schedule, batch, knobs, keys)[0]

    for num_steps in (4, 2, 1):
        arguments = make_batch(B), make_knobs(schedule, num_steps), KEYS
        assert float(losses(*arguments, float(num_steps)).max()) < 1e-6
        # The composite of steps twice as short, or twice as long, is another student.
        for wrong in (2.0 * num_steps, 0.5 * num_steps):
            if (name, wrong) != ("sto", 0.5):  # one step from t = 1 to 0, which is right at N = 1
                assert float(losses(*arguments, wrong).mean()) > 1e-4, (num_steps, wrong)
    assert len(traces) == 1


def test_every_lesson_keeps_the_exact_flow_map():
    moments = analytic.constant(0.5, 0.2)

    @jax.jit
    def losses(batch, knobs, keys, n):
        grouped = analytic.flow_student(COSINE, moments, group_start(n))
        students = {
            "four": [analytic.exact_student(COSINE, moments, steps) for steps in (n, 4 * n)],
            "sto": [analytic.exact_stochastic_student(COSINE, moments, steps) for steps in (n, 2 * n)],
            "encode": [analytic.exact_encoder(COSINE, moments, steps) for steps in (n, 2 * n)],
            "tract": [grouped, analytic.exact_student(COSINE, moments, GROUP * n)],
        }
        return {
            name: LESSONS[name][0](
                {"student": student, "teacher": teacher, "target_ema": grouped}, COSINE, batch, knobs, keys
            )[0]
            for name, (student, teacher) in students.items()
        }

    for name, loss in losses(make_batch(B), make_knobs(num_steps=4), KEYS, 4.0).items():
        assert float(loss.max()) < 1e-6, name
    for name, loss in losses(make_batch(B), make_knobs(num_steps=2), KEYS, 4.0).items():
        assert not float(loss.mean()) < 1e-4, name


@pytest.mark.parametrize(("series", "num_steps_of_first"), [("det", 4), ("sto", 2), ("encode", 4)])
def test_perfect_chain_ends_in_the_one_step_that_does_what_all_steps_of_its_first_teacher_do(
    series, num_steps_of_first
):
    objective, path = LESSONS[series]
    first = analytic.gaussian(COSINE, analytic.constant(0.5, 0.2))
    sampler = samplers.encode if series == "encode" else samplers.deterministic
    grid = jax.tree.map(jnp.asarray, diffusion.make_grid(COSINE, 16))

    @jax.jit
    def run(batch, keys, z):
        teacher, losses = first, []
        for num_steps in (2, 1):
            student = analytic.composite_student(COSINE, teacher, *path(num_steps))
            knobs = jax.tree.map(jnp.asarray, make_knobs(num_steps=num_steps))
            losses.append(objective({"student": student, "teacher": teacher}, COSINE, batch, knobs, keys)[0])
            teacher = student
        return jnp.stack(losses), sampler(teacher, grid, z, {}, 1), sampler(first, grid, z, {}, num_steps_of_first)

    losses, one, all_steps = run(make_batch(B), KEYS, jnp.linspace(-2.0, 2.0, 5)[:, None])
    assert float(losses.max()) < 1e-6
    np.testing.assert_allclose(one, all_steps, atol=1e-4)


# The target itself, read off teachers whose prediction is the same for every z


def coded(schedule, offset):
    """A teacher that predicts the index, on a grid of 16, of the time it is asked about, plus `offset`."""

    def teacher(z, logsnr, cond):
        x = jnp.ones_like(z) * diffusion.expand(jnp.round(schedule.t(logsnr) * 16) + offset, z)
        return diffusion.to_prediction("x", x, z, *schedule.alpha_sigma(logsnr))

    return teacher


@functools.cache
def target_reader(objective, schedule, offset):
    told = []

    def student(z, logsnr, cond):
        told.append(logsnr)
        return diffusion.to_prediction("x", jnp.zeros_like(z), z, *schedule.alpha_sigma(logsnr))

    apply = {"student": student, "teacher": coded(schedule, 0.0), "target_ema": coded(schedule, offset)}

    @jax.jit
    def read(batch, knobs, keys):
        told.clear()
        loss, named = objective(apply, schedule, batch, knobs, keys)
        return loss, named["x_mse"], told[0]

    return read


def read_targets(objective, num_steps, schedule=COSINE, offset=0.0):
    """{grid index of t: x_tilde}, for the teacher (and, plus `offset`, the moving average) that is `coded`."""
    read = target_reader(objective, schedule, offset)
    loss, x_mse, logsnr = map(np.asarray, read(make_batch(B), make_knobs(schedule, num_steps), KEYS))
    np.testing.assert_allclose(loss, x_mse * np.maximum(np.exp(logsnr), 1.0), rtol=1e-4)
    index = np.round(schedule.t(logsnr) * 16).astype(int)
    targets = dict(zip(index.tolist(), np.sqrt(x_mse).tolist(), strict=True))
    np.testing.assert_allclose(np.sqrt(x_mse), [targets[k] for k in index], rtol=1e-6)
    return targets


WEIGHTS = {  # of the first of two predictions: (series, N) -> {i: a}
    ("det", 2): {2: 0.414214},
    ("det", 4): {2: 0.351166, 3: 0.433548, 4: 0.480215},
    ("det", 8): {8: 0.495148},
    ("sto", 4): {3: 0.292907, 4: 0.414214},
    ("sto", 8): {8: 0.480215},
}


@pytest.mark.parametrize(("series", "num_steps"), WEIGHTS)
def test_two_predictions_are_weighed_as_the_closed_form_says(series, num_steps):
    unit = 16 // num_steps
    step = unit if series == "sto" else unit // 2
    targets = read_targets(LESSONS[series][0], num_steps)
    assert targets.keys() == {unit * i for i in range(1, num_steps + 1)}
    for i, a in WEIGHTS[series, num_steps].items():
        assert targets[unit * i] == pytest.approx(unit * i - (1 - a) * step, abs=1e-5)
    # The prediction whose step lands on t = 0 is the whole target, to the bit.
    assert targets[unit] == (unit if series == "sto" else unit / 2)
    if series == "sto":
        assert targets[2 * unit] == unit


@pytest.mark.parametrize(("num_steps", "a"), [(2, 0.320115), (4, 0.388580), (8, 0.436249)])
def test_weights_on_the_stable_diffusion_schedule(num_steps, a):
    targets = read_targets(LESSONS["det"][0], num_steps, diffusion.DiscreteBetas())
    assert targets[16] == pytest.approx(16 - (1 - a) * 8 / num_steps, abs=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_four_predictions_are_weighed_by_how_far_alpha_over_sigma_goes(num_steps):
    rho = np.exp(0.5 * COSINE.logsnr(np.linspace(0.0, 1.0, 17)))
    targets = read_targets(LESSONS["four"][0], num_steps)
    step = 4 // num_steps
    assert targets.pop(4 * step) == step
    for index, target in targets.items():
        path = index - step * np.arange(5)
        assert target == pytest.approx((np.diff(rho[path]) * path[:-1]).sum() / (rho[path[-1]] - rho[index]), abs=1e-5)


def test_tract_follows_the_teacher_onto_the_start_of_a_group_its_average_onto_0_and_else_both():
    logsnr = COSINE.logsnr(np.linspace(0.0, 1.0, 17))
    grid = diffusion.Grid(*COSINE.alpha_sigma(logsnr), logsnr)
    targets = read_targets(LESSONS["tract"][0], 4, offset=100.0)
    assert targets.keys() == set(range(1, 17))
    for j, target in targets.items():
        start = (j - 1) // GROUP * GROUP
        if j == start + 1:
            assert target == pytest.approx(j, rel=1e-6)
        elif start == 0:
            assert target == j - 1 + 100
        else:
            a = diffusion.convex_weights(grid.at(np.array([[j], [j - 1], [start]])))[0, 0]
            assert target == pytest.approx(a * j + (1 - a) * (j - 1 + 100), abs=1e-3)


def test_tract_in_pairs_is_stage_two_at_even_steps_and_the_teacher_at_odd_ones():
    pairs = read_targets(OBJECTIVES["tract"], 4)
    halved = read_targets(LESSONS["det"][0], 4)
    assert {j: target for j, target in pairs.items() if j % 4 == 0} == pytest.approx(halved, abs=1e-5)
    assert {j: target for j, target in pairs.items() if j % 4} == {j: j for j in range(2, 16, 4)}


# Consistency


def to_clean(t):
    return jnp.zeros_like(t)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_consistency_function_is_a_fixed_point_and_one_of_other_steps_is_not(schedule):
    objective = make_consistency(weighting="snr_trunc", num_times=8)
    teacher = analytic.gaussian(schedule, lambda cond: (cond["w"] - 1.0, 0.5 + 0.1 * cond["label"]))

    @jax.jit
    def losses(batch, knobs, keys):
        students = [analytic.composite_student(schedule, teacher, 1 / n, n, to_clean) for n in (8, 4)]
        return [
            objective({"student": student, "teacher": teacher, "target_ema": student}, schedule, batch, knobs, keys)[0]
            for student in (*students, teacher)
        ]

    exact, coarser, mean = losses(make_batch(B), make_knobs(schedule), KEYS)
    assert float(exact.max()) < 1e-6 and float(coarser.mean()) > 1e-4 and float(mean.mean()) > 1e-4


def test_the_end_of_the_flow_is_a_consistency_function_of_a_teacher_that_follows_it():
    objective, moments = make_consistency(weighting="snr_trunc", num_times=8), analytic.constant(0.5, 0.2)

    @jax.jit
    def loss(batch, knobs, keys):
        teacher = analytic.exact_student(COSINE, moments, 8)
        end = analytic.flow_student(COSINE, moments, to_clean)
        return objective({"student": end, "teacher": teacher, "target_ema": end}, COSINE, batch, knobs, keys)[0]

    assert float(loss(make_batch(B), make_knobs(), KEYS).max()) < 1e-6


def test_consistency_asks_the_average_from_every_time_but_the_first_whatever_the_number_of_steps():
    objective = make_consistency(weighting="snr_trunc", num_times=16)
    for num_steps in (1, 4):
        targets = read_targets(objective, num_steps, offset=100.0)
        assert targets == {1: 1.0, **{j: j - 1 + 100.0 for j in range(2, 17)}}


# Two students


def test_two_students_are_taught_by_their_guided_combination_and_not_told_w():
    outputs, w = jnp.array([1.0, 2.0, 4.0, 8.0]), 2.0  # of the network for each label, the last one for none

    def constant(x, z, logsnr):
        return diffusion.to_prediction("x", jnp.ones_like(z) * x[:, None], z, *COSINE.alpha_sigma(logsnr))

    def network(z, logsnr, cond):
        assert cond.keys() == {"label"}
        return constant(outputs[cond["label"]], z, logsnr)

    def pair(z, logsnr, cond):
        return constant((1 + w) * outputs[cond["label"]] - w * outputs[NULL], z, logsnr)

    teacher = classifier_free(analytic.gaussian(COSINE, MOMENTS), null_cond)

    @jax.jit
    def losses(batch, knobs, keys):
        return [
            OBJECTIVES[name]({"student": student, "teacher": teacher}, COSINE, batch, knobs, keys)[0]
            for name, student in (("two_student", network), ("stage2", pair))
        ]

    of_two, of_combination = losses(make_batch(B), make_knobs(w_min=w, w_max=w), KEYS)
    np.testing.assert_allclose(of_two, of_combination, rtol=1e-4)


# Clipped targets


TAUGHT = {
    "stage1": make_stage1(weighting="snr_trunc"),
    **{name: LESSONS[name][0] for name in ("det", "sto", "tract")},
    "consistency": make_consistency(weighting="snr_trunc", num_times=8),
    "two": make_two_student(weighting="snr_trunc", null_cond=null_cond),
}


@pytest.mark.parametrize("name", TAUGHT)
def test_a_clipped_target_keeps_to_the_range_and_an_unclipped_one_does_not(name):
    def model_fn(params, z, logsnr, cond, *, dropout_key=None):
        at = COSINE.alpha_sigma(logsnr)
        return diffusion.velocity(diffusion.to_prediction("x", jnp.full_like(z, params), z, *at), *at)

    plain = Teacher(model_fn, None, COSINE, "v", None, num_classes=NULL, sample_shape=(3,), data_range=0.5)

    @jax.jit
    def losses(batch, knobs, keys):
        own = plain.denoiser(0.5)
        return [
            TAUGHT[name](
                {"student": own, "target_ema": own, "teacher": teacher.denoiser(3.0)}, COSINE, batch, knobs, keys
            )[0]
            for teacher in (clipped(plain), plain)
        ]

    kept, left = losses(make_batch(B), make_knobs(), KEYS)
    assert kept.max() < 1e-3 < left.mean() / 100


# What cannot be made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"series": "encode"}, "series is 'encode'; it must be one of det, sto"),
        ({"substeps": 1}, "substeps is 1; the teacher takes at least 2"),
        ({"series": "sto", "substeps": 4}, "substeps is 4; the stochastic series halves"),
        ({"series": "sto", "weighting": "landing"}, "weighting is 'landing'; the stochastic series jumps"),
    ],
)
def test_lessons_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_stage2(**{"weighting": "snr_trunc", **options})
