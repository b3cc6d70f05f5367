import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny import tiny_config

from guided_distill import diffusion, generate, sharding
from guided_distill.experiment import from_config
from guided_distill.teachers import initial_params, make_model

EXPERIMENT = from_config(tiny_config())
MODEL = make_model(EXPERIMENT, w_conditioned=True)


@pytest.fixture(scope="module")
def params():
    params = initial_params(EXPERIMENT, True, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return tree.unflatten([leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


def images(params, devices, **options):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    grid = sharding.place(mesh, diffusion.make_grid(EXPERIMENT.schedule, 4))
    options = {"seed": 3, "num": 10, "w": 2.0, "num_steps": 2, "batch_size": 8, **options}
    batches = list(generate.sample_images(MODEL, params, grid, mesh, **options))
    return [np.concatenate(values) for values in zip(*batches, strict=True)]


def test_an_image_does_not_depend_on_batches_or_devices(params):
    index, label, x = images(params, 1)
    assert (index == np.arange(10)).all() and x.shape == (10, 8, 8, 1)
    for devices, batch_size in ((1, 16), (4, 8), (8, 8)):
        again, labels, other = images(params, devices, batch_size=batch_size)
        assert (again == index).all() and (labels == label).all()
        np.testing.assert_allclose(other, x, atol=1e-3)


DEVICES = """
import sys
import jax
import numpy as np
from benchmarks import train_step
from guided_distill import diffusion, generate, sharding
from guided_distill.teachers import make_model

experiment = train_step.digits_8x8()
model = make_model(experiment, w_conditioned=True)
made = []
for devices in (jax.devices()[:1], jax.devices()):
    mesh = sharding.make_mesh(devices)
    params = train_step.random_params(experiment, w_conditioned=True)
    weights, grid = sharding.place(mesh, (params, diffusion.make_grid(experiment.schedule, 8)))
    batches = generate.sample_images(model, weights, grid, mesh, seed=0, num=1024, w=1.0, num_steps=8, batch_size=256)
    made.append(np.concatenate([x for _, _, x in batches]))
print(np.abs(made[0] - made[1]).max())
"""


@pytest.mark.slow
def test_devices_that_work_at_the_same_time_do_not_disturb_each_other():
    # In a process of its own, with XLA's own optimisation: XLA's library disturbs large batches of fast programs.
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run([sys.executable, "-c", DEVICES], env=environment, capture_output=True, text=True)
    assert float(done.stdout) < 1e-3, done.stderr


def test_seed_label_and_w_make_the_image(params):
    _, label, x = images(params, 1)
    for options in ({"seed": 4}, {"w": 0.5}, {"labels": (label + 1) % 10}):
        assert np.abs(images(params, 1, **options)[2] - x).max() > 1e-3
    np.testing.assert_array_equal(images(params, 1, labels=label)[2], x)


def test_samples_stay_in_the_range_of_the_data(params):
    assert np.abs(images(params, 1)[2]).max() <= 1.0
