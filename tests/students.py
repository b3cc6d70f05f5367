"""Students with weights drawn at random, of each backbone: what the tests of the export write and read."""

import dataclasses

import jax
import numpy as np
from test_shapes_of_samples import tiny as tiny_signal
from tiny import tiny_config

from configs import signal1d
from guided_distill import diffusion, sharding
from guided_distill.experiment import from_config
from guided_distill.export import bundle
from guided_distill.export.student import Student
from guided_distill.teachers import initial_params, make_model, make_module

BATCH = 8
SAMPLERS = {"det": "deterministic", "sto": "stochastic", "consistency": "renoising"}


def experiments():
    """{kind: Experiment}; N = 2 -> 1."""
    dit = tiny_config()
    dit["model"] = {"name": "dit", "hidden": 8, "depth": 1, "heads": 2, "patch": 2, "dtype": "float32"}
    return {
        "unet": from_config(tiny_config()),
        "dit": from_config(dit),
        "mlp": from_config(tiny_signal(signal1d)),
    }


def make_student(experiment, series="det", num_steps=2, seed=0, devices=None):
    """A Student, or with series="teacher" a teacher that is guided by two calls, and the grid and mesh it is for.

    That teacher and the student of series="consistency" take any number of steps.
    """
    mesh = sharding.make_mesh(devices)
    taught, parameterisation = series != "teacher", experiment.parameterisation
    any_steps = series in ("teacher", "consistency")
    module = make_module(experiment, taught, parameterisation)
    fresh = initial_params(experiment, taught, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(fresh)
    rng = np.random.default_rng(seed)
    params = tree.unflatten([leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
    model = make_model(experiment, w_conditioned=taught)
    student = Student(
        name=series if any_steps else f"{series}_{num_steps:04d}",
        series=series,
        num_steps=None if any_steps else num_steps,
        sampler=SAMPLERS.get(series, "deterministic"),
        w_range=(0.0, 4.0),
        model=dataclasses.replace(model, params=sharding.place(mesh, params)),
        network=bundle.network_of(experiment.backbone, module),
        figures=[{"w": 1.0, "metrics": {"frechet_classifier": 2.5}}],
    )
    return student, sharding.place(mesh, diffusion.make_grid(experiment.schedule, 4)), mesh
