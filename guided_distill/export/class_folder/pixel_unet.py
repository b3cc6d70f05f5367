"""The pixel U-Net of arXiv 2202.00512 with the w input of arXiv 2210.03142, in PyTorch, for diffusers."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class ResnetBlock(nn.Module):
    """GroupNorm, swish, resample, conv, conditioned GroupNorm, swish, dropout, conv; plus the skip."""

    def __init__(self, config, c_in, c_out, resample="none"):
        super().__init__()
        self.resample, self.dropout = resample, config.dropout
        self.norm1 = nn.GroupNorm(config.norm_groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(config.emb_channels, 2 * c_out)
        self.norm2 = nn.GroupNorm(config.norm_groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = self._resample(F.silu(self.norm1(x)))
        x = self._resample(x)
        h = self.conv1(h)
        scale, shift = self.emb(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        h = self.conv2(F.dropout(h, self.dropout, self.training))
        return self.skip(x) + h

    def _resample(self, x):
        if self.resample == "none":
            return x
        return F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2, mode="nearest")


class AttentionBlock(nn.Module):
    """Self-attention over all positions, q, k and v as one matmul, plus the residual."""

    def __init__(self, config, channels):
        super().__init__()
        self.heads = channels // (config.head_dim or channels)
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x):
        b, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).view(b, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, height * width, c)
        return x + self.out(h).transpose(1, 2).reshape(b, c, height, width)


def sinusoid(position, dim):
    """[sin, cos] of position [B] times exp(-ln(1e4) j / (dim/2 - 1)), j < dim/2: [B, dim]."""
    # By NumPy in float32, as where the weights were trained: at angles of 1000 another rounding shows.
    step = np.log(np.float32(1e4)) / np.float32(dim // 2 - 1)
    # as_tensor, since torch.compile takes the array for a tensor, and warns of copies.
    frequencies = torch.as_tensor(np.exp(np.arange(dim // 2, dtype=np.float32) * -step), device=position.device)
    angle = position[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Embedding(nn.Module):
    """One vector per example from log-SNR, label and, in a student, w; label num_classes means "no condition"."""

    def __init__(self, config):
        super().__init__()
        self.channels, self.num_classes = config.channels, config.num_classes
        self.time1 = nn.Linear(config.channels, config.emb_channels)
        self.time2 = nn.Linear(config.emb_channels, config.emb_channels)
        if config.num_classes:
            self.label = nn.Linear(config.num_classes, config.emb_channels)
        if config.w_conditioned:
            self.w1 = nn.Linear(config.channels, config.emb_channels)
            self.w2 = nn.Linear(config.emb_channels, config.emb_channels)

    def forward(self, logsnr, label, w):
        dtype = self.time1.weight.dtype
        position = 1000 * torch.atan(torch.exp(-0.5 * logsnr.clamp(-20, 20))) / (0.5 * math.pi)
        emb = self.time2(F.silu(self.time1(sinusoid(position, self.channels).to(dtype))))
        if self.num_classes:
            emb = emb + self.label(F.one_hot(label, self.num_classes + 1)[:, :-1].to(dtype))
        if hasattr(self, "w1"):
            emb = emb + self.w2(F.silu(self.w1(sinusoid(1000 * w, self.channels).to(dtype))))
        return emb


class PixelUNet(ModelMixin, ConfigMixin):
    """z [B, C, H, W], logsnr [B], label i64 [B], w [B] or None -> the raw output [B, C, H, W]."""

    @register_to_config
    def __init__(
        self,
        sample_size=32,
        in_channels=3,
        out_channels=3,
        channels=256,
        emb_channels=1024,
        multipliers=(1, 1, 1),
        num_blocks=3,
        attention_resolutions=(8, 16),
        head_dim=None,
        norm_groups=32,
        dropout=0.0,
        num_classes=10,
        patch=1,
        w_conditioned=True,
    ):
        super().__init__()
        config, side = self.config, sample_size // patch
        self.embedding = Embedding(config)
        self.conv_in = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)
        self.path = []  # (a block's name, the name of the attention behind it or None)
        levels = [channels * m for m in multipliers]
        c, skips = channels, [channels]

        def add(name, c_in, c_out, resample="none", attention=None):
            self.add_module(name, ResnetBlock(config, c_in, c_out, resample))
            if attention:
                self.add_module(attention, AttentionBlock(config, c_out))
            self.path.append((name, attention))

        def add_level(name, c_in, c_out, level):
            attends = side >> level in attention_resolutions
            add(name, c_in, c_out, attention=f"{name}_attention" if attends else None)

        for level, features in enumerate(levels):
            for i in range(num_blocks):
                add_level(f"down_{level}_{i}", c, features, level)
                c = features
                skips.append(c)
            if level != len(levels) - 1:
                add(f"down_{level}_resample", c, c, "down")
                skips.append(c)
        add("mid_0", c, c, attention="mid_attention")
        add("mid_1", c, c)
        for level, features in reversed(list(enumerate(levels))):
            for i in range(num_blocks + 1):
                add_level(f"up_{level}_{i}", c + skips.pop(), features, level)
                c = features
            if level:
                add(f"up_{level}_resample", c, c, "up")
        self.norm_out = nn.GroupNorm(norm_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, out_channels * patch**2, 3, padding=1)

    def forward(self, z, logsnr, label, w=None):
        emb = self.embedding(logsnr, label, w)
        h = self.conv_in(space_to_depth(z, self.config.patch))
        skips = [h]
        for name, attention in self.path:
            joins = name.startswith("up") and not name.endswith("resample")
            h = self.get_submodule(name)(torch.cat([h, skips.pop()], dim=1) if joins else h, emb)
            h = self.get_submodule(attention)(h) if attention else h
            if name.startswith("down"):
                skips.append(h)
        return depth_to_space(self.conv_out(F.silu(self.norm_out(h))), self.config.patch)


def space_to_depth(x, patch):
    """[B, C, H, W] -> [B, patch patch C, H / patch, W / patch], the channels fastest, unlike F.pixel_unshuffle."""
    b, c, height, width = x.shape
    x = x.view(b, c, height // patch, patch, width // patch, patch)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(b, patch * patch * c, height // patch, width // patch)


def depth_to_space(x, patch):
    """The inverse of `space_to_depth`."""
    b, c, height, width = x.shape
    x = x.view(b, patch, patch, c // patch**2, height, width)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(b, c // patch**2, height * patch, width * patch)
