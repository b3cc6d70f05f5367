"""The diffusion transformer of arXiv 2212.09748 with the w input of arXiv 2210.03142, in Flax Linen, NHWC.

Counted in `tests/test_dit.py` on latents 32x32x4 with 1000 classes and 8 outputs, before the branch that takes w:
32,865,056 parameters for DiT-S/2, 130,315,808 for B/2, 457,840,672 for L/2 and 674,834,720 for XL/2.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from guided_distill.models.attention import attend
from guided_distill.models.embeddings import Embedding
from guided_distill.models.remat import rematerialised


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Hyper-parameters of the diffusion transformer; the defaults are DiT-S/2 (arXiv 2212.09748, table 1)."""

    hidden: int = 384  # a multiple of 4 and of heads
    depth: int = 12
    heads: int = 6
    patch: int = 2  # sides of the image are multiples of it
    mlp_ratio: float = 4.0
    num_classes: int = 1000  # 0: no label input. Label num_classes means "no condition".
    out_channels: int = 4  # "both" needs twice the image's
    w_conditioned: bool = False
    dtype: str = "float32"  # of the computation; parameters stay float32
    remat: bool = False  # recompute each block in the backward pass
    remat_policy: str = "nothing"  # what a block that is recomputed keeps, a key of remat.POLICIES


def _dense(features, dtype, *, zero_init=False, name=None):
    kernel_init = nn.initializers.zeros if zero_init else nn.initializers.xavier_uniform()
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)


def _modulated(x, shift, scale):
    """LayerNorm of x [B, T, D] with the example's own scale and shift [B, 1, D] (adaLN) in place of learnt ones."""
    norm = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False, dtype=x.dtype)
    return norm(x) * (1.0 + scale) + shift


class Block(nn.Module):
    """Self-attention, then an MLP, each after adaLN and behind a gate: tokens x [B, T, D], emb [B, D] -> [B, T, D].

    Shifts, scales and gates are one linear map of the embedding that starts at zero, so that a new block is the
    identity (adaLN-zero, arXiv 2212.09748, section 3.2).
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, x, emb):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        b, tokens, hidden = x.shape
        modulation = _dense(6 * hidden, dtype, zero_init=True, name="modulation")(nn.swish(emb))[:, None]
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)

        h = _dense(3 * hidden, dtype, name="qkv")(_modulated(x, shift_1, scale_1))
        q, k, v = (part.reshape(b, tokens, config.heads, -1) for part in jnp.split(h, 3, axis=-1))
        h = attend(q, k, v).reshape(b, tokens, hidden)
        x = x + gate_1 * _dense(hidden, dtype, name="out")(h)

        h = _dense(int(config.mlp_ratio * hidden), dtype, name="mlp1")(_modulated(x, shift_2, scale_2))
        return x + gate_2 * _dense(hidden, dtype, name="mlp2")(nn.gelu(h, approximate=True))


class DiT(nn.Module):
    """z [B, H, W, C], logsnr [B], label i32 [B] or None, w [B] or None -> [B, H, W, out_channels], float32.

    The network has no dropout: `train` changes nothing.
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, z, logsnr, label, w, *, train=False):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        block = rematerialised(Block, config)
        height, width = (side // config.patch for side in z.shape[1:3])
        embedding = Embedding(
            256, config.hidden, config.num_classes, config.w_conditioned, config.dtype, name="embedding"
        )
        emb = embedding(logsnr, label, w)
        positions = position_table(height, width, config.hidden).astype(dtype)
        h = _dense(config.hidden, dtype, name="dense_in")(patchify(z, config.patch)) + positions[None]
        for i in range(config.depth):
            h = block(config, name=f"block_{i}")(h, emb)
        modulation = _dense(2 * config.hidden, dtype, zero_init=True, name="modulation_out")(nn.swish(emb))[:, None]
        h = _modulated(h, *jnp.split(modulation, 2, axis=-1))
        h = _dense(config.patch**2 * config.out_channels, dtype, zero_init=True, name="dense_out")(h)
        return unpatchify(h, height, width, config.patch).astype(jnp.float32)


def position_table(height, width, dim):
    """Fixed positions [height * width, dim] of tokens in reading order, float32; dim is a multiple of 4.

    [sin, cos] of the column, then of the row, times 1e4^(-4 j / dim), j < dim / 4 (arXiv 2212.09748, published code).
    """
    frequencies = 1e4 ** (-4.0 / dim * jnp.arange(dim // 4, dtype=jnp.float32))
    row, column = jnp.divmod(jnp.arange(height * width), width)
    angles = (position[:, None] * frequencies[None] for position in (column, row))
    return jnp.concatenate([wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)], axis=-1)


def patchify(x, patch):
    """Cuts images [B, H, W, C] into tokens [B, H W / patch^2, patch^2 C], in reading order."""
    b, height, width, c = x.shape
    x = x.reshape(b, height // patch, patch, width // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * c)


def unpatchify(tokens, height, width, patch):
    """Undoes patchify: height * width tokens, [B, height width, patch^2 C] -> [B, height patch, width patch, C]."""
    b, _, features = tokens.shape
    x = tokens.reshape(b, height, width, patch, patch, features // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height * patch, width * patch, -1)
