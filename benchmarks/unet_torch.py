"""`guided_distill.models.unet` and its train step as they are written in PyTorch: the peer that benchmarks time."""

import inspect
import math
import os

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


def thread_counts():
    """One and all: on a busy machine PyTorch's threads wait for each other, and one is many times faster than all."""
    return sorted({1, len(os.sched_getaffinity(0))})


class TrainStep:
    """An update as it is written without a framework: loss, clipping, Adam, moving average where `decay` is not 0.

    With `bfloat16` networks compute in it where PyTorch's autocast lets them; weights stay float32.
    """

    def __init__(self, model, *, learning_rate, decay, bfloat16=False):
        self.model, self.decay, self.bfloat16 = model, decay, bfloat16
        self.params = list(model.parameters())
        self.ema = [p.detach().clone() for p in self.params] if decay else None
        self.optimiser = torch.optim.Adam(self.params, lr=learning_rate, foreach=True)
        self.step = 0

    def loss(self, x, label):
        """The loss of x [B, C, H, W] in [-1, 1] with labels [B]."""
        raise NotImplementedError

    def __call__(self, x, label):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = self.loss(x, label)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.optimiser.step()
        self.step += 1
        if self.ema:
            with torch.no_grad():
                torch._foreach_lerp_(self.ema, self.params, 1 - min(self.decay, (1 + self.step) / (10 + self.step)))
        return loss.item()


def levels(t):
    """alpha, sigma [B, 1, 1, 1] and logsnr [B] of the cosine schedule at t [B]."""
    alpha, sigma = (f(0.5 * math.pi * t).clamp(min=4.5e-5) for f in (torch.cos, torch.sin))
    return alpha[:, None, None, None], sigma[:, None, None, None], 2 * (alpha / sigma).log()


def weighted(v_mse, alpha, sigma):
    """max(1, alpha^2 / sigma^2) of the error in x, as it is in v."""
    return (torch.maximum(alpha, sigma).square().flatten() * v_mse).mean()


def clipped_x(v, z, alpha, sigma):
    """x_hat of v, in the data's range, as what teaches has it."""
    return (alpha * z - sigma * v).clamp(-1.0, 1.0)


class DenoisingStep(TrainStep):
    """The teacher's: label dropout, z_t, v loss."""

    def __init__(self, model, *, cond_dropout, num_classes, **options):
        super().__init__(model, **options)
        self.cond_dropout, self.num_classes = cond_dropout, num_classes

    def loss(self, x, label):
        b = x.shape[0]
        alpha, sigma, logsnr = levels(torch.rand(b, device=x.device))
        eps = torch.randn_like(x)
        label = torch.where(torch.rand(b, device=x.device) < self.cond_dropout, self.num_classes, label)
        v = self.model(alpha * x + sigma * eps, logsnr, label)
        return weighted((v - (alpha * eps - sigma * x)).square().mean((1, 2, 3)), alpha, sigma)


class GuidedStep(TrainStep):
    """Stage one: the guided teacher's output for w of each example (arXiv 2210.03142, algorithm 1)."""

    def __init__(self, model, teacher, *, num_classes, w_max, **options):
        super().__init__(model, **options)
        self.teacher, self.num_classes, self.w_max = teacher, num_classes, w_max

    def loss(self, x, label):
        b = x.shape[0]
        alpha, sigma, logsnr = levels(torch.rand(b, device=x.device))
        w = self.w_max * torch.rand(b, device=x.device)
        z = alpha * x + sigma * torch.randn_like(x)
        with torch.no_grad():
            labels = torch.cat([label, torch.full_like(label, self.num_classes)])
            both = self.teacher(z.repeat(2, 1, 1, 1), logsnr.repeat(2), labels)
            with_label, without = both.chunk(2)
            strength = w[:, None, None, None]
            x_hat = clipped_x((1 + strength) * with_label - strength * without, z, alpha, sigma)
            target = alpha * (z - alpha * x_hat) / sigma - sigma * x_hat
        v = self.model(z, logsnr, label, w)
        return weighted((v - target).square().mean((1, 2, 3)), alpha, sigma)


class HalvingStep(TrainStep):
    """Stage two: one step of 1/N learns two of 1/(2N) by the student before (arXiv 2210.03142, algorithm 2)."""

    def __init__(self, model, teacher, *, num_steps, w_max, **options):
        super().__init__(model, **options)
        self.teacher, self.num_steps, self.w_max = teacher, num_steps, w_max

    def loss(self, x, label):
        b, n = x.shape[0], self.num_steps
        i = torch.randint(1, n + 1, (b,), device=x.device)
        (alpha, sigma, logsnr), middle, (alpha_s, sigma_s, _) = (levels((i - part) / n) for part in (0.0, 0.5, 1.0))
        w = self.w_max * torch.rand(b, device=x.device)
        z = alpha * x + sigma * torch.randn_like(x)
        with torch.no_grad():
            z_m, _ = self._ddim(z, label, w, (alpha, sigma, logsnr), middle)
            z_s, last = self._ddim(z_m, label, w, middle, (alpha_s, sigma_s, None))
            ratio = sigma_s / sigma
            target = (z_s - ratio * z) / (alpha_s - ratio * alpha)
            target = torch.where((i == 1)[:, None, None, None], last, target)
        x_hat = alpha * z - sigma * self.model(z, logsnr, label, w)
        x_mse = (x_hat - target).square().mean((1, 2, 3))
        return ((alpha / sigma).square().clamp(min=1.0).flatten() * x_mse).mean()

    def _ddim(self, z, label, w, here, there):
        alpha, sigma, logsnr = here
        x_hat = clipped_x(self.teacher(z, logsnr, label, w), z, alpha, sigma)
        return there[0] * x_hat + there[1] * (z - alpha * x_hat) / sigma, x_hat
