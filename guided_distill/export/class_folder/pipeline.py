"""A few-step student of classes: DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True) loads it."""

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

_ROUNDING = 1e-5  # of a guidance_scale that was a float32 on its way


class FewStepClassPipeline(DiffusionPipeline):
    """One call of the network a step, at any guidance_scale = 1 + w of the trained range.

    With `classes` and `vae` the U-Net is of latents and told an index of time; without, of pixels and told a log-SNR.
    """

    _optional_components = ["vae", "classes"]
    model_cpu_offload_seq = "classes->unet->vae"

    def __init__(self, unet, scheduler, vae=None, classes=None, num_classes=10, w_min=0.0, w_max=4.0, noise_std=1.0):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, classes=classes)
        self.register_to_config(num_classes=num_classes, w_min=w_min, w_max=w_max, noise_std=noise_std)

    @torch.no_grad()
    def __call__(
        self,
        class_labels,
        guidance_scale=None,
        num_inference_steps=None,
        generator=None,
        latents=None,
        output_type="pil",
    ):
        """`images` of `class_labels`, a list: PIL, "np" [B, H, W, C] in [0, 1] or "latent" [B, C, H, W] as sampled.

        `guidance_scale` is 2, or what is nearest to it in the trained range, by default. `latents` is the noise to
        start from. Raises ValueError for what the student was not trained for.
        """
        if guidance_scale is None:
            guidance_scale = 1.0 + min(max(1.0, self.config.w_min), self.config.w_max)
        if num_inference_steps is None:
            num_inference_steps = len(self.scheduler.config.times)
        labels = torch.as_tensor(class_labels).reshape(-1)
        self._check(labels, guidance_scale)
        self.scheduler.set_timesteps(num_inference_steps)
        device, dtype = self._execution_device, self.unet.dtype
        labels = labels.to(device, torch.long)
        side, channels = self.unet.config.sample_size, self.unet.config.in_channels
        if latents is None:
            shape = (len(labels), channels, side, side)
            latents = self.config.noise_std * randn_tensor(shape, generator=generator, device=device)
        z = latents.to(device, torch.float32)
        w = torch.full((len(labels),), guidance_scale - 1.0, device=device)
        for i in self.progress_bar(self.scheduler.timesteps.tolist()):
            raw = self._network(z.to(dtype), self.scheduler.config.times[i - 1], labels, w)
            z, x = self.scheduler.step(raw.float(), i, z)
        if output_type == "latent":
            return ImagePipelineOutput(images=x)
        if self.vae is not None:
            x = self.vae.decode(x.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.float()
        return ImagePipelineOutput(images=VaeImageProcessor().postprocess(x, output_type=output_type))

    def _network(self, z, time, labels, w):
        if self.classes is None:
            return self.unet(z, torch.full((len(z),), time, device=z.device), labels, w)
        width, text = self.unet.config.time_cond_proj_dim, self.classes(labels).to(z.dtype)
        strength = None if width is None else strength_sinusoid(w, width).to(z.dtype)
        return self.unet(z, time, encoder_hidden_states=text, timestep_cond=strength).sample

    def _check(self, labels, guidance_scale):
        low, high = 1.0 + self.config.w_min, 1.0 + self.config.w_max
        is_number = isinstance(guidance_scale, int | float)
        if not is_number or not low - _ROUNDING <= guidance_scale <= high + _ROUNDING:
            raise ValueError(f"guidance_scale={guidance_scale}: this student was trained for {low:g} to {high:g}")
        are_whole = not labels.is_floating_point() and labels.dtype != torch.bool
        if not are_whole or ((labels < 0) | (labels >= self.config.num_classes)).any():
            raise ValueError(f"class_labels={labels.tolist()}: classes are 0 to {self.config.num_classes - 1}")


def strength_sinusoid(w, dim):
    """[sin, cos] of 1000 w, w [B], times exp(-ln(1e4) j / (dim/2 - 1)), j < dim/2: [B, dim], as in stock pipelines."""
    step = np.log(np.float32(1e4)) / np.float32(dim // 2 - 1)
    frequencies = torch.tensor(np.exp(np.arange(dim // 2, dtype=np.float32) * -step), device=w.device)
    angle = 1000.0 * w[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=1)
