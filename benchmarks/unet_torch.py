"""`guided_distill.models.unet` and its train step as they are written in PyTorch: the peer that benchmarks time."""

import math

import torch
import torch.nn.functional as F
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


class Embedding(nn.Module):
    """One vector per example from log-SNR and label."""

    def __init__(self, config):
        super().__init__()
        self.channels, self.num_classes = config.channels, config.num_classes
        self.time1 = nn.Linear(config.channels, config.emb_channels)
        self.time2 = nn.Linear(config.emb_channels, config.emb_channels)
        self.label = nn.Linear(config.num_classes, config.emb_channels)

    def forward(self, logsnr, label):
        position = 1000 * torch.atan(torch.exp(-0.5 * logsnr.clamp(-20, 20))) / (0.5 * math.pi)
        half = self.channels // 2
        frequencies = torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float32) / (half - 1))
        angle = position[:, None] * frequencies
        time = self.time2(F.silu(self.time1(torch.cat([angle.sin(), angle.cos()], dim=1))))
        return time + self.label(F.one_hot(label, self.num_classes + 1)[:, :-1].float())


class UNet(nn.Module):
    """`UNetConfig` at `side`, without patches and w: z [B, C, H, W], logsnr [B], label [B] -> [B, C, H, W]."""

    def __init__(self, config, side, in_channels):
        super().__init__()
        self.embedding = Embedding(config)
        self.conv_in = nn.Conv2d(in_channels, config.channels, 3, padding=1)
        self.path = []  # (a block's name, the name of the attention behind it or None)
        levels = [config.channels * m for m in config.multipliers]
        c, skips = config.channels, [config.channels]

        def add(name, c_in, c_out, resample="none", attention=None):
            self.add_module(name, ResnetBlock(config, c_in, c_out, resample))
            if attention:
                self.add_module(attention, AttentionBlock(config, c_out))
            self.path.append((name, attention))

        def add_level(name, c_in, c_out, level):
            attends = side >> level in config.attention_resolutions
            add(name, c_in, c_out, attention=f"{name}_attention" if attends else None)

        for level, features in enumerate(levels):
            for i in range(config.num_blocks):
                add_level(f"down_{level}_{i}", c, features, level)
                c = features
                skips.append(c)
            if level != len(levels) - 1:
                add(f"down_{level}_resample", c, c, "down")
                skips.append(c)
        add("mid_0", c, c, attention="mid_attention")
        add("mid_1", c, c)
        for level, features in reversed(list(enumerate(levels))):
            for i in range(config.num_blocks + 1):
                add_level(f"up_{level}_{i}", c + skips.pop(), features, level)
                c = features
            if level:
                add(f"up_{level}_resample", c, c, "up")
        self.norm_out = nn.GroupNorm(config.norm_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def forward(self, z, logsnr, label):
        emb = self.embedding(logsnr, label)
        h = self.conv_in(z)
        skips = [h]
        for name, attention in self.path:
            joins = name.startswith("up") and not name.endswith("resample")
            h = self.get_submodule(name)(torch.cat([h, skips.pop()], dim=1) if joins else h, emb)
            h = self.get_submodule(attention)(h) if attention else h
            if name.startswith("down"):
                skips.append(h)
        return self.conv_out(F.silu(self.norm_out(h)))


@torch.no_grad()
def load_flax(model, params):
    """Copies the Linen tree `params` (numpy leaves) into a UNet; raises KeyError or RuntimeError where they differ."""
    tensors = {}

    def put(name, node):
        if {"q", "k", "v"} <= node.keys():
            stacked = {leaf: [torch.tensor(node[part][leaf]) for part in "qkv"] for leaf in ("kernel", "bias")}
            tensors[f"{name}qkv.weight"] = torch.cat(stacked["kernel"], dim=1).T
            tensors[f"{name}qkv.bias"] = torch.cat(stacked["bias"])
        for key, value in node.items():
            if key in ("q", "k", "v"):
                continue
            if hasattr(value, "keys"):
                put(f"{name}{key}.", value)
            elif key == "kernel":
                tensors[f"{name}weight"] = torch.tensor(value).movedim((-1, -2), (0, 1))
            else:
                tensors[f"{name}{'weight' if key == 'scale' else key}"] = torch.tensor(value)

    put("", params)
    for name, own in model.state_dict().items():  # a skip is a matmul there and a 1x1 convolution here
        if name.endswith("skip.weight"):
            tensors[name] = tensors[name][:, :, None, None]
        assert tensors[name].shape == own.shape, name
    model.load_state_dict(tensors)


class TrainStep:
    """The denoising step: label dropout, z_t of the cosine schedule, v loss, clipping, Adam, moving average."""

    def __init__(self, model, *, learning_rate, cond_dropout, num_classes, decay):
        self.model, self.cond_dropout, self.num_classes, self.decay = model, cond_dropout, num_classes, decay
        self.params = list(model.parameters())
        self.ema = [p.detach().clone() for p in self.params]
        self.optimiser = torch.optim.Adam(self.params, lr=learning_rate, foreach=True)
        self.step = 0

    def __call__(self, x, label):
        """x [B, C, H, W] in [-1, 1], label [B] -> the loss."""
        b = x.shape[0]
        alpha, sigma = (f(0.5 * math.pi * torch.rand(b)).clamp(min=4.5e-5) for f in (torch.cos, torch.sin))
        logsnr = 2 * (alpha / sigma).log()
        alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
        eps = torch.randn_like(x)
        label = torch.where(torch.rand(b) < self.cond_dropout, self.num_classes, label)
        v = self.model(alpha * x + sigma * eps, logsnr, label)
        v_mse = (v - (alpha * eps - sigma * x)).square().mean((1, 2, 3))
        loss = (torch.maximum(alpha, sigma).square().flatten() * v_mse).mean()

        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.optimiser.step()
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.params, 1 - min(self.decay, (1 + self.step) / (10 + self.step)))
        return loss.item()
