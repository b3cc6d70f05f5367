"""Multi-head attention through `jax.nn.dot_product_attention`: cuDNN's where it is known to do, XLA's elsewhere."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v over `heads` heads: x [B, T, C] looks at context [B, L, D] -> [B, T, C].

    `bias` is that of q, k and v; the output has one always. `causal`: token t sees the tokens up to t.
    """

    heads: int
    dtype: jnp.dtype
    bias: bool = False
    causal: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()  # of the output

    @nn.compact
    def __call__(self, x, context):
        channels = x.shape[-1]

        def split(name, h):
            h = nn.Dense(channels, use_bias=self.bias, dtype=self.dtype, name=name)(h)
            return h.reshape(*h.shape[:2], self.heads, channels // self.heads)

        q, k, v = split("q", x), split("k", context), split("v", context)
        h = attend(q, k, v, causal=self.causal)
        return nn.Dense(channels, dtype=self.dtype, kernel_init=self.kernel_init, name="out")(h.reshape(x.shape))


def attend(q, k, v, *, causal=False):
    """softmax(q k^T / sqrt(d)) v for q [B, T, heads, d], k and v [B, L, heads, d]."""
    how = implementation(q.dtype, q.shape[-1], jax.default_backend())
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=how)


def implementation(dtype, head_dim, platform):
    """cuDNN's flash attention for the shapes that every GPU it runs on takes; None, which is XLA's, for all others."""
    flash = platform == "gpu" and jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if flash else None
