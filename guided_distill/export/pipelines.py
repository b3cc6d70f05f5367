"""Students as folders of diffusers: those of text in its stock pipelines, where guidance_scale is 1 + w."""

import dataclasses
import importlib.util

import jax

from guided_distill import diffusion
from guided_distill.errors import UserError
from guided_distill.export import class_pipelines
from guided_distill.interop.diffusers_folder import write_diffusers
from guided_distill.interop.latent_folder import read_latent
from guided_distill.teachers import make_module

FOLDER = "diffusers"
_NEEDS = ("diffusers", "torch", "transformers")
_OUTPUTS = ("v", "eps", "x")


def check(this, students):
    """Raises UserError where there is no pipeline for these students, or no diffusers to try them in."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--formats=diffusers: what is written is tried there, and {', '.join(missing)} is not installed; "
            "pip install 'guided_distill[diffusers]'"
        )
    for student in students:
        if student.num_steps is None or student.sampler != "deterministic":
            raise UserError(
                f"--formats=diffusers: {student.name} has no sampler there; name deterministic students of stage two "
                "by --stages"
            )
        if student.network is None or student.model.calls_per_step != 1:
            raise UserError(
                f"--formats=diffusers: {student.name} is not one call of a network of ours a step; leave it to "
                "--formats=bundle or stablehlo"
            )
        if student.model.parameterisation not in _OUTPUTS:
            raise UserError(
                f"--formats=diffusers: {student.name} predicts {student.model.parameterisation}; pipelines know "
                f"{', '.join(_OUTPUTS)}; leave it to --formats=bundle"
            )
    if not _of_text(this):
        class_pipelines.check(this, students)
    elif not isinstance(this.experiment.schedule, diffusion.DiscreteBetas):
        raise UserError("--formats=diffusers: stock schedulers have config.schedule.name 'discrete_betas' only")


def _of_text(this):
    return this.space is not None and this.experiment.data.text_length > 0


def write(directory, this, students, say):
    """Writes directory/diffusers/<name> for each of the students; `say` is told of steps that a pipeline rounds."""
    for student in students:
        folder = directory / FOLDER / student.name
        if not _of_text(this):
            class_pipelines.write(folder, this, student)
            continue
        betas = this.experiment.schedule.num_betas
        if betas % student.num_steps:
            say(
                f"diffusers: {student.name}: {student.num_steps} does not divide the {betas} times of its scheduler, "
                "which goes through others than it was trained at: expect a larger deviation"
            )
        write_diffusers(folder, *_model(this, student), this.space.folder / "tokenizer")


def _model(this, student):
    """(the LatentModel of a student with the frozen parts around it, their parameters)."""
    _, frozen = read_latent(this.space.folder, [part for part in this.space.model.parts if part != "unet"])
    module = make_module(this.experiment, student.model.w_conditioned, student.model.parameterisation)
    model = dataclasses.replace(
        this.space.model,
        unet=module.config,
        parameterisation=student.model.parameterisation,
        latent_side=this.experiment.data.sample_shape[0],
    )
    return model, {"unet": jax.device_get(student.model.params), **frozen}
