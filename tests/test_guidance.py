"""The guided teacher: (1 + w) conditional - w unconditional, per example, in one batch of 2B."""

import analytic
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from guided_distill import diffusion
from guided_distill.guidance import classifier_free, make_denoiser

SCHEDULES = [make() for make in diffusion.SCHEDULES.values()]
W = jnp.array([0.0, 0.3, 1.0, 4.0])
COND = {"label": jnp.array([0, 1, 2, 0])}
NULL = 3


def null_cond(cond):
    return {"label": jnp.full_like(cond["label"], NULL)}


def inputs(schedule):
    z = jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
    return z, schedule.logsnr(jnp.array([0.1, 0.4, 0.7, 0.95]))


def conditional_teacher(schedule):
    return analytic.gaussian(schedule, analytic.classes([-1.0, 0.5, 1.0], 0.5, 1.0))


def nonlinear_model(params, z, logsnr, cond, *, dropout_key=None):
    """A raw output that depends on everything, in bfloat16 as a network may give it."""
    label = diffusion.expand(cond["label"].astype(jnp.float32), z)
    return (jnp.tanh(params * z + label) * diffusion.expand(jnp.cos(logsnr), z)).astype(jnp.bfloat16)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("output", ["x", "eps", "v"])
def test_guidance_is_the_same_in_x_eps_and_v(schedule, output):
    z, logsnr = inputs(schedule)
    alpha, sigma = schedule.alpha_sigma(logsnr)
    teacher = conditional_teacher(schedule)
    guided = classifier_free(teacher, null_cond)(z, logsnr, {**COND, "w": W})

    def raw(prediction):
        return diffusion.velocity(prediction, alpha, sigma) if output == "v" else getattr(prediction, output)

    w = W[:, None, None, None]
    combined = (1 + w) * raw(teacher(z, logsnr, COND)) - w * raw(teacher(z, logsnr, null_cond(COND)))
    expected = diffusion.to_prediction(output, combined, z, alpha, sigma)
    for got, part in zip(guided, expected, strict=True):
        np.testing.assert_allclose(got, part, rtol=1e-3, atol=2e-4)


def test_w_zero_is_the_conditional_teacher_to_the_bit():
    schedule = diffusion.Cosine()
    denoiser = make_denoiser(nonlinear_model, jnp.float32(0.7), schedule, "v")
    z, logsnr = inputs(schedule)
    guided = classifier_free(denoiser, null_cond)(z, logsnr, {**COND, "w": jnp.zeros(4)})
    for got, expected in zip(guided, denoiser(z, logsnr, COND), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_w_is_per_example():
    schedule = diffusion.Cosine()
    guided = classifier_free(conditional_teacher(schedule), null_cond)
    z, logsnr = inputs(schedule)
    together = guided(z, logsnr, {**COND, "w": W}).x
    for k in range(4):
        one = slice(k, k + 1)
        alone = guided(z[one], logsnr[one], {"label": COND["label"][one], "w": W[one]}).x
        np.testing.assert_allclose(together[one], alone, rtol=1e-6)


def test_guided_prediction_makes_z_and_is_never_clipped():
    schedule = diffusion.Cosine()
    z, logsnr = inputs(schedule)
    guided = classifier_free(conditional_teacher(schedule), null_cond)(10 * z, logsnr, {**COND, "w": W})
    np.testing.assert_allclose(diffusion.diffuse(*guided, *schedule.alpha_sigma(logsnr)), 10 * z, atol=1e-4)
    assert float(jnp.abs(guided.x).max()) > 2


def test_teacher_is_called_once_with_both_halves_and_without_w():
    schedule = diffusion.Cosine()
    calls = []

    def spy(z, logsnr, cond):
        calls.append((z, logsnr, cond))
        return conditional_teacher(schedule)(z, logsnr, cond)

    z, logsnr = inputs(schedule)
    classifier_free(spy, null_cond)(z, logsnr, {**COND, "w": W})
    ((called_z, called_logsnr, called_cond),) = calls
    # Side by side, not end to end: on several devices no example has to move.
    np.testing.assert_array_equal(called_z, np.repeat(z, 2, axis=0))
    np.testing.assert_array_equal(called_logsnr, np.repeat(logsnr, 2))
    assert called_cond.keys() == {"label"}
    np.testing.assert_array_equal(called_cond["label"], [0, NULL, 1, NULL, 2, NULL, 0, NULL])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_make_denoiser_binds_weights_schedule_and_output_type_in_float32(schedule):
    z, logsnr = inputs(schedule)
    alpha, sigma = schedule.alpha_sigma(logsnr)
    for name in ("x", "eps", "v", "flow"):
        raw = nonlinear_model(jnp.float32(0.7), z, logsnr, COND).astype(jnp.float32)
        got = make_denoiser(nonlinear_model, jnp.float32(0.7), schedule, name)(z, logsnr, COND)
        assert got.x.dtype == got.eps.dtype == jnp.float32
        for part, expected in zip(got, diffusion.to_prediction(name, raw, z, alpha, sigma), strict=True):
            np.testing.assert_array_equal(part, expected)


def test_dropout_key_reaches_the_network():
    seen = []

    def model(params, z, logsnr, cond, *, dropout_key=None):
        seen.append(dropout_key)
        return z

    schedule = diffusion.Cosine()
    denoiser = make_denoiser(model, None, schedule, "v")
    denoiser(*inputs(schedule), COND)
    denoiser(*inputs(schedule), COND, dropout_key="a key")
    assert seen == [None, "a key"]
