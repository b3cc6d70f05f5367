"""Folders of CLIP models as transformers writes them -> our text encoder and image tower."""

from guided_distill.errors import UserError
from guided_distill.files import read_json
from guided_distill.interop import diffusers_names as names
from guided_distill.interop.clip_tokenizer import read_tokenizer
from guided_distill.interop.diffusers_configs import read_text_encoder, read_vision_encoder
from guided_distill.interop.tensors import import_tree
from guided_distill.interop.weight_files import read_safetensors
from guided_distill.models.latent_models import part_shapes

_IGNORED = ("logit_scale", "position_ids")  # the temperature, and tables that older versions wrote


def read_clip(folder):
    """A CLIPModel's folder -> (TextConfig, VisionConfig, {"text": tree, "vision": tree}, ClipTokenizer).

    Raises UserError that names a file that is missing, a key that our networks do not have, or weights that do not fit.
    """
    config_path, weights = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights):
        if not path.is_file():
            raise UserError(f"{path} is missing: give the folder of a CLIP model as transformers writes it")
    said = read_json(config_path)
    if not {"text_config", "vision_config"} <= said.keys():
        raise UserError(f"{config_path} is no CLIP model's: it lacks text_config or vision_config")
    width = said.get("projection_dim", 512)
    projected = {"projection_dim": width, "architectures": ["CLIPTextModelWithProjection"]}
    text = read_text_encoder(said["text_config"] | projected, folder)
    vision = read_vision_encoder(said["vision_config"] | projected, folder)
    state = {key: value for key, value in read_safetensors(weights).items() if not key.endswith(_IGNORED)}
    parts = {"text": ("text_", text, names.text_encoder), "vision": ("vi", vision, names.vision_encoder)}
    params = {
        part: import_tree(
            names_of(config),
            part_shapes(config),
            {key: value for key, value in state.items() if key.startswith(prefix)},
            weights,
        )
        for part, (prefix, config, names_of) in parts.items()
    }
    return text, vision, params, read_tokenizer(folder)
