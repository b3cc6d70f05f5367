"""A latent model in our own names: config.json and one safetensors file per part, converted once and read often."""

import dataclasses
import pathlib
import shutil

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from guided_distill.errors import UserError
from guided_distill.files import read_json, write_json, write_whole
from guided_distill.interop.weight_files import read_safetensors
from guided_distill.models.autoencoder import AutoencoderConfig
from guided_distill.models.clip import TextConfig
from guided_distill.models.latent_models import LatentModel, part_shapes
from guided_distill.models.sd_unet import SDUNetConfig

_CONFIGS = {"unet": SDUNetConfig, "autoencoder": AutoencoderConfig, "text_encoder": TextConfig}
_AGAIN = "make it again by --mode=import"


def write_latent(folder, model, params, tokenizer=None):
    """Writes a LatentModel and its parameters {part: tree}, float32; the files of the folder `tokenizer` are copied."""
    folder = pathlib.Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for part in model.parts:
        flat = {path: np.asarray(value) for path, value in flatten_dict(params[part], sep="/").items()}
        write_whole(folder / f"{part}.safetensors", safetensors.numpy.save(flat))
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    write_json(folder / "config.json", dataclasses.asdict(model))


def read_latent(folder, parts=None):
    """(LatentModel, {part: parameters f32}) of a folder; of `parts` alone where named.

    Raises UserError for a folder that is none, a part that is missing, and weights that are not this version's.
    """
    folder = pathlib.Path(folder).expanduser()
    model = read_model(folder)
    params = {}
    for part in model.parts if parts is None else parts:
        path = folder / f"{part}.safetensors"
        if not path.is_file():
            raise UserError(f"{path} is missing; {_AGAIN}")
        flat = read_safetensors(path)
        wanted = flatten_dict(part_shapes(getattr(model, part)), sep="/")
        if {name: value.shape for name, value in flat.items()} != {name: leaf.shape for name, leaf in wanted.items()}:
            raise UserError(f"{path} does not hold the {part} of its config.json as this version has it; {_AGAIN}")
        params[part] = unflatten_dict(flat, sep="/")
    return model, params


def is_latent(path):
    """Whether a path is a folder that --mode=import wrote, rather than a run or one of its stages."""
    return (pathlib.Path(path).expanduser() / "unet.safetensors").is_file()


def read_model(folder):
    """The LatentModel of a folder, without its parameters. Raises UserError as `read_latent` does."""
    path = pathlib.Path(folder).expanduser() / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: give a folder that --mode=import --out=... has written")
    said = read_json(path)
    try:
        parts = {part: said[part] and kind(**_tuples(said[part])) for part, kind in _CONFIGS.items()}
        return LatentModel(**said | parts)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not this version's ({error}); {_AGAIN}") from error


def _tuples(said):
    return {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}


def describe(model, params):
    """One line: the parts of a model and how many parameters each has."""
    sizes = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in params.items()}
    counts = ", ".join(f"{part} {size:,}" for part, size in sizes.items())
    return f"{counts} parameters; predicts {model.parameterisation}, latents of {model.latent_side}"
