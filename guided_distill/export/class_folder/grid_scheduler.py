"""The steps that a student was trained for: DDIM on a table of noise levels (arXiv 2202.00512, section 2)."""

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config


class GridScheduler(SchedulerMixin, ConfigMixin):
    """alphas and sigmas at t = i/N, i = 0 .. N; `times` is what the network is told at i = 1 .. N.

    `prediction_type` is v, eps or x; `clip` bounds x_hat, or is None.
    """

    @register_to_config
    def __init__(self, times, alphas, sigmas, prediction_type="v", clip=None):
        self.set_timesteps(len(times))

    def set_timesteps(self, num_inference_steps, device=None):
        """Raises ValueError for any number of steps but the student's own."""
        steps = len(self.config.times)
        if num_inference_steps != steps:
            raise ValueError(f"num_inference_steps={num_inference_steps}: this student takes {steps} steps")
        self.timesteps = torch.arange(steps, 0, -1)

    def step(self, raw, i, z):
        """The network's output at z_t, t = i/N -> (z at (i - 1)/N, x_hat)."""
        alpha, sigma = self.config.alphas[i], self.config.sigmas[i]
        if self.config.prediction_type == "v":
            r = alpha**2 + sigma**2
            x, eps = (alpha * z - sigma * raw) / r, (sigma * z + alpha * raw) / r
        elif self.config.prediction_type == "eps":
            x, eps = (z - sigma * raw) / alpha, raw
        else:
            x, eps = raw, (z - alpha * raw) / sigma
        if self.config.clip is not None:
            x = x.clamp(-self.config.clip, self.config.clip)
            eps = (z - alpha * x) / sigma
        return self.config.alphas[i - 1] * x + self.config.sigmas[i - 1] * eps, x
