"""A residual MLP for samples of any shape, with the w input of arXiv 2210.03142, in Flax Linen."""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp

from guided_distill.models.embeddings import Embedding


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Hyper-parameters of the MLP; the defaults suit points in the plane and short signals."""

    features: int = 256
    num_layers: int = 4
    emb_channels: int = 128
    num_classes: int = 10  # 0: no label input. Label num_classes means "no condition".
    out_channels: int = 1  # of the last axis; "both" needs twice the sample's
    w_conditioned: bool = False
    dtype: str = "float32"  # of the computation; parameters stay float32


class Layer(nn.Module):
    """Dense, scale and shift from the embedding, swish, zero Dense; plus the skip: h [B, D], emb [B, E] -> [B, D]."""

    config: MLPConfig

    @nn.compact
    def __call__(self, h, emb):
        features, dtype = self.config.features, jnp.dtype(self.config.dtype)
        scale, shift = jnp.split(nn.Dense(2 * features, dtype=dtype, name="emb")(nn.swish(emb)), 2, axis=-1)
        inner = nn.swish(nn.Dense(features, dtype=dtype, name="dense1")(h) * (1.0 + scale) + shift)
        return h + nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.zeros, name="dense2")(inner)


class MLP(nn.Module):
    """z [B, *S], logsnr [B], label i32 [B] or None, w [B] or None -> [B, *S[:-1], out_channels], float32.

    The network sees z as one vector and has no dropout: `train` changes nothing.
    """

    config: MLPConfig

    @nn.compact
    def __call__(self, z, logsnr, label, w, *, train=False):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        width = config.emb_channels
        embedding = Embedding(width, width, config.num_classes, config.w_conditioned, config.dtype, name="embedding")
        emb = embedding(logsnr, label, w)
        h = nn.Dense(config.features, dtype=dtype, name="dense_in")(z.reshape(z.shape[0], -1))
        for i in range(config.num_layers):
            h = Layer(config, name=f"layer_{i}")(h, emb)
        out_shape = (*z.shape[1:-1], config.out_channels)
        out = nn.Dense(math.prod(out_shape), dtype=dtype, kernel_init=nn.initializers.zeros, name="dense_out")(h)
        return out.reshape(-1, *out_shape).astype(jnp.float32)
