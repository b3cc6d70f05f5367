"""config.json of the parts of a diffusers folder <-> our configs. What our networks do not have is refused by name."""

import dataclasses

from guided_distill.errors import UserError
from guided_distill.models.autoencoder import AutoencoderConfig
from guided_distill.models.clip import ACTIVATIONS, TextConfig, VisionConfig
from guided_distill.models.sd_unet import SDUNetConfig

# Keys that must be absent or have this value: the networks here are so and not otherwise.
UNET_FIXED = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
AUTOENCODER_FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None, "shift_factor": None}
KL_FIXED = AUTOENCODER_FIXED | {"mid_block_add_attention": True, "use_post_quant_conv": True, "use_quant_conv": True}
VQ_FIXED = AUTOENCODER_FIXED | {"norm_type": "group", "mid_block_add_attention": True, "lookup_from_codebook": False}
TEXT_FIXED = {"layer_norm_eps": 1e-5}
SCHEDULER_FIXED = {"beta_schedule": "scaled_linear", "trained_betas": None}
_DOWN, _UP = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")


def read_unet(theirs, scheduler, what):
    """UNet2DConditionModel's config and its scheduler's -> SDUNetConfig. Raises UserError that names the key."""
    _check(theirs, UNET_FIXED, what)
    _check(scheduler, SCHEDULER_FIXED, f"the scheduler of {what}")
    widths, down, up = theirs["block_out_channels"], theirs["down_block_types"], theirs["up_block_types"]
    if not {*down} <= {*_DOWN} or list(up) != [_UP[_DOWN.index(name)] for name in reversed(down)]:
        raise UserError(f"{what}: down_block_types {down} with up_block_types {up} is no U-Net of Stable Diffusion")
    heads = theirs.get("num_attention_heads") or theirs.get("attention_head_dim", 8)  # it means their number
    return SDUNetConfig(
        channels=widths[0],
        multipliers=_multipliers(widths, what),
        num_blocks=_one(theirs.get("layers_per_block", 2), "layers_per_block", what),
        attention=tuple(name == _DOWN[1] for name in down),
        heads=tuple(heads) if isinstance(heads, list | tuple) else (heads,) * len(widths),
        context_dim=_one(theirs.get("cross_attention_dim", 1280), "cross_attention_dim", what),
        linear_projection=theirs.get("use_linear_projection", False),
        norm_groups=theirs.get("norm_num_groups", 32),
        extra_channels=theirs.get("in_channels", 4) - theirs.get("out_channels", 4),
        out_channels=theirs.get("out_channels", 4),
        w_conditioned=theirs.get("time_cond_proj_dim") is not None,
        w_channels=theirs.get("time_cond_proj_dim") or 256,
        betas=(scheduler.get("beta_start", 0.0001), scheduler.get("beta_end", 0.02)),
        num_betas=scheduler.get("num_train_timesteps", 1000),
        zero_terminal_snr=scheduler.get("rescale_betas_zero_snr", False),
    )


def write_unet(config, side):
    """SDUNetConfig -> UNet2DConditionModel's config. Raises UserError for a network that takes a label."""
    if config.num_classes:
        raise UserError("a U-Net that takes a label has no place in a stock pipeline")
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": side,
        "in_channels": config.out_channels + config.extra_channels,
        "out_channels": config.out_channels,
        "block_out_channels": [config.channels * m for m in config.multipliers],
        "layers_per_block": config.num_blocks,
        "down_block_types": [_DOWN[has] for has in config.attention],
        "up_block_types": [_UP[has] for has in reversed(config.attention)],
        "attention_head_dim": list(config.heads),
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.norm_groups,
        "time_cond_proj_dim": config.w_channels if config.w_conditioned else None,
        **UNET_FIXED,
    }


def read_autoencoder(theirs, what):
    """AutoencoderKL's or VQModel's config -> AutoencoderConfig. Raises UserError that names the key."""
    coded = theirs.get("_class_name") == "VQModel"
    _check(theirs, VQ_FIXED if coded else KL_FIXED, what)
    widths, codes = theirs.get("block_out_channels", [64]), theirs.get("vq_embed_dim")
    latent = theirs.get("latent_channels", 4)
    kinds = {*theirs.get("down_block_types", []), *theirs.get("up_block_types", [])}
    if not kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D"} or codes not in (None, latent):
        raise UserError(f"{what}: blocks {sorted(kinds)}, codes of width {codes}: not an autoencoder of these networks")
    return AutoencoderConfig(
        channels=widths[0],
        multipliers=_multipliers(widths, what),
        num_blocks=theirs.get("layers_per_block", 1),
        latent_channels=latent,
        image_channels=theirs.get("in_channels", 3),
        num_codes=theirs.get("num_vq_embeddings", 256) if coded else 0,
        scale=theirs.get("scaling_factor", 0.18215),
        norm_groups=theirs.get("norm_num_groups", 32),
    )


def write_autoencoder(config, side):
    """AutoencoderConfig -> AutoencoderKL's or VQModel's config."""
    levels, coded = len(config.multipliers), config.num_codes > 0
    fixed = VQ_FIXED if coded else KL_FIXED
    own = {"num_vq_embeddings": config.num_codes, "vq_embed_dim": config.latent_channels} if coded else {}
    known = {key: value for key, value in fixed.items() if not (coded and key in AUTOENCODER_FIXED and value is None)}
    return {
        "_class_name": "VQModel" if coded else "AutoencoderKL",
        "sample_size": side * config.factor,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": [config.channels * m for m in config.multipliers],
        "layers_per_block": config.num_blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scale,
        **known,
        **own,
    }


_TEXT_KEYS = {
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "activation": "hidden_act",
}


def read_text_encoder(theirs, what):
    """CLIPTextModel's config -> TextConfig. Raises UserError that names the key."""
    _check(theirs, TEXT_FIXED, what)
    defaults = dataclasses.asdict(TextConfig(width=512, layers=12, heads=8, mlp=2048))  # transformers' own
    values = _clip_values(theirs, _TEXT_KEYS, defaults, what)
    projected = "CLIPTextModelWithProjection" in (theirs.get("architectures") or ())
    return TextConfig(**values, projection=theirs.get("projection_dim", 512) if projected else 0)


_VISION_KEYS = {
    "side": "image_size",
    "patch": "patch_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp": "intermediate_size",
    "activation": "hidden_act",
    "projection": "projection_dim",
}


def read_vision_encoder(theirs, what):
    """CLIPVisionModel's config -> VisionConfig. Raises UserError that names the key."""
    _check(theirs, TEXT_FIXED, what)
    defaults = dataclasses.asdict(VisionConfig(patch=32, width=768, layers=12, heads=12, mlp=3072, projection=512))
    return VisionConfig(**_clip_values(theirs, _VISION_KEYS, defaults, what))


def _clip_values(theirs, keys, defaults, what):
    values = {ours: theirs.get(key, defaults[ours]) for ours, key in keys.items()}
    if values["activation"] not in ACTIVATIONS:
        raise UserError(f"{what}: hidden_act is {values['activation']!r}; there are {', '.join(ACTIVATIONS)}")
    return values


def write_text_encoder(config):
    """TextConfig -> CLIPTextModel's config."""
    model = "CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"
    return {
        "architectures": [model],
        "model_type": "clip_text_model",
        **{key: getattr(config, ours) for ours, key in _TEXT_KEYS.items()},
        "projection_dim": config.projection or config.width,
        "bos_token_id": config.vocabulary - 2,
        "eos_token_id": config.vocabulary - 1,
        **TEXT_FIXED,
    }


def write_scheduler(config, parameterisation):
    """The DDIM of our deterministic sampler: grids that end at index 999 and step to 0, which has no noise."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.num_betas,
        "beta_start": config.betas[0],
        "beta_end": config.betas[1],
        "prediction_type": {"eps": "epsilon", "v": "v_prediction", "x": "sample"}[parameterisation],
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "set_alpha_to_one": True,
        "clip_sample": False,
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        **SCHEDULER_FIXED,
    }


def read_parameterisation(scheduler, what):
    """What the U-Net predicts. Raises UserError for what is not known here."""
    known = {"epsilon": "eps", "v_prediction": "v", "sample": "x"}
    said = scheduler.get("prediction_type", "epsilon")
    if said not in known:
        raise UserError(f"{what}: prediction_type is {said!r}; it must be one of {', '.join(known)}")
    return known[said]


def _check(theirs, fixed, what):
    for key, value in fixed.items():
        if theirs.get(key, value) != value:
            raise UserError(f"{what}: {key} is {theirs[key]!r}; the networks here have {value!r} only")


def _multipliers(widths, what):
    if any(width % widths[0] for width in widths):
        raise UserError(f"{what}: block_out_channels {widths} are not multiples of the first")
    return tuple(width // widths[0] for width in widths)


def _one(value, key, what):
    if isinstance(value, list | tuple):
        if len({*value}) > 1:
            raise UserError(f"{what}: {key} is {value}; the networks here have one value for all levels")
        return value[0]
    return value
