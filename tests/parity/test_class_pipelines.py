"""Students of classes in the pipeline that their diffusers folder brings along: ends where our sampler ends."""

import dataclasses
import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.utils import dynamic_modules_utils

sys.path.insert(0, str(Path(__file__).parents[1]))
from latent_run import UNET, latent_config, random_params
from students import make_student
from tiny import tiny_config

from guided_distill import diffusion, generate, samplers
from guided_distill.errors import UserError
from guided_distill.experiment import from_config
from guided_distill.export import pipelines
from guided_distill.interop.latent_folder import write_latent
from guided_distill.latent_space import open_space
from guided_distill.models.autoencoder import AutoencoderConfig
from guided_distill.models.latent_models import LatentModel

INTERVALS = 16  # a student of 16 steps too: here no grid is rounded
MODEL = LatentModel(
    dataclasses.replace(UNET, num_classes=5, out_channels=3, betas=(0.0015, 0.0195)),
    AutoencoderConfig(channels=8, multipliers=(1, 2), num_blocks=1, norm_groups=4, latent_channels=3, num_codes=16,
                      scale=1.0),
    None,
    "eps",
    4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def code_here(tmp_path, monkeypatch):
    """The code that a folder brings is copied to the test's own place, and not to the user's cache."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


@functools.cache
def student_of(experiment):
    return make_student(experiment, devices=jax.devices()[:1])[::2]


@functools.cache
def pixels(**updates):
    config = tiny_config(**{"model.attention_resolutions": (4,), "model.multipliers": (1, 2), **updates})
    return from_config(config), None


def latents(folder, model=MODEL):
    """An experiment on latents of classes, and the model they are from."""
    write_latent(folder / "model", model, random_params(model))
    config = latent_config(folder, model)
    config["data"].update(shape=(4, 4, 3), channels=3, num_classes=5, text_length=0)
    config["model"].update(betas=MODEL.unet.betas, out_channels=3)
    config["schedule"].update(beta_start=0.0015, beta_end=0.0195)
    return from_config(config), SimpleNamespace(folder=folder / "model", model=model)


def written(tmp_path, experiment, space, num_steps, parameterisation="v"):
    """(student, grid, folder) of random weights trained, as it were, for w in [0, 14]."""
    student, _ = student_of(experiment)
    model = dataclasses.replace(student.model, parameterisation=parameterisation)
    name = f"det_{num_steps:04d}"
    student = dataclasses.replace(student, name=name, num_steps=num_steps, w_range=(0.0, 14.0), model=model)
    grid = diffusion.make_grid(experiment.schedule, INTERVALS)
    this = SimpleNamespace(experiment=experiment, space=space, grid=grid)
    pipelines.check(this, [student])
    pipelines.write(tmp_path, this, [student], print)
    return student, grid, tmp_path / "diffusers" / student.name


def loaded(folder):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_parity(tmp_path, experiment, space, num_steps, guidance_scale, **options):
    student, grid, folder = written(tmp_path, experiment, space, num_steps, **options)
    pipeline, calls = loaded(folder), []
    pipeline.unet.register_forward_hook(lambda module, given, result: calls.append(len(given[0])))
    noise = np.random.default_rng(0).normal(size=(3, *student.model.sample_shape)).astype(np.float32)
    label = np.array([0, 4, 2], np.int32)
    theirs = pipeline(
        label.tolist(),
        guidance_scale=guidance_scale,
        latents=torch.tensor(np.moveaxis(noise, -1, 1).copy()),
        output_type="latent",
    ).images
    assert calls == [3] * num_steps
    run = generate.compiled(student.model.static(), samplers.deterministic, student_of(experiment)[1])
    cond = {"label": label, "w": np.full(3, guidance_scale - 1, np.float32)}
    z = run(student.model.params, jax.tree.map(jnp.asarray, grid), None, cond, np.int32(num_steps), noise)
    ours = np.moveaxis(np.asarray(z), -1, 1)
    np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-4 * max(1.0, np.abs(ours).max()))
    assert np.ptp(ours) > 0.1
    return pipeline, theirs


@pytest.mark.parametrize(
    ("num_steps", "guidance_scale"), [(1, 1.0), (1, 9.0), (2, 3.0), (4, 1.0), (4, 9.0), (8, 3.0), (16, 9.0)]
)
def test_pixels_end_where_our_sampler_ends(tmp_path, num_steps, guidance_scale):
    check_parity(tmp_path, *pixels(), num_steps, guidance_scale)


@pytest.mark.parametrize("parameterisation", ["eps", "x"])
def test_whatever_the_network_predicts(tmp_path, parameterisation):
    check_parity(tmp_path, *pixels(), 2, 3.0, parameterisation=parameterisation)


def test_pixels_in_patches(tmp_path):
    check_parity(tmp_path, *pixels(**{"model.patch": 2, "model.head_dim": 4, "data.num_classes": 7}), 2, 3.0)


@pytest.mark.parametrize(("num_steps", "guidance_scale"), [(1, 1.0), (4, 9.0)])
def test_latents_end_where_our_sampler_ends(tmp_path, num_steps, guidance_scale):
    check_parity(tmp_path, *latents(tmp_path), num_steps, guidance_scale)


@pytest.mark.parametrize("coded", [True, False], ids=["VQ", "KL"])
def test_latents_are_decoded_as_here(tmp_path, coded):
    first = MODEL.autoencoder if coded else dataclasses.replace(MODEL.autoencoder, num_codes=0, scale=0.5)
    model = dataclasses.replace(MODEL, autoencoder=first)
    experiment, space = latents(tmp_path, model)
    *_, folder = written(tmp_path, experiment, space, 2)
    pipeline, noise = loaded(folder), torch.randn((2, 3, 4, 4), generator=torch.Generator().manual_seed(0))
    z, theirs = (pipeline([1, 4], latents=noise, output_type=kind).images for kind in ("latent", "np"))
    ours = open_space(space.folder).decode(np.moveaxis(z.numpy(), 1, -1))
    np.testing.assert_allclose(theirs, ours * 0.5 + 0.5, atol=1e-4)


def test_pictures_come_out_and_what_was_not_trained_is_refused(tmp_path):
    *_, folder = written(tmp_path, *pixels(), 2)
    pipeline = loaded(folder)
    first, second = pipeline([3, 4], generator=torch.Generator().manual_seed(0)).images
    assert first.size == (8, 8) and first.mode == "L" and first.tobytes() != second.tobytes()
    assert len(pipeline(np.array([1, 2], np.int32), guidance_scale=float(np.float32(1.1))).images) == 2
    for wrong, says in (
        ({"guidance_scale": 16.0}, "guidance_scale=16.0: this student was trained for 1 to 15"),
        ({"num_inference_steps": 4}, "num_inference_steps=4: this student takes 2 steps"),
        ({"class_labels": [10]}, "classes are 0 to 9"),
        ({"class_labels": [0.5]}, "classes are 0 to 9"),
        ({"class_labels": [True]}, "classes are 0 to 9"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"guidance_scale": [2.0]}, "trained for 1 to 15"),
    ):
        with pytest.raises(ValueError, match=says.replace("[", "\\[")):
            pipeline(**{"class_labels": [0], **wrong})


def test_what_the_pipeline_does_not_know_is_named(tmp_path):
    dit = {"name": "dit", "hidden": 8, "depth": 1, "heads": 2, "patch": 2, "dtype": "float32"}
    experiment = from_config(tiny_config() | {"model": dit})
    with pytest.raises(UserError, match="'unet' of pixels and 'sd_unet' of latents, and this is 'dit'"):
        written(tmp_path, experiment, None, 2)
    with pytest.raises(UserError, match="det_0002 predicts both; pipelines know v, eps, x"):
        written(tmp_path, *pixels(), 2, "both")
    experiment, _ = pixels()
    this, (student, _) = SimpleNamespace(experiment=experiment, space=None), student_of(experiment)
    for changes, says in (
        ({"sampler": "stochastic"}, "det_0002 has no sampler there"),
        ({"network": None}, "det_0002 is not one call of a network of ours a step"),
        ({"model": {"w_conditioned": False}}, "det_0002 is not one call of a network of ours a step"),
        ({"model": {"cond_fields": (("tokens", (4,), "int32"),)}}, "knows labels and w, not tokens"),
        ({"model": {"sample_shape": (8, 4, 1)}}, "samples are 8x4x1 in a range of 1"),
        ({"model": {"data_range": None}}, "in a range of None"),
    ):
        if "model" in changes:
            changes = {"model": dataclasses.replace(student.model, **changes["model"])}
        with pytest.raises(UserError, match=f"--formats=diffusers: .*{says}"):
            pipelines.check(this, [dataclasses.replace(student, **changes)])
    with pytest.raises(UserError, match="and this is 'unet'"):
        pipelines.check(SimpleNamespace(experiment=experiment, space=latents(tmp_path)[1]), [student])


def test_a_network_on_half_as_many_bits_still_samples(tmp_path):
    *_, folder = written(tmp_path, *pixels(), 2)
    pipeline = loaded(folder)
    noise = torch.tensor(np.random.default_rng(0).normal(size=(2, 1, 8, 8)).astype(np.float32))
    whole = pipeline([3, 4], latents=noise, output_type="latent").images
    half = pipeline.to(torch.bfloat16)([3, 4], latents=noise, output_type="latent").images
    assert 0 < (whole - half).abs().max() < 0.5


