"""Students of classes, of pixels or latents, as diffusers folders that bring their own pipeline along."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import safetensors.numpy

from guided_distill.errors import UserError
from guided_distill.files import write_json, write_whole
from guided_distill.interop import diffusers_configs, diffusers_folder, diffusers_names
from guided_distill.interop.latent_folder import read_latent
from guided_distill.interop.pixel_unet_names import to_torch
from guided_distill.interop.tensors import export_tree
from guided_distill.models.sd_unet import timestep
from guided_distill.teachers import make_module

_CODE = pathlib.Path(__file__).parent / "class_folder"
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def check(this, students):
    """Raises UserError for what the pipeline does not know: other networks, conditions and samples."""
    experiment, model = this.experiment, students[0].model
    network = "unet" if this.space is None else "sd_unet"
    if experiment.backbone != network:
        raise UserError(f"--formats=diffusers: in PyTorch there are config.model.name 'unet' of pixels and 'sd_unet' "
                        f"of latents, and this is {experiment.backbone!r}; export --formats=bundle")  # fmt: skip
    if model.cond_fields:
        names = ", ".join(name for name, *_ in model.cond_fields)
        raise UserError(f"--formats=diffusers: the pipeline of classes knows labels and w, not {names}; "
                        "--mode=sample draws from the run")  # fmt: skip
    shape = model.sample_shape
    if len(shape) != 3 or shape[0] != shape[1] or (this.space is None and model.data_range != 1.0):
        raise UserError(f"--formats=diffusers: samples are {'x'.join(map(str, shape))} in a range of "
                        f"{model.data_range}; its pictures are square, in a range of 1; export a bundle")  # fmt: skip


def write(folder, this, student):
    """Writes the folder of one student: weights, configs, and the code that DiffusionPipeline loads them by."""
    module = make_module(this.experiment, student.model.w_conditioned, student.model.parameterisation)
    params = jax.device_get(student.model.params)
    parts = {"vae": [None, None], "classes": [None, None]}
    if this.experiment.backbone == "unet":
        parts["unet"] = _write_pixel_unet(folder, this, module.config, params)
    else:
        parts |= _write_latent_parts(folder, this, module.config, params)
    parts["scheduler"] = _write_scheduler(folder, this, student, module.config)
    low, high = student.w_range
    scalars = {"num_classes": student.model.num_classes, "w_min": float(low), "w_max": float(high)}
    scalars["noise_std"] = float(student.model.schedule.prior_std)
    index = {"_class_name": ["pipeline", "FewStepClassPipeline"], "_diffusers_version": diffusers_folder.VERSION}
    shutil.copy(_CODE / "pipeline.py", folder / "pipeline.py")
    write_json(folder / "model_index.json", index | parts | scalars)


def _write_pixel_unet(folder, this, config, params):
    side, _, channels = this.experiment.data.sample_shape
    known = dataclasses.asdict(config)
    for name in ("text", "dtype", "remat", "remat_policy"):  # of training alone
        del known[name]
    known |= {"_class_name": "PixelUNet", "sample_size": side, "in_channels": channels}
    return _write_part(folder, "unet", "pixel_unet", known, to_torch(params))


def _write_latent_parts(folder, this, config, params):
    params, table = dict(params), params["classes"]["embedding"]
    del params["classes"]
    of_text = dataclasses.replace(config, num_classes=0)  # the stock network, which attends to what it is given
    side = this.experiment.data.sample_shape[0]
    unet = diffusers_configs.write_unet(of_text, side)
    model, frozen = read_latent(this.space.folder, ["autoencoder"])
    vae = diffusers_configs.write_autoencoder(model.autoencoder, side)
    classes = {"_class_name": "ClassTable", "num_classes": config.num_classes, "dim": config.context_dim}
    return {
        "unet": _write_part(folder, "unet", None, unet, export_tree(diffusers_names.unet(of_text), params)),
        "vae": _write_part(
            folder,
            "vae",
            None,
            vae,
            export_tree(diffusers_names.autoencoder(model.autoencoder), frozen["autoencoder"]),
        ),
        "classes": _write_part(folder, "classes", "class_table", classes, {"table.weight": np.asarray(table)}),
    }


def _write_scheduler(folder, this, student, config):
    """The student's own grid points: what the network is told of them, and how much of image and noise there is."""
    stride = this.grid.num_intervals // student.num_steps
    points = jax.tree.map(lambda table: np.asarray(table)[::stride], jax.device_get(this.grid))
    times = points.logsnr[1:]
    if this.experiment.backbone == "sd_unet":
        times = np.asarray(timestep(times, *config.betas, config.num_betas, config.zero_terminal_snr))
    known = {
        "_class_name": "GridScheduler",
        "times": times.tolist(),
        "alphas": points.alpha.tolist(),
        "sigmas": points.sigma.tolist(),
        "prediction_type": student.model.parameterisation,
        "clip": student.model.data_range,
    }
    (folder / "scheduler").mkdir(parents=True)
    shutil.copy(_CODE / "grid_scheduler.py", folder / "scheduler")
    write_json(folder / "scheduler" / "scheduler_config.json", known)
    return ["grid_scheduler", "GridScheduler"]


def _write_part(folder, name, code, config, state):
    """Writes one part, by code of its own or of diffusers, and returns who loads it."""
    place = folder / name
    place.mkdir(parents=True)
    if code is not None:
        shutil.copy(_CODE / f"{code}.py", place)
    write_json(place / "config.json", {"_diffusers_version": diffusers_folder.VERSION, **config})
    write_whole(place / _WEIGHTS, safetensors.numpy.save(state, {"format": "pt"}))
    return [code or "diffusers", config["_class_name"]]
