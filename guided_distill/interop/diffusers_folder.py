"""Folders of diffusers -> our latent models, and back: configs, weights in safetensors, tokenizer and scheduler."""

import dataclasses
import pathlib
import shutil

import safetensors.numpy

from guided_distill.errors import UserError
from guided_distill.files import read_json, write_json, write_whole
from guided_distill.interop import diffusers_configs as configs
from guided_distill.interop import diffusers_names as names
from guided_distill.interop.tensors import export_tree, import_tree
from guided_distill.interop.weight_files import read_safetensors, read_weights
from guided_distill.models.latent_models import LatentModel, part_shapes

VERSION = "0.42.1"  # whose layout this is: the inpainting pipeline asks for it
# part -> (its folder, stem of its weights' file, its names)
PARTS = {
    "unet": ("unet", "diffusion_pytorch_model", names.unet),
    "autoencoder": ("vae", "diffusion_pytorch_model", names.autoencoder),
    "text_encoder": ("text_encoder", "model", names.text_encoder),
}


def read_diffusers(folder, unet=None):
    """A folder of a Stable Diffusion pipeline -> (LatentModel, {part: parameters f32}).

    `unet`: a file of weights under diffusers' keys (.safetensors, or PyTorch's) in place of the folder's own U-Net,
    whose config still holds but for w, which the file's keys tell of. Raises UserError that names a file that is
    missing, a config that our networks do not have, or the keys that do not fit.
    """
    folder = pathlib.Path(folder).expanduser()
    theirs = {part: _read_config(folder / place / "config.json") for part, (place, *_) in PARTS.items()}
    scheduler = _read_config(folder / "scheduler" / "scheduler_config.json")
    config = configs.read_unet(theirs["unet"], scheduler, folder / "unet")
    given = None if unet is None else read_weights(pathlib.Path(unet).expanduser())
    model = LatentModel(
        config if given is None else _as_taking_w(config, given),
        configs.read_autoencoder(theirs["autoencoder"], folder / "vae"),
        configs.read_text_encoder(theirs["text_encoder"], folder / "text_encoder"),
        configs.read_parameterisation(scheduler, folder / "scheduler"),
        theirs["unet"].get("sample_size") or 64,
    )
    if model.text_encoder.width != config.context_dim:
        raise UserError(
            f"{folder}: the text encoder is {model.text_encoder.width} wide, the U-Net attends to "
            f"{config.context_dim}: they are parts of different models"
        )
    params = {}
    for part, (place, stem, names_of) in PARTS.items():
        ours, from_file = getattr(model, part), part == "unet" and given is not None
        state = given if from_file else _known(part, _read_weights(folder / place, stem))
        params[part] = import_tree(names_of(ours), part_shapes(ours), state, unet if from_file else folder / place)
    return model, params


def _as_taking_w(config, state):
    """The config of a U-Net's weights: it takes w if they hold a matrix for its sinusoid, which is as wide as that."""
    kernel = state.get(f"{names.UNET_ENDS['embedding/w']}.weight")
    if kernel is None:
        return dataclasses.replace(config, w_conditioned=False)
    return dataclasses.replace(config, w_conditioned=True, w_channels=kernel.shape[-1])


def write_diffusers(folder, model, params, tokenizer=None):
    """Writes a folder that StableDiffusionPipeline loads; `tokenizer` is a folder whose files are copied.

    A student's guidance strength is then the pipeline's guidance_scale - 1. Raises UserError for a model that has no
    place there.
    """
    folder = pathlib.Path(folder).expanduser()
    if model.text_encoder is None or model.parameterisation not in ("eps", "v", "x"):
        raise UserError(f"{folder}: diffusers has no pipeline for this model; export it as a bundle")
    written = {
        "unet": configs.write_unet(model.unet, model.latent_side),
        "autoencoder": configs.write_autoencoder(model.autoencoder, model.latent_side),
        "text_encoder": configs.write_text_encoder(model.text_encoder),
    }
    for part, (place, stem, names_of) in PARTS.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        write_json(folder / place / "config.json", written[part])
        state = export_tree(names_of(getattr(model, part)), params[part])
        write_whole(folder / place / f"{stem}.safetensors", safetensors.numpy.save(state, {"format": "pt"}))
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = configs.write_scheduler(model.unet, model.parameterisation)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    write_json(folder / "model_index.json", _index(model))


def _index(model):
    """Which class of which library loads each part."""
    text = "CLIPTextModelWithProjection" if model.text_encoder.projection else "CLIPTextModel"
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if model.unet.extra_channels else "StableDiffusionPipeline",
        "_diffusers_version": VERSION,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "VQModel" if model.autoencoder.num_codes else "AutoencoderKL"],
        "text_encoder": ["transformers", text],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }


def _known(part, state):
    """Their arrays under the names of today's libraries."""
    if part == "autoencoder":
        for old, new in names.OLD_SELF_ATTENTION.items():
            state = {key.replace(old, new) if ".mid_block." in key else key: value for key, value in state.items()}
        # Old folders have 1x1 convolutions where new ones have matrices.
        return {key: value[:, :, 0, 0] if ".to_" in key and value.ndim == 4 else value for key, value in state.items()}
    if part == "text_encoder":
        # A buffer that older versions wrote, and a prefix that newer ones do not.
        state = {key: value for key, value in state.items() if not key.endswith("embeddings.position_ids")}
        bare = not any(key.startswith("text_model.") for key in state)
        return {f"text_model.{key}": value for key, value in state.items()} if bare else state
    return state


def _read_config(path):
    if not path.is_file():
        raise UserError(f"{path} is missing: give the folder of a Stable Diffusion pipeline as diffusers writes it")
    return read_json(path)


def _read_weights(folder, stem):
    """{key: array} of <stem>.safetensors, of the shards that an index beside it lists, or of PyTorch's file of old."""
    index = folder / f"{stem}.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else [f"{stem}.safetensors"]
    old = folder / ("pytorch_model.bin" if stem == "model" else f"{stem}.bin")
    if old.is_file() and not (folder / files[0]).is_file():
        return read_weights(old)
    state = {}
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; diffusers writes it by default")
        state |= read_safetensors(folder / name)
    return state
