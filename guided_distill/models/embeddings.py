"""The conditioning of every backbone: noise level, label and guidance strength as one vector per example."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def sinusoid(position, dim):
    """[sin, cos] of position [B] times exp(-ln(1e4) j / (dim/2 - 1)), j < dim/2: [B, dim] (arXiv 2107.00630)."""
    half = dim // 2
    # By NumPy: at angles of 1000 another rounding of these shows, and platforms round exp differently.
    step = np.log(np.float32(1e4)) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
    angle = position.astype(jnp.float32)[:, None] * frequencies[None, :]
    # Of jnp.cos, but not of lax.cos, jax2onnx makes the sine of angle + pi/2, which at angles of 1000 rounds to 1e-4.
    return jnp.concatenate([jnp.sin(angle), jax.lax.cos(angle)], axis=-1)


def noise_level(logsnr):
    """arctan(exp(-logsnr / 2)) / (pi / 2) in [0, 1] (arXiv 2202.00512): for the cosine schedule, t within 3e-5."""
    return jnp.arctan(jnp.exp(-0.5 * jnp.clip(logsnr, -20.0, 20.0))) / (0.5 * jnp.pi)


class Embedding(nn.Module):
    """One vector [B, emb_channels] from log-SNR, label and, in a student, w (arXiv 2210.03142, section 3.1).

    Sinusoids are `channels` wide. Label num_classes means "no condition": its one-hot is zero and leaves the bias, so
    that kernel and bias together are a table of num_classes + 1 rows. Without classes there is no label input. The w
    branch ends in zeros: a student made from its teacher equals the teacher's conditional model for every w.
    """

    channels: int
    emb_channels: int
    num_classes: int
    w_conditioned: bool
    dtype: str

    @nn.compact
    def __call__(self, logsnr, label, w):
        dense = functools.partial(nn.Dense, self.emb_channels, dtype=jnp.dtype(self.dtype))
        emb = sinusoid(1000.0 * noise_level(logsnr), self.channels)
        emb = dense(name="time2")(nn.swish(dense(name="time1")(emb)))
        if self.num_classes:
            emb = emb + dense(name="label")(jax.nn.one_hot(label, self.num_classes))
        if self.w_conditioned:
            branch = nn.swish(dense(name="w1")(sinusoid(1000.0 * w, self.channels)))
            emb = emb + dense(kernel_init=nn.initializers.zeros, name="w2")(branch)
        return emb
