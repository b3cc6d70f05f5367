"""Single-file checkpoints of CompVis and Stability AI (Stable Diffusion, LDM) -> our latent models, and back."""

import pathlib
import re

import numpy as np
import safetensors.numpy

from guided_distill.errors import UserError
from guided_distill.files import write_whole
from guided_distill.interop import compvis_names as names
from guided_distill.interop.tensors import export_tree, import_tree
from guided_distill.interop.weight_files import read_weights
from guided_distill.models.latent_models import LATENT_MODELS, part_shapes

PARTS = {"unet": names.unet, "autoencoder": names.autoencoder, "text_encoder": names.text_encoder}
# What such files hold besides the networks: tables of the noise levels, counters, the autoencoder's training loss,
# the last layer of OpenCLIP's text encoder, which is not used, and its projection and temperature.
IGNORED = (
    r"(alphas|betas|sqrt_|log_one_minus|posterior_|lvlb_weights|logvar|scale_factor|model_ema\.).*",
    r"first_stage_model\.(loss\.|model_ema\.).*",
    r"first_stage_model\.quantize\.(used|re_embed).*",
    r"cond_stage_model\..*\.position_ids",
    r"cond_stage_model\.model\.(text_projection|logit_scale|attn_mask)",
)
_EMA = "model_ema."


def read_compvis(path, name):
    """A checkpoint (.ckpt, .safetensors) of the kind LATENT_MODELS[name] -> (LatentModel, {part: parameters f32}).

    The U-Net is its moving average where the file has one. Raises UserError that names an unknown kind, a file that is
    missing, and the keys that do not fit.
    """
    path, model = pathlib.Path(path).expanduser(), _model(name)
    state = _averaged(read_weights(path), path)
    used = _apart(state, model)
    used = {key: value for key, value in used.items() if not any(re.fullmatch(p, key) for p in IGNORED)}
    params = {}
    for part in model.parts:
        config = getattr(model, part)
        wanted = PARTS[part](config).their_shapes(part_shapes(config)).keys()
        own = {key: used.pop(key) for key in wanted if key in used}
        params[part] = import_tree(PARTS[part](config), part_shapes(config), own, f"{path}, read as {name},")
    if used:
        raise UserError(
            f"{path} is no {name}: left over are {', '.join(sorted(used)[:3])} and {max(len(used) - 3, 0)} more; "
            f"there are {', '.join(LATENT_MODELS)}"
        )
    return model, params


def write_compvis(path, model, params):
    """Writes such a checkpoint as safetensors. Raises UserError for a student: w has no place in it."""
    if model.unet.w_conditioned:
        raise UserError(f"{path}: a CompVis checkpoint has no place for the w input; write a diffusers folder")
    state = {}
    for part in model.parts:
        state |= export_tree(PARTS[part](getattr(model, part)), params[part])
    write_whole(path, safetensors.numpy.save(_together(state)))


def _model(name):
    if name not in LATENT_MODELS:
        raise UserError(f"{name!r} is no kind of latent model; there are {', '.join(LATENT_MODELS)}")
    return LATENT_MODELS[name]


def _averaged(state, path):
    """The moving average of the U-Net in the place of its last weights."""
    averages = {key for key in state if key.startswith(_EMA)} - {f"{_EMA}decay", f"{_EMA}num_updates"}
    if not averages:
        return state
    theirs = {key: _EMA + key.removeprefix("model.").replace(".", "") for key in state if key.startswith("model.")}
    if missing := sorted(set(theirs.values()) - averages):
        raise UserError(f"{path}: the moving average lacks {missing[0]} and {len(missing) - 1} more")
    return state | {key: state[average] for key, average in theirs.items()}


_FUSED = re.compile(r"(.*\.attn)\.in_proj_(weight|bias)")
_LAYER = re.compile(r"cond_stage_model\.model\.transformer\.resblocks\.(\d+)\..*")


def _apart(state, model):
    """q, k and v by themselves, and of OpenCLIP's layers only those that are used."""
    found = {}
    for key, value in state.items():
        layer, fused = _LAYER.fullmatch(key), _FUSED.fullmatch(key)
        if layer and model.text_encoder is not None and int(layer[1]) == model.text_encoder.layers:
            continue
        if fused:
            parts = zip("qkv", np.split(value, 3), strict=True)
            found |= {f"{fused[1]}.{name}.{fused[2]}": part for name, part in parts}
        else:
            found[key] = value
    return found


def _together(state):
    """The inverse of `_apart`, but for the layer that is not used."""
    found = {}
    for key, value in state.items():
        part = re.fullmatch(r"(cond_stage_model\.model\..*\.attn)\.([qkv])\.(weight|bias)", key)
        if part is None:
            found[key] = value
        elif part[2] == "q":
            found[f"{part[1]}.in_proj_{part[3]}"] = np.concatenate([state[f"{part[1]}.{n}.{part[3]}"] for n in "qkv"])
    return found
