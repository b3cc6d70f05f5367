"""Multi-head attention: cuDNN's on GPUs and JAX's splash kernel on TPUs where they are known to do, else XLA's own."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

IMAGINED = "imagined"  # the device_kind of `sharding.imagined`: nothing is computed on it
_LANES = 128  # of a TPU: what a block of tokens is a multiple of
_WIDEST = 512  # channels of a head for which the kernel has been compiled
# From so many scores of a head on XLA keeps all of them in memory, as float32. Of fewer there is less to save, and
# XLA's own attention is left to fuse them.
_MANY_SCORES = 4096**2


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
    mesh = jax.sharding.get_abstract_mesh()  # that of `sharding.visible`, or of whoever has split the work by hand
    device = mesh.abstract_device if mesh.are_all_axes_auto else None
    how = implementation(q.dtype, q.shape[-1], device.platform if device else jax.default_backend())
    if how == "splash" and not (
        device and not causal and q.shape[0] % mesh.size == 0 and are_many(q.shape[1], k.shape[1])
    ):
        how = None
    if how and device and device.device_kind == IMAGINED:
        return _counted(how, q, k, v)
    if how == "splash":
        return by_splash(q, k, v, mesh)
    if how == "cudnn" and jax.default_backend() != "gpu":  # it asks the GPU that is here
        how = None
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation=how)


def implementation(dtype, head_dim, platform):
    """Whose flash attention there is for it, for the shapes that every such device takes; None: XLA's own for all."""
    if jnp.dtype(dtype).itemsize != 2:
        return None
    if platform == "gpu" and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "splash" if platform == "tpu" and head_dim <= _WIDEST else None


def are_many(queries, keys):
    """Whether so many tokens, in whole blocks of the kernel, are worth it."""
    return queries % _LANES == 0 == keys % _LANES and queries * keys >= _MANY_SCORES


def block(tokens, head_dim):
    """Tokens that the kernel holds at a time: as many as the memory next to the core of a v4 takes, in equal blocks.

    The more, the less there is to add up of the gradients of q, which are written once for each block of keys.
    """
    most = 1024 if head_dim <= _LANES else 512
    return max(size for size in range(_LANES, most + 1, _LANES) if tokens % size == 0)


def by_splash(q, k, v, mesh, interpret=False):
    """`attend` by the kernel on each device of `mesh` for its own rows; `interpret` runs it where there is no TPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # costs a start that has no TPU

    rows = PartitionSpec(mesh.axis_names)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    def own_rows(q, k, v):
        (_, queries, heads, head_dim), keys = q.shape, k.shape[1]
        of_queries, of_keys = block(queries, head_dim), block(keys, head_dim)
        forward = {"block_q": of_queries, "block_kv": of_keys, "block_kv_compute": of_keys}
        backward = {"block_q_dkv": of_queries, "block_kv_dkv": of_keys, "block_kv_dkv_compute": of_keys}
        blocks = splash.BlockSizes(**forward, **backward, use_fused_bwd_kernel=True)
        mask = splash.MultiHeadMask([splash.FullMask((queries, keys))] * heads)
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)
        q, k, v = (jnp.swapaxes(h, 1, 2) for h in (q * head_dim**-0.5, k, v))
        return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)

    return own_rows(q, k, v)


# What `costs` counts in the place of a kernel: what it reads, writes and keeps. No such program is ever run.

FLASH, FLASH_GRADIENT = "flash_attention", "flash_attention_gradient"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _counted(how, q, k, v):
    return _counted_forward(how, q, k, v)[0]


def _counted_forward(how, q, k, v):
    sums = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)  # of each query's exponentials
    h, sums, *_ = jax.ffi.ffi_call(FLASH, [q, sums, *_laid_out(how, q, k, v, q)], vmap_method="broadcast_all")(q, k, v)
    return h, (q, k, v, h, sums)


def _counted_backward(how, kept, g):
    q, k, v, *_ = kept
    copies = k.shape[1] // block(k.shape[1], q.shape[-1]) if how == "splash" else 0  # of the gradient of q
    results = [q, k, v, *_laid_out(how, q, k, v, g, *[q] * copies)]
    return tuple(jax.ffi.ffi_call(FLASH_GRADIENT, results, vmap_method="broadcast_all")(*kept, g)[:3])


def _laid_out(how, *arrays):
    """Shapes of arrays as the splash kernel takes them, channels in whole lanes."""
    if how != "splash":
        return []
    padded = [(b, heads, tokens, -(-d // _LANES) * _LANES) for b, tokens, heads, d in (h.shape for h in arrays)]
    return [jax.ShapeDtypeStruct(shape, arrays[0].dtype) for shape in padded]


_counted.defvjp(_counted_forward, _counted_backward)
