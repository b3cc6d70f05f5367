"""`guided_distill.models.unet` and its train step as they are written in PyTorch: the peer that benchmarks time."""

import inspect
import math

import torch
from torch import nn

from guided_distill.export.class_folder.pixel_unet import PixelUNet
from guided_distill.interop.pixel_unet_names import to_torch


def make_unet(config, side, in_channels):
    """The network of a UNetConfig at `side`: z [B, C, H, W], logsnr [B], label [B] -> [B, C, H, W]."""
    known = {name: getattr(config, name) for name in inspect.signature(PixelUNet).parameters if hasattr(config, name)}
    return PixelUNet(sample_size=side, in_channels=in_channels, **known)


def load_flax(model, params):
    """Copies the Linen tree `params` into a PixelUNet. Raises RuntimeError where they differ."""
    model.load_state_dict({key: torch.tensor(value) for key, value in to_torch(params).items()})


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
