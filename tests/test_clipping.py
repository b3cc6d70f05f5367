"""Students that are held to the data's range while they learn: what a clip takes away costs nothing."""

import analytic
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import COSINE, MOMENTS, make_batch, make_keys, make_knobs_on_device, null_cond
from tiny import quick_config

from guided_distill import diffusion
from guided_distill.experiment import from_config
from guided_distill.guidance import Teacher, classifier_free
from guided_distill.objectives import (
    make_consistency,
    make_stage1,
    make_stage2,
    make_tract,
    make_two_student,
    within_range,
)
from guided_distill.stages import make_stages

OBJECTIVES = {
    "stage1": make_stage1(weighting="snr_trunc"),
    "stage2": make_stage2(weighting="snr_trunc"),
    "stochastic": make_stage2(weighting="snr_trunc", series="sto"),
    "tract": make_tract(weighting="snr_trunc", group=2),
    "consistency": make_consistency(weighting="snr_trunc", num_times=8),
}


def says(x):
    """The denoiser whose x_hat is x, a number or a function of cond."""

    def denoiser(z, logsnr, cond, **options):
        x_hat = x(cond)[:, None] if callable(x) else x
        return diffusion.to_prediction("x", jnp.broadcast_to(x_hat, z.shape), z, *COSINE.alpha_sigma(logsnr))

    return denoiser


@jax.jit
def losses_and_pulls(student, target, average):
    """{name: (loss, its derivative by the student's x_hat)} of networks that say the same everywhere."""

    def loss(student, objective):
        apply = {"student": says(student), "teacher": says(target), "target_ema": says(average)}
        return objective(apply, COSINE, make_batch(64), make_knobs_on_device(), make_keys(64))[0].mean()

    kept = {name: within_range(objective, 1.0) for name, objective in OBJECTIVES.items()}
    return {name: jax.value_and_grad(loss)(student, objective) for name, objective in kept.items()}


def test_beyond_the_end_that_the_target_is_at_nothing_is_left_to_learn():
    for student, target in ((1.0, 1.0), (1.5, 1.0), (-7.0, -1.0)):
        for name, (loss, pull) in losses_and_pulls(student, target, 4.0 * student).items():
            assert abs(loss) < 1e-6 and abs(pull) < 1e-3, (name, student)


def test_a_value_outside_is_pulled_in_where_its_target_lies_inside():
    inside, outside, below = (losses_and_pulls(student, 0.5, 0.5) for student in (1.0, 3.0, -3.0))
    for name, (loss, pull) in outside.items():
        np.testing.assert_allclose((loss, pull), inside[name], rtol=1e-4, err_msg=name)
        assert pull > 0.5 and below[name][1] < -0.5, name


def test_what_lies_inside_is_learnt_as_without():
    teacher = analytic.gaussian(COSINE, analytic.constant(0.1, 0.1))
    apply = {"student": analytic.gaussian(COSINE, analytic.constant(0.2, 0.1)), "teacher": teacher}
    apply["target_ema"] = apply["student"]

    @jax.jit
    def both(batch, keys):
        return {
            name: [each(apply, COSINE, batch, make_knobs_on_device(), keys)[0] for each in (objective, within)]
            for name, objective in OBJECTIVES.items()
            for within in [within_range(objective, 9.0)]
        }

    for name, (free, held) in both(make_batch(64), make_keys(64)).items():
        np.testing.assert_array_equal(held, free, err_msg=name)


def test_an_unclipped_copy_of_a_clipped_teacher_has_learnt_it():
    guided = classifier_free(analytic.gaussian(COSINE, MOMENTS), null_cond)

    def clipped(z, logsnr, cond):
        return diffusion.clip_prediction(guided(z, logsnr, cond), z, *COSINE.alpha_sigma(logsnr), 0.5)

    @jax.jit
    def losses(batch, keys):
        apply = {"student": guided, "teacher": clipped}
        objectives = (OBJECTIVES["stage1"], within_range(OBJECTIVES["stage1"], 0.5))
        return [each(apply, COSINE, batch, make_knobs_on_device(), keys)[0] for each in objectives]

    free, held = losses(make_batch(), make_keys())
    assert float(held.max()) < 1e-6 and float(free.mean()) > 1e-2


@pytest.mark.parametrize("w", [0.0, 2.0])
def test_of_two_students_only_what_they_make_together_is_held(w):
    def pair(conditional, null):
        return says(lambda cond: jnp.where(cond["label"] == 3, null, conditional))

    def loss(conditional, null, bound):
        objective = make_two_student(weighting="snr_trunc", null_cond=null_cond, bound=bound)
        apply = {"student": pair(conditional, null), "teacher": says(1.0)}
        knobs = make_knobs_on_device()
        knobs = type(knobs)(**{**vars(knobs), "w_min": jnp.float32(w), "w_max": jnp.float32(w)})
        return float(objective(apply, COSINE, make_batch(16), knobs, make_keys(16))[0].mean())

    # (1 + w) c - w n: 0 of a pair that lies outside, and 2 of one that lies half outside.
    lies_at = lambda value: ((value + 3.0 * w) / (1 + w), 3.0)  # noqa: E731
    np.testing.assert_allclose(loss(*lies_at(0.0), 1.0), loss(*lies_at(0.0), None), rtol=1e-4)
    assert loss(*lies_at(2.0), 1.0) < 1e-6 < loss(*lies_at(2.0), None)


def costs_of_overshooting(clip, series, outside=None, **values):
    """{stage: loss} of students that say 1.5 where their teacher says 1, of the stages that learn from another."""
    values |= {"clip_targets": clip, "stage2.series": series, "stage1.single_w": (2.0,)}
    stages = make_stages(from_config(quick_config(**values)), outside)
    apply = {"student": says(1.5), "teacher": says(1.0), "target_ema": says(1.5)}

    @jax.jit
    def losses(batch, keys):
        return {
            stage.name: stage.objective(apply, COSINE, batch, make_knobs_on_device(), keys)[0].mean()
            for stage in stages
            if stage.parent is not None
        }

    return losses(make_batch(16), make_keys(16))


def test_every_stage_of_a_run_that_clips_is_clipped_and_of_one_that_does_not_none():
    series = ("det", "sto", "two", "tract", "consistency")
    clipped, free = (costs_of_overshooting(clip, series) for clip in (True, False))
    assert {"stage1", "stage1_w2", "stage2_det_0001", "stage2_two_0001", "stage2_consistency"} <= clipped.keys()
    for name in clipped:
        assert clipped[name] < 1e-6 and free[name] > 1e-2, name


def test_what_an_encoder_learns_from_is_not_clipped():
    costs = costs_of_overshooting(True, ("det", "encode"))
    assert min(costs[name] for name in ("stage1", "stage1_w2", "stage2_det_0001")) > 1e-2


def test_students_of_a_teacher_without_a_range_are_not_clipped():
    outside = Teacher(None, {}, COSINE, "v", null_cond, num_classes=10, sample_shape=(8, 8, 1), data_range=None)
    costs = costs_of_overshooting(True, ("det",), outside)
    assert min(costs[name] for name in ("stage1", "stage1_w2", "stage2_det_0001")) > 1e-2
