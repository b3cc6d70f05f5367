"""Whole latent diffusion models: which U-Net, autoencoder and text encoder belong together, and what they predict."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from guided_distill.models.autoencoder import AUTOENCODERS, Autoencoder, AutoencoderConfig
from guided_distill.models.clip import TEXT_ENCODERS, TextConfig, TextEncoder, VisionConfig, VisionEncoder
from guided_distill.models.sd_unet import SD_UNETS, SDUNet, SDUNetConfig

PARTS = ("unet", "autoencoder", "text_encoder")


@dataclasses.dataclass(frozen=True)
class LatentModel:
    """The configs of the parts; their parameters go beside it as {"unet": ..., "autoencoder": ..., ...}."""

    unet: SDUNetConfig
    autoencoder: AutoencoderConfig
    text_encoder: TextConfig | None  # None: the U-Net takes a label
    parameterisation: str = "eps"  # or "v"
    latent_side: int = 64  # that it was trained at

    @property
    def parts(self):
        """Names of the parts it has."""
        return tuple(part for part in PARTS if getattr(self, part) is not None)


_SD = AUTOENCODERS["sd"]
LATENT_MODELS = {
    "sd1": LatentModel(SD_UNETS["sd1"], _SD, TEXT_ENCODERS["sd1"]),
    "sd1_inpainting": LatentModel(SD_UNETS["sd1_inpainting"], _SD, TEXT_ENCODERS["sd1"]),
    "sd2_base": LatentModel(SD_UNETS["sd2"], _SD, TEXT_ENCODERS["sd2"]),
    "sd2_768": LatentModel(SD_UNETS["sd2"], _SD, TEXT_ENCODERS["sd2"], parameterisation="v", latent_side=96),
    "ldm_imagenet256": LatentModel(SD_UNETS["ldm_imagenet256"], AUTOENCODERS["vq_f4"], None),
}


@functools.cache
def part_shapes(config):
    """The tree of parameters of a part, by its config, as ShapeDtypeStructs: nothing is computed."""
    return jax.eval_shape(_INITS[type(config)](config), jax.random.key(0))["params"]


def _unet_init(config):
    side = 2 ** (len(config.multipliers) - 1)
    parts = {"z": config.out_channels}
    if config.extra_channels:
        parts |= {"mask": 1, "masked": config.extra_channels - 1}
    z, *rest = (jnp.zeros((1, side, side, channels)) for channels in parts.values())
    named = dict(zip(list(parts)[1:], rest, strict=True)) | {"text": jnp.zeros((1, 1, config.context_dim))}
    label, one = jnp.zeros(1, jnp.int32), jnp.zeros(1)
    return lambda key: SDUNet(config).init(key, z, one, label, one, **named)


def _autoencoder_init(config):
    image = jnp.zeros((1, config.factor, config.factor, config.image_channels))
    return lambda key: Autoencoder(config).init(key, image)


def _text_init(config):
    return lambda key: TextEncoder(config).init(key, jnp.zeros((1, config.positions), jnp.int32))


def _vision_init(config):
    return lambda key: VisionEncoder(config).init(key, jnp.zeros((1, config.side, config.side, 3)))


_INITS = {
    SDUNetConfig: _unet_init,
    AutoencoderConfig: _autoencoder_init,
    TextConfig: _text_init,
    VisionConfig: _vision_init,
}
