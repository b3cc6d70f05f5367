"""Sinusoidal embeddings of scalars: the noise level and the guidance strength."""

import jax.numpy as jnp


def sinusoid(position, dim):
    """[sin, cos] of position [B] times exp(-ln(1e4) j / (dim/2 - 1)), j < dim/2: [B, dim] (arXiv 2107.00630)."""
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(1e4) * jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angle = position.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def noise_level(logsnr):
    """arctan(exp(-logsnr / 2)) / (pi / 2) in [0, 1] (arXiv 2202.00512): for the cosine schedule, t within 3e-5."""
    return jnp.arctan(jnp.exp(-0.5 * jnp.clip(logsnr, -20.0, 20.0))) / (0.5 * jnp.pi)
