"""From a pipeline that diffusers wrote to students that diffusers runs: the whole chain, from a folder on disk."""

import sys
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch_modules import shake

sys.path.insert(0, str(Path(__file__).parents[1]))
import plain_features
from latent_run import MODEL, drawn_like, latent_config, write_pairs, write_tokenizer

from guided_distill import diagnostics, generate, pipeline, sample, samplers, sharding
from guided_distill.encode import encode
from guided_distill.export import command
from guided_distill.interop.command import import_weights
from guided_distill.interop.latent_folder import read_model
from guided_distill.teachers import shapes_of
from guided_distill.workdir import Run

CAPTION = "red"
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
             "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip


def write_pipeline(folder, channels=4):
    """A small Stable Diffusion, made and saved by diffusers."""
    unet = {
        "sample_size": 4,
        "in_channels": channels,
        "out_channels": 4,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
    }
    vae = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 8,
    }
    text = {"vocab_size": 54, "max_position_embeddings": 8, "hidden_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 16, "bos_token_id": 52, "eos_token_id": 53}  # fmt: skip
    write_tokenizer(folder / "words")
    kind = diffusers.StableDiffusionInpaintPipeline if channels == 9 else diffusers.StableDiffusionPipeline
    kind(
        unet=shake(diffusers.UNet2DConditionModel(**unet)),
        vae=shake(diffusers.AutoencoderKL(**vae)),
        text_encoder=shake(transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "words"),
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "theirs")
    return folder / "theirs"


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Of the eight that tests have: a program for one compiles faster, and its state is saved faster."""
    make = sharding.make_mesh
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sharding, "make_mesh", lambda devices=None, fsdp=1: make((devices or jax.devices())[:1]))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, config, summary) of a run on a model of diffusers."""
    folder = tmp_path_factory.mktemp("chain")
    import_weights(None, str(write_pipeline(folder)), str(folder / "model"))
    updates = {"data.holdout": 3, "stage1.w_max": 14.0, "stage2.teacher_steps": 8, "checkpoint.every": 100}
    config = latent_config(folder, **updates, **{"evaluate.num_steps": (1, 4), "evaluate.w": (4.0,)})
    encode(config, f"folder:{write_pairs(folder / 'pairs')}")
    config["data"]["holdout"] = 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        plain_features.use(monkeypatch)
        monkeypatch.setattr(diagnostics, "looked_at", lambda stages: [])  # it compiles as much again
        summary = pipeline.run(config, folder / "run")
    return folder, config, summary


def test_the_model_read_is_the_one_written(finished):
    assert read_model(finished[0] / "model") == MODEL


def test_every_student_is_measured(finished):
    rows = finished[2]["rows"]
    assert {row["num_steps"]: row["nfe"] for row in rows if row["stage"].startswith("stage2")} == {1: 1, 4: 4}


@pytest.mark.parametrize(
    "begin", [{}, {"image": "red.png", "start": 2}, {"image": "red.png", "mask": "hole.png"}, {"to_w": 9.0}]
)
def test_pictures_come_out(finished, tmp_path, begin):
    folder, config, _ = finished
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "red.png")
    hole = Image.new("L", (8, 8))
    hole.paste(255, (4, 0, 8, 8))
    hole.save(tmp_path / "hole.png")
    begin = {key: str(tmp_path / value) if isinstance(value, str) else value for key, value in begin.items()}
    told = {"num_steps": 4, "series": None, "w": 3.0, "labels": None, "num": 3, "seed": 0, "captions": [CAPTION]}
    out = tmp_path / "x.npz"
    sample.sample(config, folder / "run", out=str(out), begin=sample.From(**begin), **told)
    x = np.load(out)["x"]
    assert x.shape == (3, 8, 8, 3) and np.ptp(x, axis=0).max() > 1e-3


def test_students_run_in_stock_pipelines_of_text_and_of_pictures(finished, tmp_path):
    folder, config, _ = finished
    command.export(config, folder / "run", formats=["diffusers"], stages=None, with_teacher=False, licence=None,
                   out=str(tmp_path / "out"))  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("| diffusers | det_") == 3 and "no safety checker" in card
    place = tmp_path / "out" / "diffusers" / "det_0004"
    there = diffusers.StableDiffusionPipeline.from_pretrained(place)
    there.set_progress_bar_config(disable=True)
    noise = np.random.default_rng(0).normal(size=(1, 4, 4, 4)).astype(np.float32)
    latents = torch.tensor(np.moveaxis(noise, -1, 1).copy())
    image = there(CAPTION, latents=latents, num_inference_steps=4, guidance_scale=3.0, output_type="np").images
    run = pipeline.open_run(config, folder / "run", create=False)
    stage = run.stage("stage2_det_0004")
    cond = {"text": run.space.embed([CAPTION]), "w": np.full(1, 2.0, np.float32)}
    sampler = generate.compiled(stage.model.static(), samplers.deterministic, run.mesh)
    z = sampler(run.params_of(stage), run.grid, None, cond, np.int32(4), noise)
    np.testing.assert_allclose(run.shown(np.asarray(z)) * 0.5 + 0.5, image, atol=1e-4)
    pictures = diffusers.StableDiffusionImg2ImgPipeline(**there.components, requires_safety_checker=False)
    pictures.set_progress_bar_config(disable=True)
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    calls = []
    pictures.unet.register_forward_hook(lambda module, given, result: calls.append(len(given[0])))
    given = {"image": red, "num_inference_steps": 4, "guidance_scale": 3.0, "strength": 0.5, "output_type": "np"}
    assert pictures(CAPTION, **given).images.shape == (1, 8, 8, 3) and calls == [1, 1]


def test_a_student_that_paints_in_runs_in_the_stock_pipeline(tmp_path, monkeypatch):
    import_weights(None, str(write_pipeline(tmp_path, channels=9)), str(tmp_path / "model"))
    model = read_model(tmp_path / "model")
    updates = {"data.holdout": 3, "to_v.updates": 1, "stage2.teacher_steps": 2, "checkpoint.every": 100}
    config = latent_config(tmp_path, model, **updates, **{"evaluate.num_steps": (1,)})
    encode(config, f"folder:{write_pairs(tmp_path / 'pairs')}")
    config["data"]["holdout"] = 0
    monkeypatch.setattr(Run, "finished", lambda self, stage: True)
    monkeypatch.setattr(Run, "params_of", lambda self, stage: drawn_like(shapes_of(stage.init)))
    command.export(config, tmp_path / "run", formats=["diffusers"], stages=None, with_teacher=False, licence=None,
                   out=str(tmp_path / "out"))  # fmt: skip
    index = (tmp_path / "out" / "diffusers" / "det_0001" / "model_index.json").read_text()
    assert "StableDiffusionInpaintPipeline" in index
