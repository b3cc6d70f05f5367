"""Stable Diffusion's inpainting network, 9 channels, distilled: the mask and what is around it are part of its input.

Masks are drawn as --mode=encode writes the latents of a masked picture: see `guided_distill.masks`.
"""

from configs import stable_diffusion


def get_config():
    """stable_diffusion.py with a mask and the masked picture's latent; guidance drops the text alone."""
    config = stable_diffusion.get_config()
    config.data.name = "latents:data/stable_diffusion_inpaint_latents"
    config.latent_model = config.teacher.checkpoint = "models/stable_diffusion_inpaint"
    config.model.extra_channels = 5
    return config
