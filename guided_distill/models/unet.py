"""The pixel U-Net of arXiv 2202.00512 with the w input of arXiv 2210.03142, in Flax Linen, NHWC.

Counted in `tests/test_unet.py`: 60,004,099 parameters for the unconditional CIFAR-10 network and 295,900,035 for
ImageNet 64, before the branch that takes w.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from guided_distill.models.attention import attend
from guided_distill.models.clip import TextConfig, TextEncoder
from guided_distill.models.conv import conv_general_dilated
from guided_distill.models.embeddings import Embedding
from guided_distill.models.norm import GroupNorm
from guided_distill.models.remat import rematerialised


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Hyper-parameters of the pixel U-Net; the defaults are the published CIFAR-10 network (arXiv 2202.00512)."""

    channels: int = 256
    emb_channels: int = 1024
    multipliers: tuple[int, ...] = (1, 1, 1)
    num_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (8, 16)  # sides of the feature maps, after patching
    head_dim: int | None = None  # None: one head
    norm_groups: int = 32
    dropout: float = 0.2
    num_classes: int = 10  # 0: no label input. Label num_classes means "no condition".
    out_channels: int = 3  # "both" needs twice the image's
    patch: int = 1  # space-to-depth factor: the network runs at side / patch
    text: TextConfig | None = None  # of the encoder of captions, trained with the rest; None: there is none
    w_conditioned: bool = False
    dtype: str = "float32"  # of the computation; parameters stay float32
    remat: bool = False  # recompute each block in the backward pass
    remat_policy: str = "nothing"  # what a block that is recomputed keeps, a key of remat.POLICIES


def _conv(features, dtype, *, kernel=3, zero_init=False, name=None):
    return nn.Conv(
        features,
        (kernel, kernel),
        dtype=dtype,
        kernel_init=nn.initializers.zeros if zero_init else nn.initializers.lecun_normal(),
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


@jax.custom_vjp
def upsample(h):
    """Each pixel four times: [B, H, W, C] -> [B, 2 H, 2 W, C]. It has reverse-mode gradients only."""
    b, height, width, c = h.shape
    h = jnp.broadcast_to(h[:, :, None, :, None, :], (b, height, 2, width, 2, c))
    return h.reshape(b, 2 * height, 2 * width, c)


def _upsample_bwd(_, g):
    # Sums of slices: XLA's CPU takes twice as long to reduce over two short axes at once.
    b, height, width, c = g.shape
    g = g.reshape(b, height // 2, 2, width // 2, 2, c)
    g = g[:, :, 0] + g[:, :, 1]
    return (g[:, :, :, 0] + g[:, :, :, 1],)


upsample.defvjp(lambda h: (upsample(h), None), _upsample_bwd)


def _downsample(h):
    b, height, width, c = h.shape
    return h.reshape(b, height // 2, 2, width // 2, 2, c).mean((2, 4))


_RESAMPLE = {"none": lambda h: h, "up": upsample, "down": _downsample}


class ResnetBlock(nn.Module):
    """GroupNorm, swish, resample, conv, conditioned GroupNorm, swish, dropout, zero conv; plus the skip."""

    config: UNetConfig
    features: int
    resample: str = "none"

    @nn.compact
    def __call__(self, x, emb, train):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        norm = functools.partial(GroupNorm, config.norm_groups, dtype)
        resample = _RESAMPLE[self.resample]
        h = resample(norm(name="norm1")(x, swish=True))
        x = resample(x)
        h = _conv(self.features, dtype, name="conv1")(h)
        scale, shift = jnp.split(nn.Dense(2 * self.features, dtype=dtype, name="emb")(nn.swish(emb)), 2, axis=-1)
        h = norm(name="norm2")(h, scale, shift, swish=True)
        h = nn.Dropout(config.dropout, deterministic=not train)(h)
        h = _conv(self.features, dtype, zero_init=True, name="conv2")(h)
        if x.shape[-1] != self.features:
            # As a matrix: with more axes XLA's CPU transposes the gradient of the output for that of the kernel.
            x = nn.Dense(self.features, dtype=dtype, name="skip")(x.reshape(-1, x.shape[-1])).reshape(h.shape)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over all positions: GroupNorm, q/k/v, softmax, zero projection, residual.

    With states of a text [B, L, D] over these too (arXiv 2112.10741, section 2.3: keys and values put beside the own).
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, x, text=None):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        b, height, width, c = x.shape
        head_dim = config.head_dim or c
        h = GroupNorm(config.norm_groups, dtype, name="norm")(x).reshape(b, height * width, c)
        q, k, v = (
            nn.Dense(c, dtype=dtype, name=name)(h).reshape(b, height * width, c // head_dim, head_dim) for name in "qkv"
        )
        if text is not None:
            k, v = (
                jnp.concatenate([own, nn.Dense(c, dtype=dtype, name=name)(text).reshape(b, -1, *own.shape[2:])], axis=1)
                for own, name in ((k, "text_k"), (v, "text_v"))
            )
        h = attend(q, k, v).reshape(b, height, width, c)
        return x + nn.Dense(c, dtype=dtype, kernel_init=nn.initializers.zeros, name="out")(h)


class UNet(nn.Module):
    """z [B, H, W, C], logsnr [B], label i32 [B] or None, w [B] or None -> [B, H, W, out_channels], float32.

    With config.text also tokens i32 [B, L] of captions.
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, z, logsnr, label, w, *, train=False, tokens=None):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        block = rematerialised(ResnetBlock, config, static_argnums=(3,))
        attention = rematerialised(AttentionBlock, config)
        embedding = Embedding(
            config.channels,
            config.emb_channels,
            config.num_classes,
            config.w_conditioned,
            config.dtype,
            name="embedding",
        )
        emb, text = embedding(logsnr, label, w), None
        if config.text is not None:
            text, whole = TextEncoder(dataclasses.replace(config.text, dtype=config.dtype), name="text")(tokens)
            emb = emb + nn.Dense(config.emb_channels, dtype=dtype, name="text_emb")(whole)

        def resnet(h, name, features, resample="none"):
            return block(config, features, resample, name=name)(h, emb, train)

        def attend(h, name):
            return attention(config, name=name)(h, text) if h.shape[1] in config.attention_resolutions else h

        h = _conv(config.channels, dtype, name="conv_in")(_space_to_depth(z, config.patch).astype(dtype))
        skips, levels = [h], [config.channels * m for m in config.multipliers]
        for level, features in enumerate(levels):
            for i in range(config.num_blocks):
                h = attend(resnet(h, f"down_{level}_{i}", features), f"down_{level}_{i}_attention")
                skips.append(h)
            if level != len(levels) - 1:
                h = resnet(h, f"down_{level}_resample", features, "down")
                skips.append(h)

        h = resnet(h, "mid_0", levels[-1])
        h = attention(config, name="mid_attention")(h, text)
        h = resnet(h, "mid_1", levels[-1])

        for level, features in reversed(list(enumerate(levels))):
            for i in range(config.num_blocks + 1):
                h = resnet(jnp.concatenate([h, skips.pop()], axis=-1), f"up_{level}_{i}", features)
                h = attend(h, f"up_{level}_{i}_attention")
            if level:
                h = resnet(h, f"up_{level}_resample", features, "up")

        h = GroupNorm(config.norm_groups, dtype, name="norm_out")(h, swish=True)
        h = _conv(config.out_channels * config.patch**2, dtype, zero_init=True, name="conv_out")(h)
        return _depth_to_space(h, config.patch).astype(jnp.float32)


def _space_to_depth(x, patch):
    b, height, width, c = x.shape
    x = x.reshape(b, height // patch, patch, width // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height // patch, width // patch, patch * patch * c)


def _depth_to_space(x, patch):
    b, height, width, c = x.shape
    x = x.reshape(b, height, width, patch, patch, c // patch**2).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, height * patch, width * patch, c // patch**2)
