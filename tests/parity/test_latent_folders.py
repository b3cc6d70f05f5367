"""Whole models on disk: what diffusers writes we read, what we write it runs, and single files by its converters."""

import dataclasses
import functools
import shutil
import sys
import types

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils

from guided_distill import diffusion, samplers
from guided_distill.guidance import classifier_free, make_denoiser
from guided_distill.interop import compvis, diffusers_configs, diffusers_folder, diffusers_names, weight_files
from guided_distill.interop.tensors import export_tree
from guided_distill.models import make_model_fn
from guided_distill.models.autoencoder import Autoencoder, AutoencoderConfig
from guided_distill.models.clip import TextConfig, TextEncoder
from guided_distill.models.latent_models import LATENT_MODELS, LatentModel, part_shapes
from guided_distill.models.sd_unet import SDUNet, SDUNetConfig

UNET = SDUNetConfig(
    channels=16,
    multipliers=(1, 2),
    num_blocks=1,
    attention=(True, False),
    heads=(2, 2),
    context_dim=32,
    norm_groups=8,
    w_conditioned=True,
)
STUDENT = LatentModel(
    UNET,
    AutoencoderConfig(channels=16, multipliers=(1, 2), num_blocks=1, norm_groups=8),
    TextConfig(vocabulary=99, positions=16, width=32, layers=1, heads=4, mlp=37),
    "v",
    8,
)
SCHEDULE = diffusion.DiscreteBetas()


def random_params(model):
    """Values that keep the size of what passes them, and no zeros."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 10
        return (rng.normal(size=leaf.shape) / fan_in**0.5).astype(np.float32)

    return {part: jax.tree.map(draw, part_shapes(getattr(model, part))) for part in model.parts}


def close(ours, theirs, rtol=1e-4):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    assert ours.shape == theirs.shape
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert error <= rtol, error


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder, params = tmp_path_factory.mktemp("student"), random_params(STUDENT)
    diffusers_folder.write_diffusers(folder, STUDENT, params)
    return folder, params


def load(folder):
    """A pipeline, part by part: a tokenizer needs files that these models have none of."""
    parts = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        "scheduler": diffusers.DDIMScheduler.from_pretrained(folder / "scheduler"),
    }
    extra = {"safety_checker": None, "feature_extractor": None, "tokenizer": None, "requires_safety_checker": False}
    found = diffusers.StableDiffusionPipeline(**parts, **extra)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def pipeline(written):
    return load(written[0])


def test_a_text_encoder_with_the_prefix_is_loaded_by_todays_transformers(written, pipeline):
    _, params = written
    tokens = np.array([[97, 5, 8, *[98] * 13]])
    states, _ = jax.jit(TextEncoder(STUDENT.text_encoder).apply)({"params": params["text_encoder"]}, tokens)
    close(states, pipeline.text_encoder(torch.tensor(tokens)).last_hidden_state)


def ended(pipeline, z, text, num_steps, guidance_scale):
    """The latents that the pipeline ends with, [1, C, h, w]; the calls of its network are one of one row a step."""
    calls = []
    hook = pipeline.unet.register_forward_hook(lambda module, given, result: calls.append(given[0].shape[0]))
    latents = pipeline(
        prompt_embeds=torch.tensor(text),
        latents=torch.tensor(np.moveaxis(z, -1, 1).copy()),
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images
    hook.remove()
    assert calls == [1] * num_steps
    return latents


def noise_and_text():
    rng = np.random.default_rng(1)
    return rng.normal(size=(1, 8, 8, 4)).astype(np.float32), rng.normal(size=(1, 5, 32)).astype(np.float32)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 9.0])
def test_the_pipeline_ends_where_our_sampler_ends(written, pipeline, num_steps, guidance_scale):
    _, params = written
    z, text = noise_and_text()
    theirs = ended(pipeline, z, text, num_steps, guidance_scale)
    at = _sampled(params["unet"], z, {"text": text, "w": np.full(1, guidance_scale - 1.0, np.float32)}, num_steps)
    close(np.moveaxis(np.asarray(at), -1, 1), theirs)
    with torch.no_grad():
        image = np.asarray(_decoded(params["autoencoder"], at))
        close(np.moveaxis(image, -1, 1), pipeline.vae.decode(theirs / 0.18215).sample)


def test_sixteen_steps_end_elsewhere_by_what_the_pipeline_rounds_and_no_more(written, pipeline):
    """16 does not divide 1000: its times are rounded, and its steps of 62 miss the next of them by one, half the time.

    Along its times ours ends where it ends; along t = i/16, which a student is trained at, not far from there.
    """
    _, params = written
    z, text = noise_and_text()
    cond = {"text": text, "w": np.full(1, 2.0, np.float32)}
    theirs = ended(pipeline, z, text, 16, 3.0)
    times = pipeline.scheduler.timesteps.tolist()
    assert times == [999, 937, 874, 811, 749, 687, 624, 561, 499, 437, 374, 311, 249, 187, 124, 61]
    along = z
    for n in times:
        alpha, sigma = SCHEDULE.alpha_sigma(_logsnr(n - 62)) if n > 61 else (np.ones(1), np.zeros(1))
        along = _stepped(params["unet"], along, _logsnr(n), cond, alpha.astype(np.float32), sigma.astype(np.float32))
    close(np.moveaxis(np.asarray(along), -1, 1), theirs)
    ours = np.moveaxis(np.asarray(_sampled(params["unet"], z, cond, 16)), -1, 1)
    drift = np.linalg.norm(ours - theirs.numpy()) / np.linalg.norm(theirs)
    assert 1e-3 < drift < 5e-2, drift


def _logsnr(n):
    """Of the time that diffusers calls n, [1]."""
    return SCHEDULE.logsnr(np.array([(n + 1) / SCHEDULE.num_betas])).astype(np.float32)


def _denoiser(params):
    return make_denoiser(make_model_fn(SDUNet(UNET)), params, SCHEDULE, "v")


@jax.jit
def _stepped(params, z, logsnr, cond, alpha_s, sigma_s):
    return diffusion.ddim_step(_denoiser(params)(z, logsnr, cond), alpha_s, sigma_s)


@jax.jit
def _sampled(params, z, cond, num_steps):
    grid = jax.tree.map(jnp.asarray, diffusion.make_grid(SCHEDULE, 16))
    return samplers.deterministic(_denoiser(params), grid, z, cond, num_steps)


@jax.jit
def _decoded(params, z):
    return Autoencoder(STUDENT.autoencoder).apply({"params": params}, z, method="decode")


@pytest.mark.parametrize("num_steps", [4, 20])
def test_a_teacher_is_guided_there_as_here(num_steps, tmp_path):
    """Without the w input the pipeline doubles its batch, as our teacher does."""
    model = KINDS["sd1"]
    params = random_params(model)
    diffusers_folder.write_diffusers(tmp_path, model, params)
    rng = np.random.default_rng(1)
    z, text, null = (rng.normal(size=(1, *shape)).astype(np.float32) for shape in ((8, 8, 4), (5, 32), (5, 32)))
    calls, pipeline = [], load(tmp_path)
    pipeline.unet.register_forward_hook(lambda module, given, result: calls.append(given[0].shape[0]))
    theirs = pipeline(
        prompt_embeds=torch.tensor(text),
        negative_prompt_embeds=torch.tensor(null),
        latents=torch.tensor(np.moveaxis(z, -1, 1).copy()),
        num_inference_steps=num_steps,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    assert calls == [2] * num_steps
    schedule = diffusion.DiscreteBetas()
    denoiser = make_denoiser(make_model_fn(SDUNet(model.unet)), params["unet"], schedule, "eps")
    guided = classifier_free(denoiser, lambda cond: {**cond, "text": jnp.asarray(null)})
    cond = {"text": jnp.asarray(text), "w": jnp.full(1, 2.0)}
    grid = jax.tree.map(jnp.asarray, diffusion.make_grid(schedule, num_steps))
    ours = jax.jit(lambda z: samplers.deterministic(guided, grid, z, cond, num_steps))(z)
    close(np.moveaxis(np.asarray(ours), -1, 1), theirs)


def test_what_diffusers_saves_again_we_read_as_it_was(written, pipeline, tmp_path):
    folder, params = written
    for place in ("unet", "vae", "text_encoder", "scheduler"):
        getattr(pipeline, place).save_pretrained(tmp_path / place)
    model, again = diffusers_folder.read_diffusers(tmp_path)
    assert model == STUDENT
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_folder_of_before_there_were_safetensors_is_the_same(written, pipeline, tmp_path):
    folder, params = written
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old/unet/diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "old/text_encoder/model.safetensors").unlink()
    torch.save(pipeline.unet.state_dict(), tmp_path / "old/unet/diffusion_pytorch_model.bin")
    torch.save(pipeline.text_encoder.state_dict(), tmp_path / "old/text_encoder/pytorch_model.bin")
    model, again = diffusers_folder.read_diffusers(tmp_path / "old")
    assert model == STUDENT
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_unet_that_diffusers_saved_by_itself_stands_for_the_folders(written, tmp_path):
    """As the distilled U-Nets of arXiv 2406.14539: PyTorch's file of a state dict, with a sinusoid of w 512 wide."""
    folder, params = written
    said = diffusers_configs.write_unet(UNET, 8) | {"time_cond_proj_dim": 512}
    state = diffusers.UNet2DConditionModel.from_config(said).state_dict()
    torch.save(state, tmp_path / "cfg_distill.pt")
    model, read = diffusers_folder.read_diffusers(folder, tmp_path / "cfg_distill.pt")
    assert model == dataclasses.replace(STUDENT, unet=dataclasses.replace(UNET, w_channels=512))
    back = export_tree(diffusers_names.unet(model.unet), read["unet"])
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value.numpy(), err_msg=key)
    jax.tree.map(np.testing.assert_array_equal, read["autoencoder"], params["autoencoder"])


# Single files

KINDS = {
    "sd1": dataclasses.replace(STUDENT, unet=dataclasses.replace(UNET, w_conditioned=False), parameterisation="eps"),
    "sd2_base": dataclasses.replace(
        STUDENT,
        unet=dataclasses.replace(UNET, w_conditioned=False, linear_projection=True, num_blocks=2, multipliers=(1, 2, 2),
                                 attention=(True, True, False), heads=(1, 2, 2)),
        text_encoder=dataclasses.replace(STUDENT.text_encoder, activation="gelu", layers=23),
    ),
}  # fmt: skip


def converted(part, state, model):
    """The part under diffusers' names, by its own converters."""
    tensors = {key: torch.tensor(value) for key, value in state.items()}
    if part == "unet":
        return single_file_utils.convert_ldm_unet_checkpoint(tensors, diffusers_configs.write_unet(model.unet, 8))
    if part == "autoencoder":
        config = diffusers_configs.write_autoencoder(model.autoencoder, 8)
        return single_file_utils.convert_ldm_vae_checkpoint(tensors, config)
    if model.text_encoder.activation == "quick_gelu":
        return single_file_utils.convert_ldm_clip_checkpoint(tensors)
    said = transformers.CLIPTextConfig(**diffusers_configs.write_text_encoder(model.text_encoder))
    with torch.device("meta"):
        return single_file_utils.convert_open_clip_checkpoint(transformers.CLIPTextModel(said), tensors)


@pytest.mark.parametrize("name", KINDS)
def test_single_files_mean_what_diffusers_takes_them_for(name, tmp_path, monkeypatch):
    model = KINDS[name]
    params = random_params(model)
    monkeypatch.setitem(LATENT_MODELS, name, model)
    compvis.write_compvis(tmp_path / "a.safetensors", model, params)
    state = diffusers_folder.read_safetensors(tmp_path / "a.safetensors")
    for part in model.parts:
        expected = export_tree(getattr(diffusers_names, part)(getattr(model, part)), params[part])
        theirs = {key: np.asarray(value) for key, value in converted(part, state, model).items()}
        theirs = {key.removeprefix("text_model."): value for key, value in theirs.items()}
        expected = {key.removeprefix("text_model."): value for key, value in expected.items()}
        assert theirs.keys() == expected.keys(), part
        for key, value in expected.items():
            np.testing.assert_array_equal(theirs[key].reshape(value.shape), value, err_msg=key)


def test_a_checkpoint_of_pytorch_is_read_without_running_code(tmp_path, monkeypatch):
    model, params = KINDS["sd1"], random_params(KINDS["sd1"])
    monkeypatch.setitem(LATENT_MODELS, "sd1", model)
    compvis.write_compvis(tmp_path / "a.safetensors", model, params)
    state = diffusers_folder.read_safetensors(tmp_path / "a.safetensors")
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {key: torch.tensor(value) for key, value in state.items()}, "global_step": 7}, path)
    jax.tree.map(np.testing.assert_array_equal, compvis.read_compvis(path, "sd1")[1], params)
    torch.save({"state_dict": {"a": functools.partial(print)}}, path)
    with pytest.raises(diffusers_folder.UserError, match="cannot be read as weights alone"):
        compvis.read_compvis(path, "sd1")


class Named:
    """Pickles as a call of what `function` stands for."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def stand_in(module, name, monkeypatch):
    """A class that pickles as module.name while `monkeypatch` lasts."""
    there, found = types.ModuleType(module), type(name, (), {"__module__": module})
    setattr(there, name, found)
    package = module.split(".")[0]
    monkeypatch.setitem(sys.modules, package, sys.modules.get(package, types.ModuleType(package)))
    monkeypatch.setitem(sys.modules, module, there)
    return found


def test_a_checkpoint_of_lightning_is_read_without_lightning(tmp_path):
    """As the published ones are: keyed by the class of a callback, with a number of an old NumPy."""
    path, weight, lightning = tmp_path / "a.ckpt", torch.arange(3.0), "pytorch_lightning.callbacks.model_checkpoint"
    with pytest.MonkeyPatch.context() as monkeypatch:
        callback = stand_in(lightning, "ModelCheckpoint", monkeypatch)
        scalar = stand_in("numpy.core.multiarray", "scalar", monkeypatch)
        best = Named(scalar, np.dtype("f8"), np.float64(0.5).tobytes())
        kept = {"monitor": "val/loss", "best_model_score": best, "current_score": torch.ones(())}
        torch.save({"callbacks": {callback: kept}, "last": callback(), "state_dict": {"a": weight}}, path)
        other = stand_in("pytorch_lightning.trainer", "Trainer", monkeypatch)
        torch.save({"callbacks": {other: kept}, "state_dict": {"a": weight}}, tmp_path / "b.ckpt")
        torch.save(weight, tmp_path / "c.ckpt")
        (tmp_path / "d.ckpt").touch()
        torch.save({"state_dict": None}, tmp_path / "e.ckpt")
    named = {f"{lightning}.ModelCheckpoint", "numpy.core.multiarray.scalar", "numpy.dtype"}
    assert {*torch.serialization.get_unsafe_globals_in_checkpoint(path)} == named
    allowed = {*torch.serialization.get_safe_globals()}
    read = weight_files.read_weights(path)
    assert read.keys() == {"a"} and read["a"].tolist() == [0.0, 1.0, 2.0]
    assert lightning not in sys.modules and {*torch.serialization.get_safe_globals()} == allowed
    for name, says in (
        ("b", "cannot be read as weights alone .*GLOBAL pytorch_lightning.trainer.Trainer"),
        ("c", "holds no tensors by their names"),
        ("d", "cannot be read as weights alone .EOFError"),
        ("e", "holds no tensors by their names"),
    ):
        with pytest.raises(diffusers_folder.UserError, match=says):
            weight_files.read_weights(tmp_path / f"{name}.ckpt")
