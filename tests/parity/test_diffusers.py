"""Our latent networks beside diffusers' on the same random weights: values, keys, whole folders in both directions."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch_modules import arrays, close, shake

from guided_distill.diffusion import DiscreteBetas
from guided_distill.interop import diffusers_configs, diffusers_names
from guided_distill.interop.tensors import export_tree, import_tree
from guided_distill.models import make_model_fn
from guided_distill.models.autoencoder import Autoencoder
from guided_distill.models.latent_models import LATENT_MODELS, part_shapes
from guided_distill.models.sd_unet import SDUNet, SDUNetConfig, timestep

SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
UNETS = {
    "sd1": UNET,
    "sd1 with w": UNET | {"time_cond_proj_dim": 256},
    "sd2": UNET | {"attention_head_dim": (2, 4, 4), "use_linear_projection": True, "upcast_attention": True},
    "sd2 with w": UNET | {"attention_head_dim": (2, 4, 4), "use_linear_projection": True, "time_cond_proj_dim": 512},
    "inpainting": UNET | {"in_channels": 9},
    "inpainting with w": UNET | {"in_channels": 9, "time_cond_proj_dim": 256},
    "ldm": UNET
    | {
        "in_channels": 3,
        "out_channels": 3,
        "attention_head_dim": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
}
TIMES, STRENGTHS = np.array([0, 124, 499, 999]), np.array([0.0, 2.0, 8.5, 14.0], np.float32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def channels_first(x):
    return torch.tensor(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def config_of(model):
    """What save_pretrained writes, read back."""
    return json.loads(model.to_json_string())


# The U-Net


def guidance_embedding(w, width):
    """As the pipelines make it of guidance_scale - 1."""
    pipeline = diffusers.StableDiffusionPipeline
    return pipeline.get_guidance_scale_embedding(None, torch.tensor(w), embedding_dim=width)


@pytest.mark.parametrize("name", UNETS)
def test_the_unet_agrees_at_every_time_and_strength(name):
    theirs = shake(diffusers.UNet2DConditionModel(**UNETS[name]))
    config = diffusers_configs.read_unet(config_of(theirs), SCHEDULER, name)
    params = import_tree(diffusers_names.unet(config), part_shapes(config), arrays(theirs), name)
    z, text = normal(4, 8, 8, config.out_channels), normal(4, 7, 24, seed=1)
    cond, given = {"text": text}, z
    if config.extra_channels == 5:
        cond |= {"mask": (normal(4, 8, 8, 1, seed=2) > 0).astype(np.float32), "masked": normal(4, 8, 8, 4, seed=3)}
        given = np.concatenate([z, cond["mask"], cond["masked"]], -1)
    extra = {}
    if config.w_conditioned:
        cond |= {"w": STRENGTHS}
        extra = {"timestep_cond": guidance_embedding(STRENGTHS, config.w_channels)}
    with torch.no_grad():
        expected = theirs(channels_first(given), torch.tensor(TIMES), torch.tensor(text), **extra).sample
    logsnr = DiscreteBetas().logsnr((TIMES + 1) / 1000).astype(np.float32)
    ours = jax.jit(make_model_fn(SDUNet(config)))(params, z, logsnr, cond)
    close(ours, expected)
    if config.w_conditioned:
        still = jax.jit(make_model_fn(SDUNet(config)))(params, z, logsnr, cond | {"w": STRENGTHS[::-1].copy()})
        assert np.abs(still - ours).max() > 1e-2


@pytest.mark.parametrize("name", UNETS)
def test_the_unet_goes_back_bit_for_bit_and_so_does_its_config(name):
    theirs = shake(diffusers.UNet2DConditionModel(**UNETS[name]))
    config = diffusers_configs.read_unet(config_of(theirs), SCHEDULER, name)
    state, names = arrays(theirs), diffusers_names.unet(config)
    back = export_tree(names, import_tree(names, part_shapes(config), state, name))
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    again = diffusers.UNet2DConditionModel.from_config(diffusers_configs.write_unet(config, 8))
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in state.items()
    }


@pytest.mark.parametrize("name", ["sd1", "sd1_inpainting", "sd2_base"])
@pytest.mark.parametrize("part", ["unet", "autoencoder"])
def test_every_key_of_a_published_model_has_its_place_at_full_size(name, part):
    config = getattr(LATENT_MODELS[name], part)
    write = getattr(diffusers_configs, f"write_{part}")
    kind = {"unet": diffusers.UNet2DConditionModel, "autoencoder": diffusers.AutoencoderKL}[part]
    with torch.device("meta"):
        theirs = kind.from_config(write(config, 64)).state_dict()
    shapes = getattr(diffusers_names, part)(config).their_shapes(part_shapes(config))
    assert shapes == {key: tuple(value.shape) for key, value in theirs.items()}


def test_the_levels_of_noise_and_their_times_are_the_schedulers():
    scheduler = diffusers.DDIMScheduler.from_config(
        diffusers_configs.write_scheduler(LATENT_MODELS["sd2_768"].unet, "v")
    )
    abar = scheduler.alphas_cumprod.numpy().astype(np.float64)
    index = np.arange(1000)
    alpha, _ = DiscreteBetas().alpha_sigma(DiscreteBetas().logsnr((index + 1) / 1000))
    np.testing.assert_allclose(alpha**2, abar, rtol=2e-5)
    logsnr = np.log(abar / (1 - abar)).astype(np.float32)
    np.testing.assert_allclose(timestep(jnp.asarray(logsnr), 0.00085, 0.012, 1000), index, atol=5e-3)
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.tolist() == [1000 * i // steps - 1 for i in range(steps, 0, -1)]


def test_noise_without_an_image_ends_where_the_schedulers_does():
    config = SDUNetConfig(zero_terminal_snr=True)
    scheduler = diffusers.DDIMScheduler.from_config(diffusers_configs.write_scheduler(config, "v"))
    abar = scheduler.alphas_cumprod.numpy().astype(np.float64)
    schedule = DiscreteBetas(zero_terminal_snr=True)
    logsnr = schedule.logsnr((np.arange(1000) + 1) / 1000)
    alpha, _ = schedule.alpha_sigma(logsnr)
    assert abar[-1] < 1e-12 and 0.0 < alpha[-1] < 1e-4
    np.testing.assert_allclose(alpha[:-1], abar[:-1] ** 0.5, rtol=1e-3)
    found = timestep(jnp.asarray(logsnr, jnp.float32), 0.00085, 0.012, 1000, True)
    np.testing.assert_allclose(found, np.arange(1000), atol=5e-3)


# Autoencoders

KL = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 32,
}
VQ = KL | {"latent_channels": 3, "num_vq_embeddings": 50, "scaling_factor": 1.0, "block_out_channels": (16, 32)}
VQ |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
AUTOENCODERS = {"kl": (diffusers.AutoencoderKL, KL), "vq": (diffusers.VQModel, VQ)}


def imported(name):
    kind, arguments = AUTOENCODERS[name]
    theirs = shake(kind(**arguments))
    config = diffusers_configs.read_autoencoder(config_of(theirs), name)
    params = import_tree(diffusers_names.autoencoder(config), part_shapes(config), arrays(theirs), name)
    return (
        theirs,
        config,
        lambda method, *x: jax.jit(lambda *x: Autoencoder(config).apply({"params": params}, *x, method=method))(*x),
    )


def test_the_kl_autoencoder_agrees_both_ways():
    theirs, config, ours = imported("kl")
    x, noise = normal(2, 32, 24, 3), normal(2, 8, 6, 4, seed=1)
    with torch.no_grad():
        posterior = theirs.encode(channels_first(x)).latent_dist
        moments = ours("moments", x)
        close(moments.mean, posterior.mean)
        close(moments.logvar, posterior.logvar)
        sample = posterior.mean + posterior.std * channels_first(noise)
        close(ours("encode", x, noise), config.scale * sample)
        z = 0.5 * noise
        close(ours("decode", z), theirs.decode(channels_first(z) / config.scale).sample)


def test_the_quantised_autoencoder_agrees_both_ways():
    theirs, config, ours = imported("vq")
    assert config.num_codes == 50
    x, z = normal(2, 16, 24, 3), 0.3 * normal(2, 8, 12, 3, seed=1)
    with torch.no_grad():
        close(ours("encode", x), theirs.encode(channels_first(x)).latents)
        close(ours("decode", z), theirs.decode(channels_first(z)).sample)
        codes = theirs.quantize(channels_first(z))[2][2].reshape(2, 8, 12)
        assert len(codes.unique()) > 10
        np.testing.assert_array_equal(ours("codes", z), codes.numpy())


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_goes_back_bit_for_bit(name):
    kind, arguments = AUTOENCODERS[name]
    state = arrays(shake(kind(**arguments)))
    config = diffusers_configs.read_autoencoder(config_of(kind(**arguments)), name)
    names = diffusers_names.autoencoder(config)
    back = export_tree(names, import_tree(names, part_shapes(config), state, name))
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    again = kind.from_config(diffusers_configs.write_autoencoder(config, 8))
    assert {key: tuple(v.shape) for key, v in again.state_dict().items()} == {k: v.shape for k, v in state.items()}
