"""Autoencoders of latent diffusion (arXiv 2112.10752, section 3.1) in Flax Linen, NHWC: KL-regularised and quantised.

Counted in `tests/test_autoencoder.py`: 83,653,863 parameters for Stable Diffusion's and 55,322,782 for VQ-f4, its
codebook included.
"""

import dataclasses
import itertools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from guided_distill.models.latent_blocks import Downsample, ResnetBlock, SelfAttention, Upsample, conv
from guided_distill.models.norm import GroupNorm

_EPSILON = 1e-6  # of every GroupNorm here


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Hyper-parameters of an autoencoder; the defaults are Stable Diffusion's, AUTOENCODERS has others."""

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # each level but the last halves the side
    num_blocks: int = 2  # per level of the encoder; the decoder has one more
    latent_channels: int = 4
    image_channels: int = 3
    num_codes: int = 0  # of the codebook; 0: a Gaussian posterior in its place
    scale: float = 0.18215  # diffusion runs on scale times the latent
    norm_groups: int = 32
    dtype: str = "float32"  # of the computation; parameters stay float32
    remat: bool = False  # recompute each block in the backward pass

    @property
    def factor(self):
        """Side of an image over the side of its latent."""
        return 2 ** (len(self.multipliers) - 1)


AUTOENCODERS = {
    "sd": AutoencoderConfig(),
    "vq_f4": AutoencoderConfig(multipliers=(1, 2, 4), latent_channels=3, num_codes=8192, scale=1.0),
}


class Posterior(NamedTuple):
    """q(latent | image) as the encoder says it: mean and log-variance, both [B, h, w, latent_channels], unscaled."""

    mean: jax.Array
    logvar: jax.Array

    def sample(self, noise):
        """mean + std noise; noise ~ N(0, I) of the mean's shape."""
        return self.mean + jnp.exp(0.5 * self.logvar) * noise


class _Half(nn.Module):
    """What the encoder and the decoder have in common: their blocks."""

    config: AutoencoderConfig

    def resnet(self, h, name, level):
        config = self.config
        block = nn.remat(ResnetBlock) if config.remat else ResnetBlock
        features = config.channels * config.multipliers[level]
        return block(features, config.norm_groups, _EPSILON, jnp.dtype(config.dtype), name=name)(h)

    def middle(self, h):
        config = self.config
        h = self.resnet(h, "mid_0", -1)
        h = SelfAttention(config.norm_groups, _EPSILON, jnp.dtype(config.dtype), name="mid_attention")(h)
        return self.resnet(h, "mid_1", -1)

    def last(self, h, features):
        h = GroupNorm(self.config.norm_groups, jnp.dtype(self.config.dtype), _EPSILON, name="norm_out")(h, swish=True)
        return conv(features, jnp.dtype(self.config.dtype), name="conv_out")(h)


class Encoder(_Half):
    """Image [B, H, W, image_channels] -> [B, h, w, latent_channels], twice the channels for a Gaussian posterior."""

    @nn.compact
    def __call__(self, x):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        h = conv(config.channels, dtype, name="conv_in")(x.astype(dtype))
        for level in range(len(config.multipliers)):
            for i in range(config.num_blocks):
                h = self.resnet(h, f"down_{level}_{i}", level)
            if level != len(config.multipliers) - 1:
                # The published networks pad at the right and at the bottom only.
                h = Downsample((0, 1), dtype, name=f"down_{level}_resample")(h)
        h = self.middle(h)
        return self.last(h, config.latent_channels * (1 if config.num_codes else 2))


class Decoder(_Half):
    """Latent [B, h, w, latent_channels] -> image [B, H, W, image_channels]."""

    @nn.compact
    def __call__(self, z):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        h = conv(config.channels * config.multipliers[-1], dtype, name="conv_in")(z)
        h = self.middle(h)
        for level in reversed(range(len(config.multipliers))):
            for i in range(config.num_blocks + 1):
                h = self.resnet(h, f"up_{level}_{i}", level)
            if level:
                h = Upsample(dtype, name=f"up_{level}_resample")(h)
        return self.last(h, config.image_channels)


class Autoencoder(nn.Module):
    """Images [B, H, W, 3] in [-1, 1] <-> latents [B, H / factor, W / factor, C] for diffusion, both float32."""

    config: AutoencoderConfig

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        moments = config.latent_channels * (1 if config.num_codes else 2)
        self.conv_to_latent = conv(moments, dtype, kernel=1)
        self.conv_from_latent = conv(config.latent_channels, dtype, kernel=1)
        if config.num_codes:
            self.codebook = nn.Embed(config.num_codes, config.latent_channels)

    def __call__(self, x):
        """Encodes and decodes, for the parameters' sake: image -> image."""
        moments = self.moments(x)
        return self.decode(self.config.scale * (moments if self.config.num_codes else moments.mean))

    def moments(self, x):
        """Image -> Posterior, or the unquantised latent of an autoencoder with a codebook; neither is scaled."""
        h = self.conv_to_latent(self.encoder(x)).astype(jnp.float32)
        if self.config.num_codes:
            return h
        mean, logvar = jnp.split(h, 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def encode(self, x, noise=None):
        """Image -> scaled latent: a sample of the posterior for `noise` ~ N(0, I) of its shape, else its mean."""
        moments = self.moments(x)
        if self.config.num_codes:
            return self.config.scale * moments
        return self.config.scale * (moments.mean if noise is None else moments.sample(noise))

    def decode(self, z):
        """Scaled latent -> image; with a codebook each position first becomes its nearest code."""
        z = z / self.config.scale
        if self.config.num_codes:
            z = self.codebook(self.codes(z)).astype(jnp.float32)
        h = self.conv_from_latent(z.astype(self.config.dtype))
        return self.decoder(h).astype(jnp.float32)

    def codes(self, z):
        """Unscaled latent [B, h, w, C] -> index of the nearest code in the Euclidean distance, i32 [B, h, w]."""
        table = self.codebook.embedding.astype(jnp.float32)
        products = jnp.einsum("bhwc,kc->bhwk", z, table, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin((table**2).sum(-1)[None, None, None] - 2.0 * products, axis=-1).astype(jnp.int32)


def tiled_decode(decode, z, *, factor, tile=64, overlap=16):
    """Decodes a large latent tile by tile, so that memory does not grow with the image: z [B, h, w, C] -> image.

    `decode` takes latents of side `tile`, and is compiled once if it is jitted. Tiles overlap by at least `overlap` and
    fade into each other linearly there. GroupNorm sees one tile at a time, so that the result is near the whole
    decoder's and not equal to it. A latent that fits one tile is decoded as it is.
    """
    height, width = z.shape[1:3]
    if max(height, width) <= tile:
        return decode(z)
    sides = min(tile, height), min(tile, width)
    total = weight = 0.0
    for top, left in itertools.product(_starts(height, sides[0], overlap), _starts(width, sides[1], overlap)):
        image = np.asarray(decode(z[:, top : top + sides[0], left : left + sides[1]]), np.float32)
        fade = _fade(sides[0], overlap, factor)[:, None] * _fade(sides[1], overlap, factor)[None]
        around = [(0, 0), (top, height - top - sides[0]), (left, width - left - sides[1]), (0, 0)]
        around = [(before * factor, after * factor) for before, after in around]
        total = total + np.pad(image * fade[None, :, :, None], around)
        weight = weight + np.pad(fade[None, :, :, None], around)
    return total / weight


def _starts(length, side, overlap):
    """Where tiles begin: evenly, the first at 0 and the last at the end, overlapping by `overlap` or more."""
    if length == side:
        return [0]
    count = 1 - (side - length) // (side - overlap)
    return np.linspace(0, length - side, count).round().astype(int).tolist()


def _fade(side, overlap, factor):
    """Weights of the pixels of a tile along one axis: rising over `overlap`, then one, then falling."""
    pixel = np.arange(side * factor, dtype=np.float32) + 0.5
    ramp = np.minimum(pixel, pixel[::-1]) / max(overlap * factor, 1)
    return np.minimum(ramp, 1.0)
