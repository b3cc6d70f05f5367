"""Blocks that the Stable Diffusion U-Net and the autoencoders of latent diffusion share, NHWC (arXiv 2112.10752)."""

import flax.linen as nn
import jax.numpy as jnp

from guided_distill.models.attention import Attention
from guided_distill.models.conv import conv_general_dilated
from guided_distill.models.norm import GroupNorm
from guided_distill.models.unet import upsample


def conv(features, dtype, *, kernel=3, strides=1, padding="SAME", zero_init=False, name=None):
    """A Linen convolution with square kernel; `padding` as Linen takes it."""
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=strides,
        padding=padding,
        dtype=dtype,
        kernel_init=nn.initializers.zeros if zero_init else nn.initializers.lecun_normal(),
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


class ResnetBlock(nn.Module):
    """x [B, H, W, C], emb [B, E] or none -> [B, H, W, features]; the embedding is added between the convolutions."""

    features: int
    norm_groups: int
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, emb=None):
        def norm(name, h):
            return GroupNorm(self.norm_groups, self.dtype, self.epsilon, name=name)(h, swish=True)

        h = conv(self.features, self.dtype, name="conv1")(norm("norm1", x))
        if emb is not None:
            h = h + nn.Dense(self.features, dtype=self.dtype, name="emb")(nn.swish(emb))[:, None, None]
        h = conv(self.features, self.dtype, zero_init=True, name="conv2")(norm("norm2", h))
        if x.shape[-1] != self.features:
            x = conv(self.features, self.dtype, kernel=1, name="skip")(x)
        return x + h


class Upsample(nn.Module):
    """Twice the side: each pixel four times, then a convolution."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        return conv(x.shape[-1], self.dtype, name="conv")(upsample(x))


class Downsample(nn.Module):
    """Half the side, by a convolution of stride 2; `padding` (before, after) on both axes."""

    padding: tuple[int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        return conv(x.shape[-1], self.dtype, strides=2, padding=(self.padding, self.padding), name="conv")(x)


class SelfAttention(nn.Module):
    """GroupNorm, attention of one head over all positions, residual: x [B, H, W, C] -> the same."""

    norm_groups: int
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        h = GroupNorm(self.norm_groups, self.dtype, self.epsilon, name="norm")(x)
        h = h.reshape(x.shape[0], -1, x.shape[-1])
        attention = Attention(1, self.dtype, bias=True, kernel_init=nn.initializers.zeros, name="attention")
        return x + attention(h, h).reshape(x.shape)
