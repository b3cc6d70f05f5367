"""The U-Net of latent diffusion and Stable Diffusion with the w input of arXiv 2210.03142, in Flax Linen, NHWC.

Counted in `tests/test_sd_unet.py`, before the branch that takes w: 859,520,964 parameters for Stable Diffusion 1,
865,910,724 for 2, 859,535,364 for inpainting and 400,920,579 for the class-conditional LDM of ImageNet 256 (arXiv
2112.10752), less its table of classes.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from guided_distill.models.attention import Attention
from guided_distill.models.embeddings import sinusoid
from guided_distill.models.latent_blocks import Downsample, ResnetBlock, Upsample, conv
from guided_distill.models.norm import GroupNorm
from guided_distill.models.remat import rematerialised


@dataclasses.dataclass(frozen=True)
class SDUNetConfig:
    """Hyper-parameters of the latent U-Net; the defaults are Stable Diffusion 1; SD_UNETS has others."""

    channels: int = 320
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_blocks: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)  # of each level; the middle has it always
    heads: tuple[int, ...] = (8, 8, 8, 8)  # of each level; the middle has as many as the last
    context_dim: int = 768
    linear_projection: bool = False  # around attention, in place of 1x1 convolutions
    norm_groups: int = 32
    extra_channels: int = 0  # that the mask and the latent of the masked image bring, where the network paints in
    out_channels: int = 4
    num_classes: int = 0  # 0: context is cond["text"]; else the label's token. num_classes means "no condition".
    w_conditioned: bool = False
    w_channels: int = 256  # width of the sinusoid of w
    betas: tuple[float, ...] = (0.00085, 0.012)  # first and last, linear in sqrt(beta), of the noise levels
    num_betas: int = 1000
    zero_terminal_snr: bool = False  # whether they end at pure noise (arXiv 2305.08891)
    dtype: str = "float32"  # of the computation; parameters stay float32
    remat: bool = False  # recompute each block in the backward pass
    remat_policy: str = "nothing"  # what a block that is recomputed keeps, a key of remat.POLICIES


SD_UNETS = {
    "sd1": SDUNetConfig(),
    "sd1_inpainting": SDUNetConfig(extra_channels=5),
    "sd2": SDUNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True),
    "ldm_imagenet256": SDUNetConfig(
        channels=192,
        multipliers=(1, 2, 3, 5),
        attention=(False, True, True, True),
        heads=(1, 1, 1, 1),
        context_dim=512,
        out_channels=3,
        num_classes=1000,
        betas=(0.0015, 0.0195),
    ),
}


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a GEGLU MLP (arXiv 2002.05202), each after LayerNorm with a residual.

    x [B, T, C], context [B, L, D] -> [B, T, C].
    """

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, context):
        channels = x.shape[-1]

        def norm(name):
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)

        h = norm("norm1")(x)
        x = x + Attention(self.heads, self.dtype, name="self_attention")(h, h)
        x = x + Attention(self.heads, self.dtype, name="cross_attention")(norm("norm2")(x), context)
        h = nn.Dense(8 * channels, dtype=self.dtype, name="mlp1")(norm("norm3")(x))
        h, gate = jnp.split(h, 2, axis=-1)
        return x + nn.Dense(channels, dtype=self.dtype, name="mlp2")(h * nn.gelu(gate, approximate=False))


class SpatialTransformer(nn.Module):
    """A TransformerBlock over all positions, between projections: x [B, H, W, C], context [B, L, D] -> as x."""

    config: SDUNetConfig
    heads: int

    @nn.compact
    def __call__(self, x, context):
        config, dtype, channels = self.config, jnp.dtype(self.config.dtype), x.shape[-1]
        h = GroupNorm(config.norm_groups, dtype, 1e-6, name="norm")(x)
        if config.linear_projection:
            project_in = nn.Dense(channels, dtype=dtype, name="project_in")
            project_out = nn.Dense(channels, dtype=dtype, kernel_init=nn.initializers.zeros, name="project_out")
        else:
            project_in = conv(channels, dtype, kernel=1, name="project_in")
            project_out = conv(channels, dtype, kernel=1, zero_init=True, name="project_out")
        h = project_in(h).reshape(x.shape[0], -1, channels)
        h = TransformerBlock(self.heads, dtype, name="block")(h, context)
        return x + project_out(h.reshape(x.shape))


class LatentEmbedding(nn.Module):
    """One vector [B, 4 channels] from log-SNR and, in a student, w (arXiv 2210.03142, section 3.1).

    w enters as a term of the time sinusoid, as stock pipelines have it, through a kernel that starts at zero: a student
    made from its teacher equals the teacher's conditional model for every w.
    """

    config: SDUNetConfig

    @nn.compact
    def __call__(self, logsnr, w):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        dense = functools.partial(nn.Dense, dtype=dtype)
        time = timestep(logsnr, *config.betas, config.num_betas, config.zero_terminal_snr)
        emb = time_sinusoid(time, config.channels)
        if config.w_conditioned:
            branch = dense(config.channels, use_bias=False, kernel_init=nn.initializers.zeros, name="w")
            emb = emb + branch(sinusoid(1000.0 * w, config.w_channels)).astype(emb.dtype)
        emb = dense(4 * config.channels, name="time1")(emb)
        return dense(4 * config.channels, name="time2")(nn.swish(emb))


class SDUNet(nn.Module):
    """z [B, H, W, C], logsnr [B], label i32 [B] or None, w [B] or None -> [B, H, W, out_channels], float32.

    text [B, L, context_dim] where there are no classes; mask [B, H, W, 1], 1 = repaint, and masked [B, H, W, C], the
    latent of the masked image, where the network paints in. Sides are multiples of 2^(levels - 1). The network has no
    dropout: `train` changes nothing. Raises ValueError where inputs and config do not agree.
    """

    config: SDUNetConfig

    @nn.compact
    def __call__(self, z, logsnr, label, w, *, train=False, text=None, mask=None, masked=None):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        block, transformer = (rematerialised(module, config) for module in (ResnetBlock, SpatialTransformer))
        levels = [config.channels * m for m in config.multipliers]
        if config.num_classes:
            text = nn.Embed(config.num_classes + 1, config.context_dim, name="classes")(label)[:, None]
        elif text is None:
            raise ValueError("cond['text'] is missing: without num_classes the U-Net attends to it")
        emb = LatentEmbedding(config, name="embedding")(logsnr, w)
        context = text.astype(dtype)

        def resnet(h, name, level):
            return block(levels[level], config.norm_groups, 1e-5, dtype, name=name)(h, emb)

        def attend(h, name, level):
            return transformer(config, config.heads[level], name=name)(h, context) if config.attention[level] else h

        h = conv(config.channels, dtype, name="conv_in")(_network_input(config, z, mask, masked).astype(dtype))
        skips = [h]
        for level in range(len(levels)):
            for i in range(config.num_blocks):
                h = attend(resnet(h, f"down_{level}_{i}", level), f"down_{level}_{i}_attention", level)
                skips.append(h)
            if level != len(levels) - 1:
                h = Downsample((1, 1), dtype, name=f"down_{level}_resample")(h)
                skips.append(h)

        h = resnet(h, "mid_0", -1)
        h = transformer(config, config.heads[-1], name="mid_attention")(h, context)
        h = resnet(h, "mid_1", -1)

        for level in reversed(range(len(levels))):
            for i in range(config.num_blocks + 1):
                h = resnet(jnp.concatenate([h, skips.pop()], axis=-1), f"up_{level}_{i}", level)
                h = attend(h, f"up_{level}_{i}_attention", level)
            if level:
                h = Upsample(dtype, name=f"up_{level}_resample")(h)

        h = GroupNorm(config.norm_groups, dtype, 1e-5, name="norm_out")(h, swish=True)
        return conv(config.out_channels, dtype, zero_init=True, name="conv_out")(h).astype(jnp.float32)


def _network_input(config, z, mask, masked):
    """z, the mask and the masked image's latent, in the order of the published inpainting networks."""
    extra = [part.astype(z.dtype) for part in (mask, masked) if part is not None]
    if (found := sum(part.shape[-1] for part in extra)) != config.extra_channels:
        raise ValueError(
            f"cond['mask'] and cond['masked'] bring {found} channels; the U-Net takes {config.extra_channels} besides z"
        )
    multiple = 2 ** (len(config.multipliers) - 1)
    if z.shape[1] % multiple or z.shape[2] % multiple:
        raise ValueError(f"a latent of {z.shape[1]} x {z.shape[2]}: its sides must be multiples of {multiple}")
    return jnp.concatenate([z, *extra], axis=-1)


def time_sinusoid(position, dim):
    """[cos, sin] of position [B] times exp(-ln(1e4) j / (dim / 2)), j < dim / 2: [B, dim].

    Of time, as the published weights have it; that of w differs in order and in frequencies.
    """
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(1e4) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = position.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


@functools.cache
def _logsnr_knots(beta_start, beta_end, num_betas, zero_terminal_snr):
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_betas) ** 2
    log_alpha_bar = np.cumsum(np.log1p(-betas))
    if zero_terminal_snr:
        alpha = np.exp(0.5 * log_alpha_bar)
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        log_alpha_bar = np.log(np.maximum(alpha**2, np.exp(-20.0)))
    return log_alpha_bar - np.log(-np.expm1(log_alpha_bar))


def timestep(logsnr, beta_start, beta_end, num_betas, zero_terminal_snr=False):
    """The network's own time in [0, num_betas - 1] of a log-SNR [B], linear between those of its discrete levels.

    It is num_betas t - 1 of the schedule of discrete betas; levels cleaner than the first, which no network has been
    trained at, count as the first.
    """
    knots = _logsnr_knots(beta_start, beta_end, num_betas, zero_terminal_snr)
    return jnp.interp(-logsnr, jnp.asarray(-knots, jnp.float32), jnp.arange(num_betas, dtype=jnp.float32))
