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
    grid = sharding.replicate(mesh, diffusion.make_grid(EXPERIMENT.schedule, 4))
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


def test_seed_label_and_w_make_the_image(params):
    _, label, x = images(params, 1)
    for options in ({"seed": 4}, {"w": 0.5}, {"labels": (label + 1) % 10}):
        assert np.abs(images(params, 1, **options)[2] - x).max() > 1e-3
    np.testing.assert_array_equal(images(params, 1, labels=label)[2], x)


def test_samples_stay_in_the_range_of_the_data(params):
    assert np.abs(images(params, 1)[2]).max() <= 1.0
