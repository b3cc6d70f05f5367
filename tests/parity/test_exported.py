"""The teacher's sampler that benchmarks.exported times in PyTorch, with diffusers' scheduler, does the work of ours."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from students import make_student
from tiny import tiny_config

from benchmarks import exported
from guided_distill import diffusion, sharding
from guided_distill.experiment import from_config


@pytest.fixture(scope="module")
def bundle():
    """What the benchmark asks of a bundle, with a teacher of random weights alone."""
    config = tiny_config(**{"model.attention_resolutions": (4,), "model.multipliers": (1, 2)})
    experiment = from_config(config)
    teacher, _, mesh = make_student(experiment, series="teacher", devices=jax.devices()[:1])
    grid = sharding.place(mesh, diffusion.make_grid(experiment.schedule, 32))
    return SimpleNamespace(students=[teacher], grid=grid, mesh=mesh)


@pytest.mark.parametrize("num_steps", exported.TEACHER_STEPS)
def test_the_guided_teacher_ends_where_diffusers_scheduler_ends(bundle, num_steps):
    (teacher,) = bundle.students
    given = {
        "noise": np.random.default_rng(0).normal(size=(3, *teacher.model.sample_shape)).astype(np.float32),
        "label": np.array([0, 9, 4], np.int32),
        "w": np.array([0.0, 1.0, 4.0], np.float32),
    }
    ours = np.asarray(exported.live(bundle, teacher, num_steps)(**given))
    theirs = exported.teacher_in_diffusers(bundle, teacher, num_steps)(**given).numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert 0.01 < (np.abs(ours) == 1).mean() < 0.9  # x_hat is clipped in some places
