"""The weighting "landing" of stage two: what an error makes of a step, and how often each step is drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import COSINE, SCHEDULES, make_knobs

from guided_distill import diffusion
from guided_distill.objectives import draws, make_stage2
from guided_distill.objectives.stage2 import draw_landing, landing_weights, path

KEYS = np.arange(2048)


@pytest.fixture(autouse=True)
def arithmetic_draws(monkeypatch):
    """Evenly spread, so that means over the examples are close to what is drawn on average."""
    monkeypatch.setattr(draws, "split_examples", lambda keys, num: [keys] * num)
    monkeypatch.setattr(draws, "uniform", lambda keys, low=0.0, high=1.0: low + (high - low) * (0.618 * keys % 1.0))
    monkeypatch.setattr(draws, "normal_like", lambda keys, x: jnp.ones_like(x))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("substeps", [2, 4])
def test_an_error_is_measured_in_the_noise_that_its_step_lands_in(substeps, schedule):
    error, exact = 0.1, 0.3
    grid = diffusion.make_grid(schedule, 16)
    objective = make_stage2(weighting="landing", substeps=substeps)

    @jax.jit
    def losses(batch, knobs, keys):
        told = []

        def says(x, z, logsnr, cond):  # the same at every time, so that it is the target of any number of steps
            told.append(logsnr)
            alpha, sigma = (diffusion.expand(each, z) for each in schedule.alpha_sigma(logsnr))
            return diffusion.Prediction(jnp.full_like(z, x), (z - alpha * x) / sigma)

        apply = {name: functools.partial(says, x) for name, x in (("student", exact + error), ("teacher", exact))}
        return objective(apply, schedule, batch, knobs, keys)[0], told[-1]

    for num_steps in (1, 2, 4):
        stride, i = 16 // (substeps * num_steps), np.arange(1, num_steps + 1)
        t, s = grid.at(stride * substeps * i), grid.at(stride * np.where(i == 1, 1, substeps * (i - 1)))
        # Where steps from one z of x_hat, and of x_hat with the error, land, in units of the noise there.
        lands = [s.alpha * x + s.sigma * (0.7 - t.alpha * x) / t.sigma for x in (exact, exact + error)]
        expected = ((lands[1] - lands[0]) / s.sigma) ** 2
        loss, logsnr = losses({"x": jnp.zeros((KEYS.size, 3))}, make_knobs(schedule, num_steps), KEYS)
        for own, logsnr_t in zip(expected, t.logsnr, strict=True):
            drawn = loss[np.isclose(logsnr, logsnr_t, atol=1e-3)]
            np.testing.assert_allclose(drawn.sum() / KEYS.size, own / num_steps, rtol=3e-2)
        assert loss.max() < 2.0 * expected.mean() * (1 + 1e-3), "one example in a batch is most of its loss"


def test_the_last_number_that_can_be_drawn_is_a_step(monkeypatch):
    monkeypatch.setattr(draws, "uniform", lambda keys: jnp.full(keys.shape, 1.0 - 2.0**-24))
    grid = diffusion.make_grid(COSINE, 1024)
    for num_steps in (1, 2, 64, 256):
        i, counts = draw_landing(KEYS, 2, np.int32(num_steps), grid)
        index = path("det", 2, num_steps, i, grid)
        assert (i == num_steps).all() and np.isfinite(landing_weights(index, grid.at(index)) * counts).all()
